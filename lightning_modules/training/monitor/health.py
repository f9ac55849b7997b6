"""Losses and gradients that are not finite: found before they reach a weight, named, skipped."""

from __future__ import annotations

import logging
from dataclasses import dataclass
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


@dataclass
class _Step:
    """What a report on a step needs; tensors are read only where there is one."""

    number: int
    loss: Tensor | None
    outputs: dict[str, Tensor]
    keys: list[str]
    skipped: Tensor | None = None


class FiniteGuard(Callback):
    """Skip the optimiser step of a batch whose loss or gradient is not finite, or stop.

    The decision is the same on all ranks without a message of its own: DDP's gradients are equal
    after their reduction, and ZeRO reduces its overflow flag. The report names the ranks whose own
    encoder output was already not finite (the loss is not finite on all of them, since it is
    computed over the global batch), with the keys of their batches. A skipped step counts as a
    step: the schedule and the order of the data go on. In fp16 the search for the loss scale
    shows up as skipped steps.

    On a GPU the host does not wait for the verdict: fused AdamW leaves such a step out by itself,
    on the device, and what happened is read and reported where the trainer logs, up to
    `log_every_n_steps` later. No weight has changed by then.

    Args:
        policy: `skip` the step, or `stop` the run at the first one.
        max_skips: Steps that may be skipped in a row before the run is stopped after all.
    """

    def __init__(self, policy: Literal["skip", "stop"] = "skip", max_skips: int = 20) -> None:
        self.policy, self.max_skips = policy, max_skips
        self.skips = 0  # in a row
        self._skipped = False
        self._zero_skips = 0
        self._global_step = -1
        self._loss: Tensor | None = None
        self._flag: Tensor | None = None  # whether this step was skipped, on the device
        self._unread: list[_Step] = []
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
        bad = ~torch.isfinite(norm)
        if skips_by_itself(optimizer, trainer):
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self._flag = bad
        elif bad:
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
                pl_module.log("train/grad_norm", norm if isinstance(norm, Tensor) else float(norm))
        if trainer.global_step == self._global_step:
            return  # a mere accumulation
        self._global_step = trainer.global_step
        step = _Step(trainer.global_step - 1, self._loss, self._output_bad, batch_keys(batch))
        if self._flag is None:
            skipped, self._skipped = self._skipped, False
            self._count(step, skipped)
            return
        step.skipped, self._flag = self._flag, None
        self._unread.append(step)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._read()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what the epoch has left."""
        self._read()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what was skipped before the weights are judged."""
        self._read()

    def _read(self) -> None:
        """Learn which of the last steps the optimiser left out; the only wait for the device."""
        unread, self._unread = self._unread, []
        if unread:
            flags = torch.stack([step.skipped for step in unread if step.skipped is not None])
            for step, skipped in zip(unread, flags.tolist(), strict=True):
                self._count(step, skipped)

    def _count(self, step: _Step, skipped: bool) -> None:
        """Report a skipped step, and stop where the policy says so."""
        if not skipped:
            self.skips = 0
            return
        self.skips += 1
        told = self._report(step)
        if self.policy == "stop" or self.skips > self.max_skips:
            raise NotFiniteError(told)
        if self._ranks.rank == 0:
            log.warning("%s; step skipped (%d in a row)", told, self.skips)

    def _report(self, step: _Step) -> str:
        own = {
            "loss": float(step.loss) if step.loss is not None else float("nan"),
            "outputs": [name for name, bad in step.outputs.items() if bool(bad)],
            "keys": step.keys,
        }
        reports = self._ranks.gather(own)
        first = next(iter(step.outputs), None)  # the model runs before the loss
        culprits = [r for r, report in enumerate(reports) if first in report["outputs"]]
        lines = [
            f"rank {r}: loss {reports[r]['loss']}, batch {reports[r]['keys']}"
            for r in (culprits or range(len(reports)))
        ]
        what = "the model's output" if culprits else "the loss or its gradient"
        return f"step {step.number}: {what} is not finite on {'; '.join(lines)}"


def skips_by_itself(optimizer: Optimizer, trainer: Trainer) -> bool:
    """True where a step can be left out on the device: PyTorch's fused AdamW, not under fp16.

    fp16's loss scaling tells the optimiser itself. On the CPU there is nothing to wait for.
    """
    on_device = any(p.is_cuda for group in optimizer.param_groups for p in group["params"])
    scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
    return on_device and not scaled and bool(optimizer.defaults.get("fused"))


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
