"""Runs a tutorial as it is written: its files are written, its commands run, its output compared.

```python title="mine.py"      a file of that name (any language)
```console                     `$ ` lines run in bash; what follows is the output, `...` as in
                               doctest; no lines, nothing compared
<!-- not run: REASON -->       the next block is left out
<!-- run instead: COMMANDS --> these run in place of the next block
<!-- prepare COMMANDS -->      what stands in for downloads, run where it stands
"""

from __future__ import annotations

import doctest
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
_PART = re.compile(
    r"^<!-- (?P<mark>not run: |run instead: |prepare\s)(?P<text>.*?)-->\s*$"
    r"|^```(?P<language>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<block>.*?)^```\s*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Step:
    """A file to write (`path`), or commands to run with the output they should print."""

    text: str
    path: str | None = None
    expected: str = ""


def steps(markdown: str) -> list[Step]:
    """Every step of a page in order."""
    found: list[Step] = []
    pending = ""
    for part in _PART.finditer(markdown):
        mark, block = (part["mark"] or "").strip(), part["block"]
        if mark == "prepare":
            found.append(Step(part["text"]))
        elif mark:
            pending = mark
            if mark == "run instead:":
                found.append(Step(part["text"]))
        elif pending:
            pending = ""
        elif part["title"]:
            found.append(Step(block, path=part["title"]))
        elif part["language"] == "console":
            found.extend(_commands(block))
    return found


def _commands(block: str) -> list[Step]:
    """Split a console block at its prompts; a command goes on after a backslash."""
    done: list[Step] = []
    command, output = "", ""
    for line in block.splitlines():
        if command.endswith("\\"):
            command += f"\n{line}"
        elif line.startswith("$ "):
            if command:
                done.append(Step(command, expected=output))
            command, output = line[2:], ""
        else:
            output += f"{line}\n"
    return [*done, Step(command, expected=output)] if command else done


def run(step: Step, folder: Path) -> None:
    """Do one step in a folder."""
    if step.path is not None:
        (folder / step.path).write_text(step.text)
        return
    environment = {**os.environ, "TESTS": str(TESTS)}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", step.text],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"$ {step.text}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    if step.expected and not doctest.OutputChecker().check_output(
        step.expected, done.stdout, flags
    ):
        raise AssertionError(
            f"$ {step.text}\nwas to print\n{step.expected}\nand printed\n{done.stdout}"
        )
