"""A user's own loss and data: the least that each must have."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from datamodules.batch import ClipBatch
from lightning_modules.models import ModelConfig
from lightning_modules.pretrain import PretrainModule
from lightning_modules.training.optim.optimizers import OptimizerConfig


class Least(nn.Module):
    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        self.got = {}
        return (video - text).square().mean()


class Scaled(Least):
    def forward(self, video: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
        loss = super().forward(video, text)
        self.got = {"logit_scale": logit_scale}
        return loss


class Everything(Least):
    def forward(self, video: Tensor, text: Tensor, **rest: object) -> Tensor:
        loss = super().forward(video, text)
        self.got = rest
        return loss


class Data(LightningDataModule):
    batches_per_epoch = 1

    def __init__(self, validates: bool) -> None:
        super().__init__()
        self.validates = validates

    def train_dataloader(self) -> DataLoader:
        index, none = torch.arange(2), torch.full((2, 1), -1)
        batch = ClipBatch(
            video=torch.zeros(2, 3, 4, 64, 64, dtype=torch.uint8),
            tokens=torch.ones(2, 16, dtype=torch.int64),
            **dict.fromkeys(("clip_index", "text_index", "sample_index"), index),
            mask=torch.ones(2, dtype=torch.bool),
            **dict.fromkeys(("verb_classes", "noun_classes"), none),
            **dict.fromkeys(("text_verb_classes", "text_noun_classes"), none),
            keys=["a", "b"],
        )
        return DataLoader([batch], batch_size=None)

    def val_dataloader(self) -> DataLoader | list:
        return self.train_dataloader() if self.validates else []


def fit(loss: nn.Module, validates: bool = False) -> Trainer:
    model = ModelConfig(preset="eva02_at_tiny")
    module = PretrainModule(model, loss, OptimizerConfig(lr=1e-3, warmup_epochs=0))
    trainer = Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, Data(validates))
    return trainer


@pytest.mark.parametrize(
    ("loss", "named"),
    [(Least(), set()), (Scaled(), {"logit_scale"}), (Everything(), {"logit_scale", "even"})],
)
def test_a_loss_gets_what_it_names(loss: Least, named: set[str]) -> None:
    assert torch.isfinite(fit(loss).callback_metrics["train/loss"])
    assert set(loss.got) == named


def test_data_that_cannot_be_measured_is_named() -> None:
    with pytest.raises(ValueError, match="Data gives batches to evaluate but no `eval_split`"):
        fit(Least(), validates=True)
