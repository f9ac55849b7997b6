"""What a sweep consists of: one cell for each checkpoint and benchmark, named by its content.

    DIR/plan.json                  the cells, and the checkpoints that are damaged
    DIR/results/KEY.json           a finished cell: what `eva02-at evaluate` wrote
    DIR/failures/KEY.json          one that failed, with the reason
    DIR/weights/CONTENT.safetensors   a checkpoint, converted once for all its cells
    DIR/logs/                      what the commands printed
    DIR/table.{md,csv,html}

KEY is a hash of the checkpoint's contents, the way it is read and evaluate's words, so a result is
found again whatever the checkpoint is called.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from datamodules.files import write_whole

KEY_DIGITS = 16


@dataclass(frozen=True)
class Cell:
    """One checkpoint on one benchmark.

    Attributes:
        key: Its name among the results.
        checkpoint: Path of the checkpoint.
        run: The run it belongs to: a curve of the page.
        step: Optimiser steps done, where known.
        content: Hash of its weights.
        read: Words for `eva02-at convert`: how to read it.
        benchmark: Words for `eva02-at evaluate`: the benchmark's name, then its options.
    """

    key: str
    checkpoint: str
    run: str
    step: int | None
    content: str
    read: tuple[str, ...]
    benchmark: tuple[str, ...]

    @property
    def name(self) -> str:
        """The checkpoint, for people."""
        return self.run if self.step is None else f"{self.run} @ {self.step}"

    @property
    def weights(self) -> str:
        """Names the converted checkpoint: what it holds and how it was read."""
        told = json.dumps([self.content, list(self.read)])
        return hashlib.sha256(told.encode()).hexdigest()[:KEY_DIGITS]


@dataclass
class Plan:
    """A sweep's cells.

    Attributes:
        cells: In the order of the table.
        damaged: Checkpoints that are incomplete or unreadable, and why.
        folder: Where commands run: relative paths in the benchmarks' options start there.
    """

    cells: list[Cell] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    folder: str = ""

    @classmethod
    def load(cls, directory: Path) -> Plan:
        """Read the plan of a sweep's directory; an empty one where there is none.

        Raises:
            ValueError: the file is damaged.
        """
        path = directory / "plan.json"
        if not path.exists():
            return cls(folder=str(Path.cwd()))
        try:
            raw = json.loads(path.read_text())
            cells = [_cell(row) for row in raw["cells"]]
            return cls(cells, raw["damaged"], raw["folder"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); remove it, results stay") from None

    def save(self, directory: Path) -> None:
        """Write the plan."""
        content = json.dumps(asdict(self), indent=1) + "\n"
        write_whole(directory / "plan.json", lambda path: path.write_text(content))

    def cell(self, key: str) -> Cell:
        """Return the cell of a key.

        Raises:
            ValueError: there is none.
        """
        for cell in self.cells:
            if cell.key == key:
                return cell
        raise ValueError(f"the plan has no cell {key!r}")

    def add(self, cells: Iterable[Cell]) -> None:
        """Add cells that are new; those of one run stay together, by rising step."""
        known = {cell.key: cell for cell in self.cells}
        known |= {cell.key: cell for cell in cells if cell.key not in known}
        order = {run: n for n, run in enumerate(dict.fromkeys(c.run for c in known.values()))}
        self.cells = sorted(
            known.values(), key=lambda c: (order[c.run], -1 if c.step is None else c.step)
        )


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(**{**row, "read": tuple(row["read"]), "benchmark": tuple(row["benchmark"])})


def parse_benchmarks(benchmarks: Sequence[str], variants: Sequence[str]) -> list[tuple[str, ...]]:
    """Split `ek100_mir --data DIR` into words, once for each variant of options.

    Args:
        benchmarks: A name of `eva02-at evaluate`, and options for it.
        variants: Options to add, each making a benchmark of its own; none leaves them as they are.
    """
    found = []
    for benchmark in benchmarks:
        for variant in variants or [""]:
            words = shlex.split(f"{benchmark} {variant}")
            if not words or words[0].startswith("-"):
                raise ValueError(
                    f"benchmark {benchmark!r} must begin with a benchmark's name, as 'ek100_mir "
                    "--data DIR'"
                )
            found.append(tuple(words))
    return list(dict.fromkeys(found))
