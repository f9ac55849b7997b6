"""Exponential moving average of the weights, the same under every strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_modules.collectives import all_gather, on_group_device
from lightning_modules.training.run.agreement import run_ranks
from lightning_modules.training.run.checkpoint_store import FOLDER_KEY, read_safetensors
from lightning_modules.training.run.private import lerp_

EMA_FILE = "ema.safetensors"


class WeightAverage(Callback):
    """Keep ema = decay * ema + (1 - decay) * weights in fp32, and evaluate with it.

    Under ZeRO 3 each rank averages its own slices; in a checkpoint the average is always one file
    of whole tensors (`ema.safetensors`), so that it moves to any number of ranks and is a plain
    inference file as well.

    Args:
        decay: Weight of the past at each optimiser step; 0.999 averages about 1,000 steps.
        evaluate: Validate with the average instead of the weights.
    """

    def __init__(self, decay: float = 0.999, evaluate: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the average's decay is {decay}; it must lie in [0, 1)")
        self.decay, self.evaluate = decay, evaluate
        self._averages: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}  # the weights, while the average is in their place
        self._step = -1
        self._loaded: dict[str, Tensor] = {}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Read the average that lies beside the checkpoint's state.

        Raises:
            OSError: Some rank cannot; its contents are what was written (`resume.verify`).
        """
        path = Path(checkpoint.get(FOLDER_KEY, "")) / EMA_FILE
        with run_ranks().together(f"reading {path}"):
            self._loaded = read_safetensors(path) if path.is_file() else {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the checkpoint's average, or from the weights."""
        self._step = trainer.global_step
        for name, parameter in _trainable(pl_module):
            start = local_tensor(parameter).detach().float().clone()
            if name in self._loaded:
                start.copy_(_local_part(self._loaded[name], parameter))
            self._averages[name] = start
        self._loaded = {}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average after each optimiser step (not after a mere accumulation)."""
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        weights = [local_tensor(p).float() for _, p in _trainable(pl_module)]
        lerp_(list(self._averages.values()), weights, 1 - self.decay)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the average in the weights' place."""
        if self.evaluate and self._averages and not trainer.sanity_checking:
            for name, parameter in _trainable(pl_module):
                tensor = local_tensor(parameter)
                self._weights[name] = tensor.detach().clone()
                tensor.data.copy_(self._averages[name])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights back."""
        self.put_weights_back(pl_module)

    def put_weights_back(self, pl_module: LightningModule) -> None:
        """Undo `on_validation_start`; for a stop in the middle of a validation too."""
        for name, parameter in _trainable(pl_module):
            if name in self._weights:
                local_tensor(parameter).data.copy_(self._weights[name])
        self._weights = {}

    def whole(self, pl_module: LightningModule) -> dict[str, Tensor]:
        """The whole average, gathered from all ranks on each."""
        return {
            name: _whole_tensor(self._averages[name], parameter)
            for name, parameter in _trainable(pl_module)
        }


def save_average(average: dict[str, Tensor], path: Path) -> None:
    """Write `WeightAverage.whole`, on the CPU, to a file."""
    save_file({name: tensor.contiguous() for name, tensor in average.items()}, path)


def local_tensor(parameter: nn.Parameter) -> Tensor:
    """The part of a parameter that this rank stores: ZeRO 3's flat slice, or all of it."""
    return getattr(parameter, "ds_tensor", parameter)


def _trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in module.named_parameters() if p.requires_grad]


def _local_part(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's slice of a whole tensor; ZeRO 3 pads the last slices with zeros."""
    if not hasattr(parameter, "ds_tensor"):
        return whole
    size = parameter.ds_tensor.numel()
    padded = torch.zeros(size * dist.get_world_size(), dtype=whole.dtype)
    padded[: whole.numel()] = whole.flatten()
    return padded[dist.get_rank() * size :][:size]


def _whole_tensor(part: Tensor, parameter: nn.Parameter) -> Tensor:
    """The whole tensor from every rank's slice; the inverse of `_local_part`."""
    if not hasattr(parameter, "ds_tensor"):
        return part
    own = on_group_device(part)
    slices = own.new_empty(own.numel() * dist.get_world_size())
    all_gather(slices, own)
    whole: Any = parameter
    return slices[: whole.ds_numel].view(whole.ds_shape).to(part.device)
