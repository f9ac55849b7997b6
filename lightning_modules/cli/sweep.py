"""`eva02-at sweep`: checkpoints x benchmarks, on a cluster or here, then one table.

The tasks of job arrays start here by the hundred, so nothing here imports torch.
"""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Callable
from typing import Any

from datamodules.files import write_atomically
from lightning_modules.sweep.cells import CellFailed, SweepFiles, run_cell
from lightning_modules.sweep.page import sweep_page
from lightning_modules.sweep.plan import Plan
from lightning_modules.sweep.slurm import SlurmOptions, submit
from lightning_modules.sweep.table import csv_text, markdown, read_table

_FAILED = 1  # the sweep ended, and its table names what has no figures


def main(argv: list[str]) -> int:
    """Run a sweep, or one of its parts: `table DIR`, and for job arrays `cell` and `collect`.

    Args:
        argv: Words after `eva02-at sweep`.
    """
    match argv:
        case ["table", directory]:
            return _table(directory)
        case ["cell", directory, key]:
            return _cell(directory, key)
        case ["collect", directory, attempt]:
            return _collect(directory, int(attempt))
    run: Callable[[list[str]], int] = importlib.import_module(f"{__package__}.sweep_run").main
    return run(argv)


def _table(directory: str) -> int:
    files = SweepFiles(directory)
    plan = Plan.load(files.directory)
    if not plan.cells:
        raise ValueError(f"{directory} holds no sweep")
    return write_table(files, plan)


def write_table(files: SweepFiles, plan: Plan) -> int:
    """Write the table of what a sweep has, and print it; 0 where nothing is missing."""
    table = read_table(files, plan)
    text = markdown(table)
    write_atomically(files.directory / "table.md", text)
    write_atomically(files.directory / "table.csv", csv_text(table))
    page = sweep_page(
        table, f"Sweep of {len(table.rows)} checkpoints in {files.directory.resolve()}"
    )
    write_atomically(files.directory / "table.html", page)
    print(f"\n{text}\ntable in {files.directory}/table.md, .csv and .html")
    return _FAILED if table.problems else 0


def _cell(directory: str, key: str) -> int:
    """One task of an array. A failure is kept, and 2 tells the batch script not to try again."""
    files = SweepFiles(directory)
    plan = Plan.load(files.directory)

    def near_the_end(*_: Any) -> None:
        told = "the job's time limit came near: give it more with --sbatch '--time=...'"
        raise CellFailed(told, killed=False)

    signal.signal(signal.SIGUSR1, near_the_end)
    return 0 if run_cell(files, plan.cell(key), plan.folder) else 2


def _collect(directory: str, attempt: int) -> int:
    """The last job of a sweep: submit what was killed once more, and write the table."""
    files = SweepFiles(directory)
    plan, slurm = Plan.load(files.directory), SlurmOptions.load(files)
    waiting = files.waiting(plan, retry_failed=False)
    if waiting and attempt < slurm.rounds:
        print(f"{len(waiting)} cells have no result: submitted again")
        submit(files, waiting, slurm, attempt + 1)
    write_table(files, plan)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
