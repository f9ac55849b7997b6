"""`eva02-at bench gpu` (`make gpu`): what only a GPU can show, in ten minutes, without a network.

The tests that need a device, the doctor, the kernels, real training steps, decoding, and one short
demo run: each a process of its own with a limit, so that what fails or hangs costs its own row and
not the others'. All of it is kept, in docs/gpu/DEVICE.json and as a table beside it.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from datamodules.files import write_atomically
from lightning_modules.bench.timing import machine
from lightning_modules.cli.parser import CommandParser
from lightning_modules.models.config import resolve_config
from lightning_modules.planning.costs import GIB, largest_batch

TOTAL_S = 600
_PROGRAM = ("-m", "lightning_modules.cli.main")
# Two epochs: the recipes' warm-up takes the first.
DEMO = ("demo", "--out={out}", "--clips", "192", "64", "24", "--trainer.max_epochs=2")
_TESTS = (
    *("-m", "pytest", "-m", "gpu", "-q", "-rA", "-p", "no:cacheprovider"),
    *("tests/kernels", "tests/metrics", "tests/training/test_side_stream.py"),
)


@dataclass(frozen=True)
class Part:
    """One process.

    Attributes:
        name: For the report.
        words: After `python`; "{json}" stands for a file that it writes, "{out}" for a folder.
        limit_s: Seconds that it may take.
    """

    name: str
    words: Sequence[str]
    limit_s: int


@dataclass
class Outcome:
    """What became of a part.

    Attributes:
        name: The part's.
        command: As it was run.
        code: Exit code; None where it ran past its limit, or there was no time left.
        seconds: How long it took.
        content: What it wrote as JSON.
        tail: The end of what it printed.
    """

    name: str
    command: str
    code: int | None
    seconds: float
    content: dict[str, Any] = field(default_factory=dict)
    tail: list[str] = field(default_factory=list)


def parts(batches: dict[str, int]) -> list[Part]:
    """Return every part; `batches` are the pairs of a step by preset."""
    bench, out = (*_PROGRAM, "bench"), ("--json", "{json}")
    listed = [
        Part("tests", _TESTS, 150),
        Part("doctor", (*_PROGRAM, "doctor", *out), 90),
        Part("kernels", (*bench, "kernels", "--batch=32", "--rounds=9", *out), 80),
    ]
    for preset, batch in batches.items():
        step = (*bench, "step", f"--preset={preset}", "--depth=0", f"--batch={batch}", "--rounds=8")
        ours = ("--variants", "sdpa", "ours", "recomputed", "compiled", *out)
        listed.append(Part(f"step {preset}", (*step, *ours), 110))
        listed.append(
            Part(f"CUDA graph {preset}", (*step, "--variants", "ours", "graphs", *out), 60)
        )
    listed += [
        Part("demo", (*_PROGRAM, *DEMO, "--trainer.accelerator=gpu"), 120),
        Part("decoding", (*bench, "data", "--only=forms", "--rounds=1", *out), 90),
    ]
    return listed


def run_parts(listed: Sequence[Part], total_s: float = TOTAL_S) -> Iterator[Outcome]:
    """Run them one after another, no longer than `total_s` in all."""
    end = time.monotonic() + total_s
    for part in listed:
        outcome = _run(part, min(part.limit_s, end - time.monotonic()))
        ended = "past its limit" if outcome.code is None else f"exit code {outcome.code}"
        print(f"{outcome.name}: {ended} after {outcome.seconds:.0f} s", flush=True)
        yield outcome


def _run(part: Part, limit_s: float) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="eva02-at-gpu-") as scratch:
        file = Path(scratch, "part.json")
        places = {"{json}": str(file), "{out}": str(Path(scratch, "out"))}
        words = [_filled(word, places) for word in part.words]
        outcome = Outcome(part.name, " ".join(["python", *part.words]), None, 0.0)
        if limit_s <= 0:
            outcome.tail = ["no time was left"]
            return outcome
        start = time.monotonic()
        printed = Path(scratch, "printed")
        with printed.open("w") as log:
            process = subprocess.Popen(
                [sys.executable, *words], stdout=log, stderr=log, start_new_session=True
            )
            try:
                outcome.code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)  # and its loader workers
                process.wait()
        outcome.seconds = time.monotonic() - start
        outcome.tail = printed.read_text(errors="replace").splitlines()[-40:]
        if file.exists():
            outcome.content = json.loads(file.read_text())
        return outcome


def _filled(word: str, places: dict[str, str]) -> str:
    for name, place in places.items():
        word = word.replace(name, place)
    return word


def table(name: str, outcomes: Sequence[Outcome]) -> str:
    """Lay the outcomes out as Markdown."""
    facts = ", ".join(f"{key} {value}" for key, value in machine().items())
    lines = [f"# {name}", "", f"`make gpu`: {facts}.", "", "| part | exit code | seconds |"]
    lines.append("|---|---|---|")
    for outcome in outcomes:
        code = "past its limit" if outcome.code is None else outcome.code
        lines.append(f"| {outcome.name} | {code} | {outcome.seconds:.0f} |")
    lines += [
        "",
        "| comparison | variant | median ms | ratio | peak MiB | |",
        "|---|---|---|---|---|---|",
    ]
    for outcome in outcomes:
        for row in outcome.content.get("rows", []):
            peak = row.get("peak_bytes")
            notes = ", ".join(f"{key} {value}" for key, value in row.get("notes", {}).items())
            cells = (
                row["group"],
                row["name"],
                f"{row['median_s'] * 1e3:.2f}",
                f"{row['ratio']:.2f}x",
                "" if peak is None else f"{peak / 2**20:.0f}",
                notes,
            )
            lines.append(f"| {' | '.join(cells)} |")
    for outcome in outcomes:
        if outcome.code != 0:
            lines += ["", f"## {outcome.name}", "", "```", *outcome.tail, "```"]
    return "\n".join(lines) + "\n"


def write(outcomes: Sequence[Outcome], name: str, folder: Path) -> Path:
    """Write DEVICE.json and DEVICE.md; returns the table's path."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"\W+", "-", name).strip("-").lower()
    content = {"machine": machine(), "parts": [asdict(o) for o in outcomes]}
    write_atomically(folder / f"{stem}.json", json.dumps(content, indent=1) + "\n")
    page = folder / f"{stem}.md"
    write_atomically(page, table(name, outcomes))
    return page


