"""`eva02-at submit`: check a recipe against a SLURM job, then queue it (`--dry-run`: print it)."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
from argparse import ArgumentParser, Namespace
from pathlib import Path

import torch

from datamodules.stream.stores import is_remote, local_path
from lightning_modules.packaged import folder
from lightning_modules.training.recipe import RecipeCLI, build_cli
from lightning_modules.training.run.checkpoint_store import CheckpointFolder

_TIME = re.compile(r"(\d+-)?\d+(:\d{2}){0,2}")
_BYTES_PER_PARAMETER = 16  # of a checkpoint: weights and AdamW's state


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="eva02-at submit",
        description=__doc__,
        epilog="Everything else goes to `eva02-at fit`: --config FILE, --run_dir=..., --key=value.",
        allow_abbrev=False,
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
        "--doctor",
        action="store_true",
        help="examine every node first (`eva02-at doctor`); the job ends where it would not run",
    )
    parser.add_argument("--dry-run", action="store_true", help="check and print, queue nothing")
    return parser


def _here_if_possible(path: Path) -> Path:
    """The path as seen from this folder, where it lies below it."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def check_job(given: Namespace, cli: RecipeCLI) -> list[str]:
    """Check a job against its recipe, and return what is worth knowing about it.

    Raises:
        ValueError: The job could not run, or not for long: says what to change.
    """
    if given.nodes < 1 or given.gpus_per_node < 0:
        raise ValueError("--nodes must be at least 1, and --gpus-per-node at least 0")
    if not _TIME.fullmatch(given.time):
        raise ValueError(f"--time {given.time!r} is not MINUTES, HH:MM:SS or D-HH:MM:SS")
    for file in (given.script, given.env):
        if not Path(file).is_file():
            raise ValueError(
                f"{file} does not exist; `eva02-at recipes copy slurm/env.sh` makes one"
            )
    ranks = given.nodes * max(1, given.gpus_per_node)
    parts = ranks * cli.trainer.accumulate_grad_batches
    batch = cli.datamodule.global_batch_size
    if batch % parts:
        raise ValueError(
            f"the global batch of {batch} does not divide over {ranks} ranks x "
            f"{cli.trainer.accumulate_grad_batches} accumulated; change the nodes, the GPUs or "
            "data.global_batch_size"
        )
    notes = [f"{ranks} ranks, {batch // parts} pairs each"]
    notes.append(_check_files(cli))
    notes.append(_check_disk(cli))
    return notes


def _check_files(cli: RecipeCLI) -> str:
    """Manifests and initial weights; a run that goes on needs no weights."""
    data = cli.datamodule
    splits = [split.manifest for split in (data.val_split, data.test_split) if split is not None]
    for manifest in (*data.train_manifests, *splits):
        if not is_remote(manifest) and not local_path(manifest).exists():
            raise ValueError(f"{manifest} does not exist; make it with `eva02-at shards build`")
    run_dir = Path(cli.config.run_dir)
    names = CheckpointFolder(cli.config.checkpoints.dirpath or run_dir / "checkpoints").candidates()
    if names:
        return f"goes on from {run_dir}, {names[0]}"
    weights = getattr(cli.model, "init_checkpoint", None)
    if weights is not None and not Path(weights).exists():
        raise ValueError(f"model.init_checkpoint {weights} does not exist")
    return f"starts in {run_dir}" + (f", from {weights}" if weights else "")


def _check_disk(cli: RecipeCLI) -> str:
    """Room for the checkpoints that are kept and one being written."""
    keep_last, keep_best = cli.config.checkpoints.keep_last, cli.config.checkpoints.keep_best
    parameters = sum(p.numel() for p in cli.model.parameters())
    one = _BYTES_PER_PARAMETER * parameters
    needed = one * (keep_last + keep_best + 1)
    folder = Path(cli.config.run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder} cannot be written to; name another --run_dir")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 2**30:.1f} GiB free; {keep_last} + {keep_best} checkpoints and "
            f"one being written take {needed / 2**30:.1f} GiB. Make room, name another --run_dir, "
            "or lower checkpoints.keep_last"
        )
    return f"a checkpoint takes about {one / 2**30:.1f} GiB; {free / 2**30:.0f} GiB are free"


def sbatch_command(given: Namespace, cli: RecipeCLI, words: list[str]) -> list[str]:
    """Return the `sbatch` command of a job."""
    run_dir = Path(cli.config.run_dir)
    command = ["sbatch", f"--job-name={run_dir.name}", f"--nodes={given.nodes}"]
    command.append(f"--ntasks-per-node={max(1, given.gpus_per_node)}")
    if given.gpus_per_node:
        command.append(f"--gpus-per-node={given.gpus_per_node}")
    cores = given.cpus_per_gpu or cli.datamodule.num_workers + 1
    command += [f"--cpus-per-task={cores}", f"--time={given.time}"]
    command.append(f"--output={run_dir}/slurm-%j.out")
    return [*command, *shlex.split(given.sbatch), given.script, *words]


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
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with torch.device("meta"):
        # the strategy is the cluster's; one that this machine lacks may not stop the check
        cli = build_cli([*words, "--trainer.accelerator=cpu", "--trainer.logger=false"])
    notes = check_job(given, cli)
    command = sbatch_command(given, cli, words)
    print("\n".join(notes))
    print(shlex.join(command))
    if given.dry_run:
        print(f"\n# {given.script}\n{Path(given.script).read_text()}", end="")
        return 0
    if shutil.which("sbatch") is None:
        raise ValueError("there is no `sbatch` here; submit from a login node of the cluster")
    Path(cli.config.run_dir).mkdir(parents=True, exist_ok=True)
    environment = {"EVA02_AT_ENV": given.env, "EVA02_AT_SLURM": str(folder("slurm"))}
    if given.doctor:
        environment["EVA02_AT_DOCTOR"] = str(Path(cli.config.run_dir, "doctor.json").absolute())
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"sbatch refused the job: {done.stderr.strip()}")
    print(done.stdout.strip())
    return 0
