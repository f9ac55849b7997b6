"""Losses and gradients that are not finite: found before they reach a weight, named, skipped."""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lightning_modules.training.run.agreement import Ranks, run_ranks
from lightning_modules.training.run.strategies import ZeroStrategy

log = logging.getLogger(__name__)


class NotFiniteError(RuntimeError):
    """The run was ended because losses or gradients are not finite."""

    on_all_ranks = True  # so that a checkpoint under way can still be completed


class FiniteGuard(Callback):
    """Skip the optimiser step of a batch whose loss or gradient is not finite, or stop.

    The decision is the same on all ranks without a message of its own: DDP's gradients are equal
    after their reduction, and ZeRO reduces its overflow flag. The report names the ranks whose own
    encoder output was already not finite (the loss is not finite on all of them, since it is
    computed over the global batch), with the keys of their batches. A skipped step counts as a
    step: the schedule and the order of the data go on. In fp16 the search for the loss scale
    shows up as skipped steps.

    Args:
        policy: `skip` the step, or `stop` the run at the first one.
        max_skips: Steps that may be skipped in a row before the run is stopped after all.
    """

    def __init__(self, policy: Literal["skip", "stop"] = "skip", max_skips: int = 20) -> None:
        self.policy, self.max_skips = policy, max_skips
        self.skips = 0  # in a row
        self._skipped = False
        self._zero_skips = 0
        self._loss: Tensor | None = None
        self._output_bad: dict[str, Tensor] = {}
        self._ranks: Ranks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the outputs of the module's direct children (the model, the loss)."""
        self._ranks = run_ranks()
        if isinstance(trainer.strategy, ZeroStrategy):
            self._zero_skips = trainer.strategy.skipped_steps
        for name, child in pl_module.named_children():
            child.register_forward_hook(self._watch(name))

    def _watch(self, name: str) -> Any:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            if torch.is_grad_enabled():
                bad = _any_not_finite(output)
                # in a micro-batch of many, or once more within the backward pass
                self._output_bad[name] = bad | self._output_bad.get(name, bad)

        return note

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Forget the last batch."""
        self._output_bad = {}

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Remember the loss for the report."""
        self._loss = loss.detach()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Take the gradients away if they are not finite: the optimiser then changes nothing."""
        if isinstance(trainer.strategy, ZeroStrategy):
            return  # the gradients are partitions by now; ZeRO decides in its own step
        parameters = [p for p in pl_module.parameters() if p.grad is not None]
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        pl_module.log("train/grad_norm", norm)
        if not torch.isfinite(norm):
            self._skipped = True
            for parameter in parameters:
                parameter.grad = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Report a skipped step, and stop where the policy says so."""
        strategy = trainer.strategy
        if isinstance(strategy, ZeroStrategy):
            self._skipped = strategy.skipped_steps > self._zero_skips
            self._zero_skips = strategy.skipped_steps
            norm = strategy.deepspeed_engine.get_global_grad_norm()
            if norm is not None:
                pl_module.log("train/grad_norm", float(norm))
        if not self._skipped:
            self.skips = 0
            return
        self._skipped = False
        self.skips += 1
        told = self._report(trainer, batch)
        if self.policy == "stop" or self.skips > self.max_skips:
            raise NotFiniteError(told)
        if self._ranks.rank == 0:
            log.warning("%s; step skipped (%d in a row)", told, self.skips)

    def _report(self, trainer: Trainer, batch: Any) -> str:
        own = {
            "loss": float(self._loss) if self._loss is not None else float("nan"),
            "outputs": [name for name, bad in self._output_bad.items() if bool(bad)],
            "keys": batch_keys(batch),
        }
        reports = self._ranks.gather(own)
        first = next(iter(self._output_bad), None)  # the model runs before the loss
        culprits = [r for r, report in enumerate(reports) if first in report["outputs"]]
        lines = [
            f"rank {r}: loss {reports[r]['loss']}, batch {reports[r]['keys']}"
            for r in (culprits or range(len(reports)))
        ]
        what = "the model's output" if culprits else "the loss or its gradient"
        return f"step {trainer.global_step - 1}: {what} is not finite on {'; '.join(lines)}"


def batch_keys(batch: Any) -> list[str]:
    """The sample keys of a batch, if it carries any."""
    keys = getattr(batch, "keys", None)
    return list(keys) if isinstance(keys, list) else []


def _any_not_finite(output: Any) -> Tensor:
    tensors = [output] if isinstance(output, Tensor) else list(output or ())
    flags = [
        ~torch.isfinite(t.detach()).all()
        for t in tensors
        if isinstance(t, Tensor) and t.is_floating_point()
    ]
    return torch.stack(flags).any() if flags else torch.zeros((), dtype=torch.bool)
