"""Whether this machine has the devices that a run was given or asks for. Light to import."""

from __future__ import annotations

import os
import re

_DEVICES = r"auto|-1|[1-9]\d*|\[\d+(,\d+)*\]|(\d+,)+\d*"
# by one of these the processes of several nodes know of each other
_LAUNCHED = (
    "SLURM_STEP_ID", "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "LSB_JOBID", "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
)  # fmt: skip
_GIVEN = ("SLURM_STEP_GPUS", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE")


class MachineFault(RuntimeError):
    """Something that this machine should have is not there or does not work."""


def check_devices(accelerator: object, devices: object = "auto", nodes: object = 1) -> None:
    """Refuse to train on a CPU what was meant for GPUs, or with processes that nobody starts.

    Args:
        accelerator: The recipe's, as written.
        devices: The recipe's, as written.
        nodes: The recipe's, as written.

    Raises:
        MachineFault: SLURM gave this job GPUs that do not work on this node.
        ValueError: The recipe asks for what is not here.
    """
    import torch

    given = next((f"{name}={os.environ[name]}" for name in _GIVEN if os.environ.get(name)), None)
    asked = accelerator in ("gpu", "cuda")
    if (asked or (accelerator == "auto" and given)) and not torch.cuda.is_available():
        if torch.version.cuda is None:
            raise ValueError(
                f"GPUs are wanted ({given or f'trainer.accelerator={accelerator}'}), but this "
                f"PyTorch ({torch.__version__}) is built without CUDA. Mend: install its CUDA "
                "build, or say --trainer.accelerator=cpu"
            )
        if given:
            raise MachineFault(
                f"SLURM gave this job GPUs ({given}), but PyTorch finds no usable CUDA driver on "
                "this node; what does `nvidia-smi` say here?"
            )
        raise ValueError(
            f"trainer.accelerator is {accelerator}, but PyTorch finds no GPU here. Mend: run it "
            "where there is one, or say --trainer.accelerator=cpu"
        )
    if not re.fullmatch(_DEVICES, str(devices).replace(" ", "")):
        raise ValueError(
            f"trainer.devices is {str(devices)!r}; it must be a number of 1 or more, a list of "
            "devices such as [0, 1], -1 for all GPUs, or auto"
        )
    if str(devices) == "-1" and accelerator == "cpu":
        raise ValueError("trainer.devices is -1 (all GPUs) on the CPU; name a number of processes")
    if str(nodes).isdigit() and int(str(nodes)) > 1 and not any(n in os.environ for n in _LAUNCHED):
        raise ValueError(
            f"the run is to be on {nodes} nodes, but nothing has started this process on each of "
            "them, so that it would wait for the others for ever. Mend: `srun`, `torchrun` or "
            "slurm/train.sbatch (docs/cluster.md), or MASTER_ADDR, MASTER_PORT and NODE_RANK by "
            "hand on each node"
        )
    cores = len(os.sched_getaffinity(0))
    alone = "SLURM_STEP_ID" not in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ
    if alone and accelerator != "gpu" and not torch.cuda.is_available():
        count = int(str(devices)) if str(devices).isdigit() else 1
        if count > 4 * cores:
            raise ValueError(
                f"trainer.devices is {count}, which would start {count} processes on {cores} cores"
                f". Mend: at most {4 * cores} here, or the launcher of a cluster"
            )
