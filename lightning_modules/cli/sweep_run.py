"""A sweep from its options: plan it, run it here or submit it, watch a run."""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lightning_modules.cli.model_options import add_model_options, model_words
from lightning_modules.cli.parser import CommandParser
from lightning_modules.cli.sweep import write_table
from lightning_modules.sweep.cells import CellFailed, SweepFiles, convert_once, run_cells
from lightning_modules.sweep.discovery import find_checkpoints, plan_cells
from lightning_modules.sweep.plan import Cell, Plan, parse_benchmarks
from lightning_modules.sweep.slurm import SlurmOptions, submit


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "sweep",
        "Evaluate checkpoints on benchmarks. What has a result already is not run again; a cell "
        "that fails leaves the others alone and is named in the table. "
        "`eva02-at sweep table DIR` writes the table of what is there.",
    )
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, checkpoints' folders, runs (every complete checkpoint of one), or globs",
    )
    parser.add_argument(
        "--benchmark",
        action="append",
        required=True,
        dest="benchmarks",
        metavar="'NAME OPTIONS'",
        help="a benchmark of `eva02-at evaluate` with its options; may be repeated",
    )
    parser.add_argument(
        "--options",
        action="append",
        default=[],
        metavar="'OPTIONS'",
        help="--options='--flip': add to every benchmark; each set is a column of its own",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the sweep's files"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, here (%(default)s)")
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="run failed cells again (killed ones always are)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="how often cells whose processes or jobs were killed are tried (%(default)s)",
    )
    _add_slurm_options(parser)
    _add_watch_options(parser)
    add_model_options(parser)
    return parser


def _add_slurm_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("on a SLURM cluster")
    group.add_argument("--slurm", action="store_true", help="submit job arrays instead")
    group.add_argument(
        "--sbatch",
        default="",
        metavar="'WORDS'",
        help="for sbatch: '--partition=gpu --gpus=1 --time=02:00:00'",
    )
    group.add_argument("--throttle", type=int, default=16, help="most cells at once (%(default)s)")


def _add_watch_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("beside a training run")
    group.add_argument(
        "--watch", action="store_true", help="go on: evaluate checkpoints as training writes them"
    )
    group.add_argument(
        "--every-s", type=float, default=60.0, help="seconds between two looks (%(default)s)"
    )
    group.add_argument(
        "--until-step", type=int, metavar="N", help="end when a checkpoint of step N is evaluated"
    )


def main(argv: list[str]) -> int:
    """Run a sweep.

    Args:
        argv: Words after `eva02-at sweep`.

    Returns:
        0, or 1 where a cell or checkpoint has no figures (the table names it).

    Raises:
        ValueError: a mistake in the options.
    """
    options = _parser().parse_args(argv)
    if options.jobs < 1:
        raise ValueError(f"jobs is {options.jobs}; at least one cell must run at a time")
    slurm = SlurmOptions(options.throttle, tuple(shlex.split(options.sbatch)), options.rounds)
    files = SweepFiles(options.output)
    if options.watch:
        return _watch(options, files, slurm)
    plan = _plan(options, files)
    waiting = files.waiting(plan, retry_failed=options.retry_failed)
    print(f"{len(plan.cells)} cells, {len(waiting)} to run", flush=True)
    if options.slurm and waiting:
        jobs = submit(files, waiting, slurm)
        print(f"submitted {', '.join(jobs)}; the last writes {files.directory / 'table.md'}")
        return 0
    for _ in range(options.rounds):
        _run_here(options, files, plan, waiting)
        waiting = [cell for cell in waiting if (files.failure(cell) or {}).get("killed")]
    return write_table(files, plan)


def _plan(options: argparse.Namespace, files: SweepFiles) -> Plan:
    """Look at the checkpoints and add what is new to the sweep's plan."""
    benchmarks = parse_benchmarks(options.benchmarks, options.options)
    # beside training: the run may not have begun
    sources, damaged = find_checkpoints(options.checkpoints, may_be_missing=options.watch)
    plan = Plan.load(files.directory)
    for name, reason in damaged.items():
        if plan.damaged.get(name) != reason:
            print(f"damaged: {name}: {reason}", file=sys.stderr)
    plan.damaged = damaged
    plan.add(plan_cells(sources, benchmarks, model_words(options)))
    plan.save(files.directory)
    return plan


def _run_here(
    options: argparse.Namespace, files: SweepFiles, plan: Plan, cells: Sequence[Cell]
) -> None:
    done = 0

    def tell(cell: Cell, succeeded: bool) -> None:
        nonlocal done
        done += 1
        failure = files.failure(cell)
        told = "done" if succeeded or failure is None else f"FAILED: {failure['reason']}"
        print(f"[{done}/{len(cells)}] {cell.name}, {cell.benchmark[0]}: {told}", flush=True)

    run_cells(files, cells, plan.folder, options.jobs, tell)


def _watch(options: argparse.Namespace, files: SweepFiles, slurm: SlurmOptions) -> int:
    """Look for new checkpoints until the last one is evaluated, or the user has seen enough."""
    begun: set[str] = set()
    code = 0
    try:
        while True:
            plan = _plan(options, files)
            waiting = files.waiting(plan, retry_failed=False)
            new = [cell for cell in waiting if cell.key not in begun and _converted(files, cell)]
            begun |= {cell.key for cell in waiting}
            if new and options.slurm:
                print(f"submitted {', '.join(submit(files, new, slurm))}", flush=True)
            elif new:
                _run_here(options, files, plan, new)
                code = write_table(files, plan)
            if _reached(options.until_step, files, plan):
                return write_table(files, plan) if options.slurm else code
            time.sleep(options.every_s)
    except KeyboardInterrupt:
        return code


def _converted(files: SweepFiles, cell: Cell) -> bool:
    """Convert at once: training removes old checkpoints, and a job may wait for hours."""
    try:
        convert_once(files, cell)
    except CellFailed as error:
        files.keep_failure(cell, error)
        return False
    return True


def _reached(step: int | None, files: SweepFiles, plan: Plan) -> bool:
    last = [c for c in plan.cells if step is not None and c.step is not None and c.step >= step]
    return bool(last) and all(files.result(c) or files.failure(c) for c in plan.cells)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
