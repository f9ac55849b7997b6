"""`eva02-at sweep`: checkpoints x benchmarks, on a cluster or here, then one table.

The tasks of job arrays start here by the hundred, so nothing here imports torch.
"""

from __future__ import annotations

import shlex
import sys

from lightning_modules.cli.model_options import model_words
from lightning_modules.cli.sweep_options import sweep_parser

_FAILED = 1  # the sweep ended, and its table names what has no figures
_NOT_AGAIN = 2  # the cell's failure is kept: the batch script should not try again


def main(argv: list[str]) -> int:
    """Run a sweep, or one of its parts: `table DIR`, and for job arrays `cell` and `collect`.

    Args:
        argv: Words after `eva02-at sweep`.

    Returns:
        0, or 1 where a cell or checkpoint has no figures (the table names it).

    Raises:
        ValueError: a mistake in the options.
    """
    if argv and argv[0] in ("table", "cell", "collect"):
        return _part(argv)
    options = sweep_parser().parse_args(argv)
    from lightning_modules.sweep.cells import SweepFiles
    from lightning_modules.sweep.plan import parse_benchmarks
    from lightning_modules.sweep.run import Sweep
    from lightning_modules.sweep.slurm import SlurmOptions

    sweep = Sweep(
        SweepFiles(options.output),
        options.checkpoints,
        parse_benchmarks(options.benchmarks, options.options),
        model_words(options),
        SlurmOptions(options.throttle, tuple(shlex.split(options.sbatch)), options.rounds),
        on_cluster=options.slurm,
        jobs=options.jobs,
        may_be_missing=options.watch,
    )
    if options.watch:
        whole = sweep.watch(options.every_s, options.until_step)
    else:
        whole = sweep.run(retry_failed=options.retry_failed)
    return 0 if whole else _FAILED


def _part(words: list[str]) -> int:
    from lightning_modules.sweep.array import collect, run_task, write_table
    from lightning_modules.sweep.cells import SweepFiles
    from lightning_modules.sweep.plan import Plan

    match words:
        case ["table", directory]:
            files = SweepFiles(directory)
            return 0 if write_table(files, Plan.load(files.directory)) else _FAILED
        case ["cell", directory, key]:
            return 0 if run_task(SweepFiles(directory), key) else _NOT_AGAIN
        case ["collect", directory, attempt]:
            collect(SweepFiles(directory), int(attempt))
            return 0
    raise ValueError("usage: eva02-at sweep table DIR | cell DIR KEY | collect DIR ATTEMPT")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
