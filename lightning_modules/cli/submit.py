"""`eva02-at submit`: check a recipe against a SLURM job, then queue it (`--dry-run`: print it)."""

from __future__ import annotations

import shlex
from pathlib import Path

from lightning_modules.cli.parser import CommandParser
from lightning_modules.cli.startup import importing
from lightning_modules.packaged import folder
from lightning_modules.training.closing import close


def _parser() -> CommandParser:
    parser = CommandParser(
        "submit",
        "Check a recipe against a SLURM job, then queue it (`--dry-run`: print it).",
        epilog="Everything else goes to `eva02-at fit`: --config FILE, --run_dir=..., --key=value.",
    )
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus-per-node", type=int, default=8, help="0: one CPU rank a node")
    parser.add_argument("--cpus-per-gpu", type=int, help="default: the recipe's loader workers + 1")
    parser.add_argument("--time", default="24:00:00", help="limit; the run goes on after it")
    scripts = _here_if_possible(folder("slurm"))
    parser.add_argument("--script", default=f"{scripts}/train.sbatch")
    parser.add_argument(
        "--env", default=f"{scripts}/env.sh", help="what a node needs before it starts"
    )
    parser.add_argument("--sbatch", default="", help='more options: "--partition=gpu --account=me"')
    parser.add_argument(
        "--exclude-bad-nodes",
        action="store_true",
        help="after a fault of a node (files not mounted, no GPU) start on others",
    )
    parser.add_argument(
        "--doctor",
        action="store_true",
        help="examine every node first (`eva02-at doctor`); the job ends where it would not run",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and print, queue nothing")
    return parser


def _here_if_possible(path: Path) -> Path:
    """The path as seen from this folder, where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main(argv: list[str]) -> int:
    """Check and queue a job.

    Args:
        argv: Options of the command, and the recipe's words.

    Returns:
        The exit code.

    Raises:
        ValueError: A check failed, or sbatch refused the job.
    """
    try:
        given, words = _parser().parse_known_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    if not any(word.startswith("--config") for word in words):
        raise ValueError("name a recipe: --config NAME (`eva02-at recipes` lists them)")
    with importing():
        from lightning_modules.training import job

    cli = job.parse_for_cluster(words)
    notes = job.check_job(given, cli)
    command = job.sbatch_command(given, cli, words)
    print("\n".join(notes))
    print(shlex.join(command))
    if given.dry_run:
        print(f"\n# {given.script}\n{Path(given.script).read_text()}", end="")
        close(told="the same command without --dry-run")
        return 0
    print(job.queue(given, cli, command))
    run_dir = Path(cli.config.run_dir)
    close("runs", run_dir, told=f"its log is {run_dir}/slurm-JOB.out")
    return 0
