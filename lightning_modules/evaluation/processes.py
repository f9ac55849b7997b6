"""Where an evaluation runs: its processes, their device and its precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from lightning.fabric import Fabric

# What `--dtype` names: the type of the weights, and of autocast as `precision: bf16-mixed` has it.
PRECISIONS: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "bf16-mixed": (torch.float32, torch.bfloat16),
}


@dataclass(frozen=True)
class Process:
    """This process among those of an evaluation.

    Attributes:
        device: Its device.
        is_first: Whether it speaks for all.
    """

    device: torch.device
    is_first: bool


@dataclass(frozen=True)
class Machines:
    """Where and how to compute.

    Attributes:
        accelerator: `auto`, `cpu` or `cuda`.
        devices: Processes on each node; under torchrun or srun what they were told.
        nodes: Nodes.
        dtype: A name of `PRECISIONS`.
        stall_s: Seconds without a batch, or for the metrics, after which a process ends itself.
    """

    accelerator: str = "auto"
    devices: int = 1
    nodes: int = 1
    dtype: str = "float32"
    stall_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.devices < 1 or self.nodes < 1:
            raise ValueError(f"{self.devices} devices on {self.nodes} nodes; at least 1 of each")
        if self.accelerator == "cuda" and not torch.cuda.is_available():
            raise ValueError("--accelerator cuda, but PyTorch finds no CUDA device here")

    @property
    def num_processes(self) -> int:
        """All of them."""
        return self.devices * self.nodes

    @property
    def weights(self) -> torch.dtype:
        """The type of the weights."""
        return PRECISIONS[self.dtype][0]

    @contextlib.contextmanager
    def processes(self) -> Iterator[Process]:
        """Start the other processes, if any, and autocast where that is wanted."""
        if self.num_processes == 1:
            use_cuda = self.accelerator == "cuda" or (
                self.accelerator == "auto" and torch.cuda.is_available()
            )
            with self._autocast(torch.device("cuda" if use_cuda else "cpu")) as device:
                yield Process(device, True)
            return
        fabric = Fabric(
            accelerator=self.accelerator,
            devices=self.devices,
            num_nodes=self.nodes,
            strategy="ddp",
        )
        fabric.launch()
        try:
            with self._autocast(fabric.device) as device:
                yield Process(device, fabric.is_global_zero)
        finally:
            torch.distributed.destroy_process_group()

    @contextlib.contextmanager
    def _autocast(self, device: torch.device) -> Iterator[torch.device]:
        compute = PRECISIONS[self.dtype][1]
        with torch.autocast(device.type, compute, enabled=compute is not None):
            yield device
