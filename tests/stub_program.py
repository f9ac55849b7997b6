#!/usr/bin/env python3
"""Stands in for `eva02-at` in the sweep's tests: evaluates within milliseconds, or misbehaves.

`convert` copies the bytes; `evaluate` counts them. evaluate's options:
    --fail           a user's mistake: exit code 2
    --crash-at TEXT  end by SIGKILL, once, where the checkpoint's content has TEXT
    --hang-at TEXT   hang, once, where the checkpoint's content is TEXT
    --sleep S        take a while
Anything else is the real program's.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path


def convert(words: list[str]) -> int:
    source, target = (Path(words[words.index(name) + 1]) for name in ("--input", "--output"))
    source = source / "state" if source.is_dir() else source
    with (target.parent / "conversions.txt").open("a") as log:
        log.write(f"{source}\n")
    if source.read_bytes().startswith(b"damaged"):
        print(f"eva02-at: error: checkpoint {source} cannot be read", file=sys.stderr)
        return 2
    shutil.copy(source, target)
    return 0


def evaluate(words: list[str]) -> int:
    weights = Path(words[words.index("--checkpoint") + 1])
    content = weights.read_text()
    if "--sleep" in words:
        time.sleep(float(words[words.index("--sleep") + 1]))
    if "--hang-at" in words and words[words.index("--hang-at") + 1] == content:
        hung = weights.with_suffix(".hung")
        if not hung.exists():
            hung.touch()
            time.sleep(600)
    if "--fail" in words:
        print("a warning\neva02-at: error: no such data", file=sys.stderr)
        return 2
    if "--crash-at" in words and words[words.index("--crash-at") + 1] in content:
        died = weights.with_suffix(".died")
        if not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    queries = [(k * len(content)) % 7 / 7 for k in range(20)]
    value = 100 * sum(queries) / len(queries)
    result = {
        "benchmark": words[words.index("--benchmark") + 1],
        "map": {"v2t": value, "avg": value + 1},
        "num_queries": 20,
        "num_missing_clips": 1,
        "per_query": {"map": {"v2t": queries}},
    }
    Path(words[words.index("--json") + 1]).write_text(json.dumps(result))
    return 0


def main() -> int:
    command, *words = sys.argv[1:]
    if command in ("convert", "evaluate"):
        return {"convert": convert, "evaluate": evaluate}[command](words)
    from lightning_modules.cli.main import main as real

    return real([command, *words])


if __name__ == "__main__":
    sys.exit(main())
