"""A sweep's parts that jobs run: one cell, the collection of all, and the table.

The tasks of job arrays start here by the hundred, so nothing here imports torch.
"""

from __future__ import annotations

import signal
from typing import Any

from datamodules.files import write_atomically
from lightning_modules.sweep.cells import CellFailed, SweepFiles, run_cell
from lightning_modules.sweep.page import sweep_page
from lightning_modules.sweep.plan import Plan
from lightning_modules.sweep.slurm import SlurmOptions, submit
from lightning_modules.sweep.table import csv_text, markdown, read_table
from lightning_modules.training.closing import close


def write_table(files: SweepFiles, plan: Plan) -> bool:
    """Write the table of what a sweep has, and print it; False where something has no figures.

    Raises:
        ValueError: There is no sweep.
    """
    if not plan.cells:
        raise ValueError(f"{files.directory} holds no sweep")
    table = read_table(files, plan)
    text = markdown(table)
    write_atomically(files.directory / "table.md", text)
    write_atomically(files.directory / "table.csv", csv_text(table))
    page = sweep_page(table, f"Sweep {files.directory.name}")
    write_atomically(files.directory / "table.html", page)
    print(f"\n{text}")
    tables = [files.directory / f"table.{kind}" for kind in ("md", "csv", "html")]
    retry = "; what has no figures is tried again by --retry-failed" if table.problems else ""
    close(told=f"open {tables[-1]} in a browser{retry}", wrote=tables)
    return not table.problems


def run_task(files: SweepFiles, key: str) -> bool:
    """Run the cell of one task of an array; a failure is kept.

    Args:
        files: The sweep's.
        key: The cell's.
    """
    plan = Plan.load(files.directory)

    def near_the_end(*_: Any) -> None:
        told = "the job's time limit came near: give it more with --sbatch '--time=...'"
        raise CellFailed(told, killed=False)

    signal.signal(signal.SIGUSR1, near_the_end)
    return run_cell(files, plan.cell(key), plan.folder)


def collect(files: SweepFiles, attempt: int) -> None:
    """The last job of a sweep: write the table, and submit what was killed once more.

    In this order: the job that collects again may be done before this one is.

    Args:
        files: The sweep's.
        attempt: How often cells have been submitted.
    """
    plan, slurm = Plan.load(files.directory), SlurmOptions.load(files)
    write_table(files, plan)
    waiting = files.waiting(plan, retry_failed=False)
    if waiting and attempt < slurm.rounds:
        print(f"{len(waiting)} cells have no result: submitted again")
        submit(files, waiting, slurm, attempt + 1)
