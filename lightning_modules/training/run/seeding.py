"""Random numbers of a training step as a function of (seed, batch, rank), not of history."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class StepSeed(Callback):
    """Seed torch before every training batch, so that a resumed run draws the same numbers.

    DeepSpeed keeps no generator state in its checkpoints and under ZeRO <= 2 could keep only
    rank 0's; a generator per step needs none. The data path seeds its own by sample.

    Args:
        seed: The run's seed; by default the one of `seed_everything`. A resumed run keeps the
            seed of its checkpoint.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the seed of `seed_everything`, unless there is one already."""
        if self.seed is None:
            self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Seed for this batch and rank."""
        assert self.seed is not None
        batches = trainer.fit_loop.epoch_loop.total_batch_idx
        torch.manual_seed(step_seed(self.seed, batches, trainer.global_rank))

    def state_dict(self) -> dict[str, Any]:
        """The seed alone."""
        return {"seed": self.seed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the checkpoint's seed."""
        self.seed = state_dict["seed"]


def step_seed(seed: int, batch: int, rank: int) -> int:
    """Return 63 well-mixed bits of (seed, batch, rank): near inputs give unrelated streams."""
    digest = hashlib.blake2b(f"{seed}/{batch}/{rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