def main(argv: list[str]) -> int:
    """Run every part on the first GPU.

    Args:
        argv: --out FOLDER, --seconds N.

    Returns:
        0, or 1 where a part failed or ran out of time.

    Raises:
        ValueError: There is no GPU.
    """
    parser = CommandParser("bench gpu", "What only a GPU can show, in ten minutes.")
    parser.add_argument("--out", type=Path, default=Path("docs/gpu"), help="(%(default)s)")
    parser.add_argument("--seconds", type=float, default=TOTAL_S, help="in all (%(default)s)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise ValueError(
            "there is no CUDA device here, so nothing was run and nothing is claimed; "
            "`eva02-at doctor` says why a GPU is not seen"
        )
    name = torch.cuda.get_device_name()
    room = 0.9 * torch.cuda.mem_get_info()[0] / GIB
    batches = {
        preset: min(wanted, largest_batch(resolve_config(preset, embed_dim=256), room))
        for preset, wanted in (("eva02_at_base_16", 128), ("eva02_at_large_14", 32))
    }
    listed = parts({p: b for p, b in batches.items() if b > 0})
    outcomes: list[Outcome] = []
    for outcome in run_parts(listed, args.seconds):
        outcomes.append(outcome)
        page = write(outcomes, name, args.out)  # each time: a machine may be taken away
    print(f"\n{page.read_text()}\nwritten: {page}, {page.with_suffix('.json')}")
    return int(any(outcome.code != 0 for outcome in outcomes))
