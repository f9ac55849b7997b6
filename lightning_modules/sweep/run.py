"""A sweep as a whole: plan it, run it here or submit it, watch a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_modules.sweep.array import write_table
from lightning_modules.sweep.cells import CellFailed, SweepFiles, convert_once, run_cells
from lightning_modules.sweep.discovery import find_checkpoints, plan_cells
from lightning_modules.sweep.plan import Cell, Plan
from lightning_modules.sweep.slurm import SlurmOptions, submit
from lightning_modules.training.closing import close


@dataclass(frozen=True)
class Sweep:
    """What to evaluate, and where.

    Attributes:
        files: The sweep's.
        checkpoints: Files, checkpoints' folders, runs, or globs.
        benchmarks: Words of `eva02-at evaluate`, one tuple each.
        read: Words of `eva02-at convert`: how the checkpoints are read.
        slurm: How jobs are submitted, and how often the killed are tried.
        on_cluster: Submit job arrays instead of running here.
        jobs: Cells at a time, here.
        may_be_missing: Checkpoints may be yet to come.
    """

    files: SweepFiles
    checkpoints: Sequence[str]
    benchmarks: Sequence[tuple[str, ...]]
    read: Sequence[str]
    slurm: SlurmOptions
    on_cluster: bool = False
    jobs: int = 1
    may_be_missing: bool = False

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"jobs is {self.jobs}; at least one cell must run at a time")

    def run(self, *, retry_failed: bool) -> bool:
        """Run what has no result, here or as jobs.

        Args:
            retry_failed: Run failed cells again, too.

        Returns:
            False where a cell or checkpoint has no figures (the table names it).
        """
        plan = self.plan()
        waiting = self.files.waiting(plan, retry_failed=retry_failed)
        print(f"{len(plan.cells)} cells, {len(waiting)} to run", flush=True)
        if self.on_cluster and waiting:
            jobs = submit(self.files, waiting, self.slurm)
            table = self.files.directory / "table.md"
            print(f"submitted {', '.join(jobs)}; the last writes {table}")
            close("sweep", "table", self.files.directory, told="what is there so far")
            return True
        for _ in range(self.slurm.rounds):
            self._run_here(plan, waiting)
            waiting = [cell for cell in waiting if (self.files.failure(cell) or {}).get("killed")]
        return write_table(self.files, plan)

    def watch(self, every_s: float, until_step: int | None) -> bool:
        """Evaluate checkpoints as training writes them, until the last one or Ctrl-C.

        Args:
            every_s: Seconds between two looks.
            until_step: End when a checkpoint of this step is evaluated.

        Returns:
            As `run`.
        """
        begun: set[str] = set()
        whole = True
        try:
            while True:
                plan = self.plan()
                waiting = self.files.waiting(plan, retry_failed=False)
                new = [cell for cell in waiting if cell.key not in begun and self._convert(cell)]
                begun |= {cell.key for cell in waiting}
                if new and self.on_cluster:
                    print(f"submitted {', '.join(submit(self.files, new, self.slurm))}", flush=True)
                elif new:
                    self._run_here(plan, new)
                    whole = write_table(self.files, plan)
                if self._reached(until_step, plan):
                    return write_table(self.files, plan) if self.on_cluster else whole
                time.sleep(every_s)
        except KeyboardInterrupt:
            return whole

    def plan(self) -> Plan:
        """Look at the checkpoints and add what is new to the sweep's plan."""
        sources, damaged = find_checkpoints(self.checkpoints, may_be_missing=self.may_be_missing)
        plan = Plan.load(self.files.directory)
        for name, reason in damaged.items():
            if plan.damaged.get(name) != reason:
                print(f"damaged: {name}: {reason}", file=sys.stderr)
        plan.damaged = damaged
        plan.add(plan_cells(sources, self.benchmarks, self.read))
        plan.save(self.files.directory)
        return plan

    def _run_here(self, plan: Plan, cells: Sequence[Cell]) -> None:
        done = 0

        def tell(cell: Cell, succeeded: bool) -> None:
            nonlocal done
            done += 1
            failure = self.files.failure(cell)
            told = "done" if succeeded or failure is None else f"FAILED: {failure['reason']}"
            print(f"[{done}/{len(cells)}] {cell.name}, {cell.benchmark[0]}: {told}", flush=True)

        run_cells(self.files, cells, plan.folder, self.jobs, tell)

    def _convert(self, cell: Cell) -> bool:
        """Convert at once: training removes old checkpoints, and a job may wait for hours."""
        try:
            convert_once(self.files, cell)
        except CellFailed as error:
            self.files.keep_failure(cell, error)
            return False
        return True

    def _reached(self, step: int | None, plan: Plan) -> bool:
        last = [c for c in plan.cells if step is not None and c.step is not None and c.step >= step]
        return bool(last) and all(self.files.result(c) or self.files.failure(c) for c in plan.cells)
