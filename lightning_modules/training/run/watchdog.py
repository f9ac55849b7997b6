"""The watch over a trainer's ranks: what of Lightning's loops is progress."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.training.run.stall import StallWatch


class StallWatchdog(Callback):
    """End the process with exit code 70 after `stall_s` seconds without progress.

    From the set-up on, in `fit`, `validate`, `test` and `predict`. Progress is a batch begun or
    ended, or a checkpoint read or begun. The report names the ranks with the least progress, what
    each was doing, and for how long.

    Args:
        stall_s: Seconds without progress that count as a stall; more than loading, or the longest
            single step, checkpoint or metric computation of the run, takes.
    """

    def __init__(self, stall_s: float = 900.0) -> None:
        self.stall_s = stall_s
        self._watch = StallWatch(stall_s)
        self._mark = self._watch.mark

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start watching."""
        self._watch.start("loading")

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint was found, checked and read."""
        self._mark("restoring the checkpoint")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Loading is done."""
        self._mark("waiting for the first batch")

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A batch arrived."""
        self._mark(f"in the training step {trainer.global_step}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is done; what follows is data, logging, a checkpoint or a validation."""
        self._mark(f"after the step {trainer.global_step - 1}: data or checkpoint")

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint begins; the one before it is on the disk."""
        self._mark(f"saving step {trainer.global_step}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step is done and validated."""
        self._mark("saving the last step")

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A validation batch arrived."""
        self._mark(f"in validation batch {batch_idx}")

    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A test batch arrived."""
        self._mark(f"in test batch {batch_idx}")

    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A batch to predict arrived."""
        self._mark(f"in batch {batch_idx} to predict")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last validation batch is done."""
        self._mark("computing the validation metrics")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last test batch is done."""
        self._mark("computing the test metrics")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching."""
        self._watch.stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop watching; the other ranks need not wait for this one."""
        self._watch.stop(exception)
