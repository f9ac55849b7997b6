"""Optimisers of the recipes: parameter groups, AdamW, LAMB or Muon, and a schedule per step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lightning_modules.training.optim.lamb import Lamb
from lightning_modules.training.optim.muon import Muon
from lightning_modules.training.optim.schedules import LearningRateFactor


@dataclass
class OptimizerConfig:
    """Optimiser and learning-rate schedule of a recipe. Gradient clipping is the Trainer's.

    Attributes:
        name: `adamw` (fused), `lamb`, or `muon` for the matrices of the blocks with AdamW for all
            else (not under ZeRO).
        lr: Peak learning rate.
        matrix_lr: Peak learning rate of what Muon steps; `lr` by default. Warm-up and schedule have
            `lr`'s proportions.
        weight_decay: Decoupled decay of the matrices; biases, norms, positions and the
            temperature get none.
        betas: Decay of the moments.
        eps: Added to the root of the second moment.
        layer_decay: Factor on the learning rate for each layer down from the top; 1 for none.
        schedule: `constant`, or `cosine` from the peak to `end_lr` at the last step.
        warmup_epochs: Length of the linear rise from `start_lr`, in epochs (fractions allowed).
        warmup_steps: The same in optimiser steps; give one of the two.
        start_lr: Learning rate of the first step of the rise.
        end_lr: Learning rate at the end of the cosine.
    """

    name: Literal["adamw", "lamb", "muon"] = "adamw"
    lr: float = 3e-5
    matrix_lr: float | None = None
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    layer_decay: float = 1.0
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_epochs: float = 0.0
    warmup_steps: int = 0
    start_lr: float = 0.0
    end_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optimizer.lr is {self.lr}; it must be above 0")
        if self.matrix_lr is not None and (self.matrix_lr <= 0 or self.name != "muon"):
            raise ValueError(
                f"optimizer.matrix_lr is {self.matrix_lr} with {self.name}; it must be above 0, "
                "and null for all but muon"
            )
        if self.warmup_epochs and self.warmup_steps:
            raise ValueError(
                f"optimizer.warmup_epochs is {self.warmup_epochs} and warmup_steps is "
                f"{self.warmup_steps}; give one of the two"
            )
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"optimizer.layer_decay is {self.layer_decay}; it must lie in (0, 1]")


def parameter_groups(
    model: nn.Module,
    config: OptimizerConfig,
    *,
    one_each: bool = False,
    scalars: Sequence[nn.Parameter] = (),
) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups of equal weight decay and learning rate.

    No decay for parameters with at most one axis and for the names in `model.no_weight_decay()`.
    With layer decay, `model.layer_id(name)` counts from 0 (embeddings) upwards; the highest layer
    keeps the full rate.

    Args:
        model: The bare model (a DualEncoder, say), whose methods are asked if it has them.
        config: The recipe.
        one_each: One group for each parameter, for optimisers that work per parameter under ZeRO.
        scalars: Parameters beside the model's, a loss's own: the full rate, and no decay.

    Raises:
        ValueError: Nothing is trainable, or layer decay is asked of a model without `layer_id`.
    """
    exempt = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()  # type: ignore[operator]
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("no parameter is trainable; unfreeze at least one")
    layers = _layers(model, [name for name, _ in trainable], config.layer_decay)
    groups: dict[Any, dict[str, Any]] = {}
    for name, parameter in trainable:
        decay = 0.0 if parameter.ndim <= 1 or name in exempt else config.weight_decay
        scale = config.layer_decay ** (max(layers.values()) - layers[name])
        key = name if one_each else (decay, scale)
        group = groups.setdefault(
            key, {"params": [], "weight_decay": decay, "lr": config.lr * scale}
        )
        group["params"].append(parameter)
    for place, parameter in enumerate(scalars):
        group = groups.setdefault(
            place if one_each else (0.0, 1.0), {"params": [], "weight_decay": 0.0, "lr": config.lr}
        )
        group["params"].append(parameter)
    return list(groups.values())


def _layers(model: nn.Module, names: list[str], layer_decay: float) -> dict[str, int]:
    if layer_decay == 1.0:
        return dict.fromkeys(names, 0)
    if not hasattr(model, "layer_id"):
        raise ValueError(
            f"optimizer.layer_decay is {layer_decay}, but {type(model).__name__} has no "
            "`layer_id(name)` that says which layer a parameter is in; set layer_decay to 1"
        )
    layer_id = cast(Callable[[str], int], model.layer_id)
    return {name: layer_id(name) for name in names}


def build_optimizers(
    model: nn.Module,
    config: OptimizerConfig,
    total_steps: int,
    steps_per_epoch: int,
    *,
    sharded: bool = False,
    scalars: Sequence[nn.Parameter] = (),
) -> dict[str, Any]:
    """Build what `LightningModule.configure_optimizers` returns.

    Args:
        model: The bare model.
        config: The recipe.
        total_steps: Optimiser steps of the whole run.
        steps_per_epoch: Optimiser steps of one epoch, which turn `warmup_epochs` into steps.
        sharded: True under ZeRO, where each rank's optimiser holds slices of the parameters.
        scalars: As in `parameter_groups`.

    Returns:
        `{"optimizer", "lr_scheduler"}`, the scheduler stepping once per optimiser step.
    """
    optimizer: Optimizer
    lamb = config.name == "lamb"
    groups = parameter_groups(model, config, one_each=lamb and sharded, scalars=scalars)
    options: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    if lamb:
        optimizer = Lamb(groups, **options, sharded=sharded)
    elif config.name == "muon":
        matrices, others = _matrices_apart(model, groups, sharded)
        for group in matrices:
            group["lr"] *= (config.matrix_lr or config.lr) / config.lr
        optimizer = Muon(matrices, others, **options)
    else:
        optimizer = AdamW(groups, **options, fused=True)
    factor = LearningRateFactor(
        schedule=config.schedule,
        total_steps=total_steps,
        warmup_steps=config.warmup_steps or round(config.warmup_epochs * steps_per_epoch),
        start_factor=config.start_lr / config.lr,
        end_factor=config.end_lr / config.lr,
    )
    scheduler = {"scheduler": LambdaLR(optimizer, factor), "interval": "step", "name": "lr"}
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


