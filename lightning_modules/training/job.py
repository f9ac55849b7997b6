"""A recipe as a SLURM job: whether it could run, whether one does already, and its `sbatch`."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import torch

from datamodules.files import write_atomically
from datamodules.stream.stores import is_remote, local_path
from lightning_modules.checkpoints.hub import is_on_hub
from lightning_modules.packaged import folder
from lightning_modules.training.recipe import RecipeCLI, build_cli
from lightning_modules.training.run.checkpoint_store import CheckpointFolder
from lightning_modules.training.run.owner import FOLDER, LIVING_STATES, RunOwnership, job_state

_TIME = re.compile(r"(\d+-)?\d+(:\d{2}){0,2}")
_BYTES_PER_PARAMETER = 16  # of a checkpoint: weights and AdamW's state
_SUBMITTED = "submitted"  # beside the owner's file: the job that was queued last


def parse_for_cluster(words: list[str]) -> RecipeCLI:
    """Parse a recipe without its weights and whatever this machine may lack.

    Raises:
        ValueError: The recipe is wrong.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with torch.device("meta"):
        # the strategy is the cluster's; one that this machine lacks may not stop the check
        return build_cli([*words, "--trainer.accelerator=cpu", "--trainer.logger=false"])


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
    refuse_second_job(given, Path(cli.config.run_dir))
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
    if weights is not None and not is_on_hub(weights) and not Path(weights).exists():
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
    # a % of the folder's own name is not sbatch's to replace
    command.append(f"--output={str(run_dir).replace('%', '%%')}/slurm-%j.out")
    return [*command, *shlex.split(given.sbatch), given.script, *words]


def refuse_second_job(given: Namespace, run_dir: Path) -> None:
    """Ask the queue whether a job works in the run's folder, or waits to.

    Raises:
        ValueError: One does. To queue behind it needs a dependency.
    """
    if "--dependency" in given.sbatch or "-d" in shlex.split(given.sbatch):
        return
    owner = RunOwnership(run_dir).owner()
    if owner is not None and (owner.lives() or job_state(owner.job) in LIVING_STATES):
        raise ValueError(f"{run_dir} is in use by {owner}. {_behind(owner.job)}")
    try:
        job = (run_dir / FOLDER / _SUBMITTED).read_text().strip()
    except OSError:
        return
    state = job_state(job)
    if state in LIVING_STATES | {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED"}:
        raise ValueError(f"job {job} is queued for {run_dir} already ({state}). {_behind(job)}")


def _behind(job: str) -> str:
    if not job:
        return "Wait for it, end it, or name another --run_dir"
    return f'End it (scancel {job}), or queue behind it: --sbatch="--dependency=afterany:{job}"'


def queue(given: Namespace, cli: RecipeCLI, command: list[str]) -> str:
    """Run the `sbatch` command; its answer.

    Raises:
        ValueError: There is no sbatch, or it refused the job.
    """
    if shutil.which("sbatch") is None:
        raise ValueError("there is no `sbatch` here; submit from a login node of the cluster")
    environment = {"EVA02_AT_ENV": given.env, "EVA02_AT_SLURM": str(folder("slurm"))}
    if given.exclude_bad_nodes:
        environment["EVA02_AT_EXCLUDE"] = "1"
    run_dir = Path(cli.config.run_dir)
    if given.doctor:
        environment["EVA02_AT_DOCTOR"] = str((run_dir / "doctor.json").absolute())
    (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True
    )
    if done.returncode:
        raise ValueError(f"sbatch refused the job: {done.stderr.strip()}")
    answer = done.stdout.strip()
    write_atomically(run_dir / FOLDER / _SUBMITTED, f"{answer.split()[-1]}\n")
    return answer
