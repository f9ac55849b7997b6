"""Steps that are not finite, left out on the device without the host's waiting; and clipping."""

from __future__ import annotations

import logging

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.optim import AdamW

from lightning_modules.base import TrainedModule
from lightning_modules.training.monitor import health
from lightning_modules.training.monitor.health import FiniteGuard, NotFiniteError
from lightning_modules.training.optim.optimizers import OptimizerConfig


class Batch:
    def __init__(self, number: int, poisoned: bool) -> None:
        self.x = torch.full((2, 3), float("nan") if poisoned else 1.0 + number)
        self.keys = [f"clip{number}"]


class Module(TrainedModule):
    """A linear map; notes weights and moments after every step."""

    def __init__(self) -> None:
        super().__init__(OptimizerConfig(), None)
        torch.manual_seed(0)
        self.model = nn.Linear(3, 3)
        self.states: list[list[torch.Tensor]] = []
        self.gradients: list[float] = []

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        return self.model(batch.x).square().mean()

    def configure_optimizers(self) -> AdamW:
        return AdamW(self.model.parameters(), lr=0.1, fused=True)

    def optimizer_step(self, *args, **kwargs) -> None:
        super().optimizer_step(*args, **kwargs)
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        self.gradients.append(float(nn.utils.get_total_norm(grads)))

    def on_train_batch_end(self, outputs, batch, batch_idx) -> None:
        optimizer = self.optimizers()
        moments = [t.clone() for s in optimizer.state.values() for t in s.values()]
        self.states.append([*(p.detach().clone() for p in self.parameters()), *moments])


def fit(poisoned: set[int], log_every: int = 4, precision: str = "32", **options) -> Module:
    module = Module()
    guard = options.pop("guard", FiniteGuard())
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        callbacks=[guard],
        log_every_n_steps=log_every,
        limit_val_batches=0,
        precision=precision,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, [Batch(i, i in poisoned) for i in range(10)].__iter__())
    return module


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: PyTorch's fused AdamW, which has the same switch on the CPU."""
    monkeypatch.setattr(health, "skips_by_itself", lambda optimizer, trainer: True)


@pytest.mark.usefixtures("on_device")
def test_the_optimiser_leaves_the_step_out_and_it_is_told_where_the_trainer_logs(caplog) -> None:
    caplog.set_level(logging.WARNING)
    module = fit({2, 5, 6})
    for bad in (2, 5, 6):
        for before, after in zip(module.states[bad - 1], module.states[bad], strict=True):
            assert torch.equal(before, after) and after.isfinite().all()
    assert not torch.equal(module.states[2][0], module.states[3][0])
    told = [r.message for r in caplog.records if "not finite" in r.message]
    assert [(m.split(":")[0], m.split(" (")[-1]) for m in told] == [
        ("step 2", "1 in a row)"),
        ("step 5", "1 in a row)"),
        ("step 6", "2 in a row)"),
    ]
    assert all(f"['clip{n}']" in m for n, m in zip((2, 5, 6), told, strict=True))


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(
    ("guard", "poisoned", "steps"),
    [
        (FiniteGuard("stop"), {1}, 4),
        (FiniteGuard(max_skips=1), {0, 1}, 4),
        (FiniteGuard("stop"), {9}, 10),  # after the last time the trainer logs
    ],
)
def test_the_run_is_stopped_where_the_trainer_logs(guard, poisoned, steps, monkeypatch) -> None:
    seen: list[Module] = []
    monkeypatch.setattr(Module, "on_fit_start", lambda self: seen.append(self), raising=False)
    with pytest.raises(NotFiniteError, match=f"step {max(poisoned)}: the model's output"):
        fit(poisoned, guard=guard)
    assert len(seen[0].states) in (steps - 1, steps)  # the guard is asked before the module


@pytest.mark.usefixtures("on_device")
def test_a_good_run_reads_nothing_off_the_device_between_logs(monkeypatch) -> None:
    reads: list[int] = []
    read = FiniteGuard._read
    monkeypatch.setattr(FiniteGuard, "_read", lambda self: (reads.append(1), read(self))[1])
    fit(set())
    assert len(reads) == 3  # after steps 4 and 8, and at the epoch's end


def test_a_fused_optimisers_gradients_are_clipped_under_autocast() -> None:
    """Lightning refuses it under autocast of any type, and so the recipe of recognition on GPUs."""
    free, clipped = (
        fit(set(), precision="bf16-mixed"),
        fit(set(), precision="bf16-mixed", gradient_clip_val=0.01),
    )
    assert min(free.gradients) > 0.02
    # the norm is divided by itself plus 1e-6
    assert clipped.gradients == pytest.approx([0.01] * 10, rel=1e-3)
