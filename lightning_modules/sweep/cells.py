"""Running cells: each in processes of its own, its result written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datamodules.files import write_whole
from lightning_modules.sweep.plan import Cell, Plan

_OUR_ERROR = "eva02-at: error: "


class CellFailed(Exception):
    """A command of a cell failed.

    Args:
        reason: Why, in a line.
        killed: By a signal: not the cell's own doing, so it is worth another try.
    """

    def __init__(self, reason: str, *, killed: bool) -> None:
        super().__init__(reason)
        self.killed = killed


def program() -> list[str]:
    """The command `eva02-at`: as the batch scripts name it in EVA02_AT, or as it runs here."""
    named = os.environ.get("EVA02_AT")
    return [named] if named else [sys.executable, "-m", "lightning_modules.cli.main"]


class SweepFiles:
    """The files of a sweep: see `plan`.

    Args:
        directory: The sweep's.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory).resolve()

    def result(self, cell: Cell) -> dict[str, Any] | None:
        """What a finished cell wrote: `cell`, `seconds`, and evaluate's own `result`."""
        return _read(self._result(cell))

    def failure(self, cell: Cell) -> dict[str, Any] | None:
        """Why a cell failed: `reason` and `killed`."""
        return _read(self._failure(cell))

    def waiting(self, plan: Plan, *, retry_failed: bool) -> list[Cell]:
        """Cells without a result.

        Args:
            plan: The sweep.
            retry_failed: Take those too that failed by themselves; the killed are always taken.
        """
        return [
            cell
            for cell in plan.cells
            if not self._result(cell).exists()
            and (retry_failed or (self.failure(cell) or {"killed": True})["killed"])
        ]

    def weights(self, cell: Cell) -> Path:
        """Where a cell's checkpoint lies converted, once for all its benchmarks."""
        return self.directory / "weights" / f"{cell.weights}.safetensors"

    def log(self, cell: Cell) -> Path:
        """What a cell's commands printed."""
        return self.directory / "logs" / f"{cell.key}.log"

    def keep_result(self, cell: Cell, result: dict[str, Any], seconds: float) -> None:
        """Write a finished cell; an earlier failure of it is forgotten."""
        content = {"cell": asdict(cell), "seconds": round(seconds, 3), "result": result}
        _write(self._result(cell), content)
        self._failure(cell).unlink(missing_ok=True)

    def keep_failure(self, cell: Cell, error: CellFailed) -> None:
        """Write why a cell failed."""
        content = {"cell": asdict(cell), "reason": str(error), "killed": error.killed}
        _write(self._failure(cell), content)

    def _result(self, cell: Cell) -> Path:
        return self.directory / "results" / f"{cell.key}.json"

    def _failure(self, cell: Cell) -> Path:
        return self.directory / "failures" / f"{cell.key}.json"


def run_cell(files: SweepFiles, cell: Cell, folder: str) -> bool:
    """Convert the checkpoint if nobody has yet, evaluate it, and keep the result.

    Args:
        files: The sweep's.
        cell: What to run.
        folder: Where evaluate runs.

    Returns:
        False where it failed; the reason is kept.
    """
    if files.result(cell) is not None:
        return True
    started = time.monotonic()
    answer = files.directory / "results" / f".{cell.key}.{os.getpid()}"
    answer.parent.mkdir(parents=True, exist_ok=True)
    try:
        convert_once(files, cell)
        words = ["evaluate", "--checkpoint", str(files.weights(cell))]
        words += ["--benchmark", *cell.benchmark, "--json", str(answer)]
        _command(words, files.log(cell), folder)
        result = _read(answer)
        if result is None:
            raise CellFailed("evaluate wrote no result", killed=False)
    except CellFailed as error:
        files.keep_failure(cell, error)
        return False
    finally:
        answer.unlink(missing_ok=True)
    files.keep_result(cell, result, time.monotonic() - started)
    return True


def convert_once(files: SweepFiles, cell: Cell) -> None:
    """Convert a cell's checkpoint, unless that is done; others wait while one does it.

    Raises:
        CellFailed: it cannot be read.
    """
    weights = files.weights(cell)
    with _locked(weights.with_suffix(".lock")):
        if not weights.exists():
            words = ["convert", "--input", cell.checkpoint, "--output", str(weights), *cell.read]
            _command(words, files.log(cell), str(files.directory))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with its process, on whichever node that is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        # where the file system has no locks, two may convert at once: the same bytes, twice
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _command(words: Sequence[str], log: Path, folder: str) -> None:
    """Run one of our commands; its last words are the reason if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a+b") as file:
        file.write(f"$ eva02-at {' '.join(words)}\n".encode())
        file.flush()
        began = file.tell()
        done = subprocess.run(
            [*program(), *words], stdout=file, stderr=subprocess.STDOUT, cwd=folder, check=False
        )
        file.seek(began)
        told = file.read().decode(errors="replace").strip().splitlines()
    if done.returncode == 0:
        return
    ours = [line.removeprefix(_OUR_ERROR) for line in told if line.startswith(_OUR_ERROR)]
    last = ours[-1] if ours else (told[-1] if told else "it said nothing")
    # a shell between us and the command reports a signal as 128 + its number
    number = -done.returncode if done.returncode < 0 else done.returncode - 128
    killed = number in set(signal.Signals)
    how = f"killed by {signal.Signals(number).name}" if killed else f"exit code {done.returncode}"
    raise CellFailed(f"{words[0]}: {last} ({how})", killed=killed)


def run_cells(
    files: SweepFiles,
    cells: Sequence[Cell],
    folder: str,
    num_jobs: int,
    on_cell: Callable[[Cell, bool], object],
) -> None:
    """Run cells here, some at a time; a failure of one leaves the others alone.

    Args:
        files: The sweep's.
        cells: What to run.
        folder: Where evaluate runs.
        num_jobs: Cells at a time.
        on_cell: Called with each finished cell and whether it succeeded.
    """
    with ThreadPoolExecutor(num_jobs) as pool:
        futures = {pool.submit(run_cell, files, cell, folder): cell for cell in cells}
        try:
            for future in as_completed(futures):
                on_cell(futures[future], future.result())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else None
    except (OSError, ValueError):
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text))