def _matrices_apart(
    model: nn.Module, groups: list[dict[str, Any]], sharded: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The groups of the blocks' matrices, and of all else: embeddings, heads, vectors, scalars."""
    if sharded:
        raise ValueError(
            "optimizer.name is muon, which steps whole matrices; under ZeRO each rank has slices "
            "of them. Use adamw or lamb, or another strategy (configs/strategy/ddp.yaml)"
        )
    inside = {
        id(p) for n, p in model.named_parameters() if p.ndim == 2 and "blocks" in n.split(".")
    }
    matrices, others = (
        [
            {**group, "params": params}
            for group in groups
            if (params := [p for p in group["params"] if (id(p) in inside) == wanted])
        ]
        for wanted in (True, False)
    )
    if not matrices:
        raise ValueError(
            "optimizer.name is muon, but no matrix of the model's blocks is trainable: unfreeze "
            "some or use adamw"
        )
    return matrices, others


def configure_optimizers(
    module: LightningModule,
    model: nn.Module,
    config: OptimizerConfig,
    scalars: Sequence[nn.Parameter] = (),
) -> dict[str, Any]:
    """`build_optimizers` for a module attached to a Trainer, the step counts taken from there.

    The length of an epoch comes from the datamodule's own arithmetic (`batches_per_epoch`):
    `Trainer.estimated_stepping_batches` would build the loaders before the checkpoint is restored
    and so break an exact resume (Lightning issue 20550).
    """
    trainer = module.trainer
    if trainer.fast_dev_run:  # type: ignore[attr-defined]  # a few batches have no room for a schedule
        config = replace(config, schedule="constant", warmup_epochs=0.0, warmup_steps=0)
    sharded = isinstance(trainer.strategy, DeepSpeedStrategy)
    if not sharded:  # DeepSpeed steps float32 copies of its own
        refuse_low_precision(model, config.lr)
    per_epoch = optimizer_steps_per_epoch(trainer)
    total = total_optimizer_steps(trainer, per_epoch)
    return build_optimizers(model, config, total, per_epoch, sharded=sharded, scalars=scalars)


def refuse_low_precision(model: nn.Module, lr: float) -> None:
    """Refuse to step weights of 16 bits, where most steps are rounded away.

    Raises:
        ValueError: A trainable parameter has 16 bits.
    """
    low = next((p for p in model.parameters() if p.requires_grad and p.element_size() < 4), None)
    if low is not None:
        name, eps = str(low.dtype).removeprefix("torch."), torch.finfo(low.dtype).eps
        raise ValueError(
            f"the weights are {name} (trainer.precision bf16-true or 16-true), whose neighbours of "
            f"0.02 are {0.02 * eps:.0e} apart: steps of learning rate {lr:.0e} would mostly be "
            "rounded away. Use trainer.precision bf16-mixed, or a ZeRO strategy "
            "(configs/strategy), which keeps float32 weights to step"
        )


def batches_per_epoch(trainer: Trainer) -> int | None:
    """Batches an epoch, by the datamodule's count and the Trainer's limit; None if none says."""
    batches = getattr(getattr(trainer, "datamodule", None), "batches_per_epoch", None)
    limit = trainer.limit_train_batches
    if isinstance(limit, int):
        return limit if batches is None else min(batches, limit)
    return None if batches is None else int(batches * limit)


def optimizer_steps_per_epoch(trainer: Trainer) -> int:
    """Optimiser steps an epoch, by the datamodule's count, the Trainer's limit and accumulation.

    Raises:
        ValueError: The datamodule does not say how many batches an epoch has, or accumulation
            does not divide them under DeepSpeed.
    """
    batches = batches_per_epoch(trainer)
    if batches is None:
        raise ValueError(
            f"{type(getattr(trainer, 'datamodule', None)).__name__} does not say how many batches "
            "an epoch has; give the datamodule a `batches_per_epoch`, or set "
            "trainer.limit_train_batches to a whole number"
        )
    if batches % trainer.accumulate_grad_batches and isinstance(
        trainer.strategy, DeepSpeedStrategy
    ):
        raise ValueError(
            f"an epoch has {batches} batches, which trainer.accumulate_grad_batches "
            f"{trainer.accumulate_grad_batches} does not divide; DeepSpeed would carry the rest "
            "over into the next epoch. Choose one that divides it, or model.micro_batch instead"
        )
    return math.ceil(batches / trainer.accumulate_grad_batches)


def total_optimizer_steps(trainer: Trainer, per_epoch: int) -> int:
    """Optimiser steps until the Trainer's `max_steps` or `max_epochs`, whichever comes first.

    A run without end counts as one step: only the constant schedule makes sense there, and the
    cosine refuses it.
    """
    ends = []
    if trainer.max_steps > 0:
        ends.append(trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        ends.append(trainer.max_epochs * per_epoch)
    return min(ends, default=1)
