"""Where a run stands, from its finished batches, and how Lightning's loops are put there.

What has been trained is `Progress`: a few integers. Lightning's own counters say different things
after each kind of end (an epoch that `max_steps` or `should_stop` cut short counts as finished,
the labels of the logs lag by one after some of them, with `max_steps` a finished epoch is begun
again), so they are not restored: they are made anew from `Progress`, always in the one form that
Lightning continues exactly, that of a checkpoint taken at the end of a training batch.
The names and meaning of its counters are those of the pinned version.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning.pytorch import Trainer

from lightning_modules.training.optim.optimizers import batches_per_epoch
from lightning_modules.training.run.private import epoch_done, validation_due

PROGRESS_KEY = "eva02_at_progress"


@dataclass(frozen=True)
class Progress:
    """What a run has trained.

    Attributes:
        epoch: The epoch of the last finished batch, from 0.
        batches: Finished batches of that epoch (micro-batches, where gradients accumulate).
        total_batches: Finished batches of all epochs.
        steps: Optimiser steps of all epochs.
        accumulate: Batches an optimiser step.
        epoch_done: No batch of the epoch is left.
        validation_due: A validation after the last step has not been done, or not to its end.
    """

    epoch: int
    batches: int
    total_batches: int
    steps: int
    accumulate: int
    epoch_done: bool
    validation_due: bool = False

    @staticmethod
    def after_batch(trainer: Trainer) -> Progress:
        """Read it off at the end of a training batch, the one moment when the counters are plain.

        Lightning has not counted the batch as completed yet, and the epoch is the one in progress.
        """
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress  # typed without `processed`
        return Progress(
            epoch=trainer.current_epoch,
            batches=batches.current.processed,
            total_batches=batches.total.processed,
            steps=trainer.global_step,
            accumulate=trainer.accumulate_grad_batches,
            epoch_done=epoch_done(trainer),
        )

    @staticmethod
    def of(checkpoint: dict[str, Any]) -> Progress | None:
        """The progress that a checkpoint holds; None for one that holds none."""
        stored = checkpoint.get(PROGRESS_KEY)
        return None if stored is None else Progress(**stored)

    def put_into(self, checkpoint: dict[str, Any]) -> None:
        """Store it as plain data, in the place of Lightning's counters."""
        checkpoint[PROGRESS_KEY] = asdict(self)

    def place(self, trainer: Trainer, loops: dict[str, Any]) -> None:
        """Make the loops' state in a checkpoint say this, as a batch's end would have.

        The batches an epoch has, and those a step takes, are the trainer's, which may be other
        ones than when the checkpoint was written; steps and epochs are the checkpoint's.
        """
        whole = batches_per_epoch(trainer)
        done = self.batches // self.accumulate * trainer.accumulate_grad_batches
        if whole is None:
            done, whole = self.batches, self.batches if self.epoch_done else self.batches + 1
        done = whole if self.epoch_done else min(done, whole)
        total = self.total_batches - self.batches + done
        # a validation begins with all batches completed; otherwise the last one's end is pending
        open_batches = 0 if self.validation_due else 1
        fit = loops["fit_loop"]
        fit["epoch_progress"] = _both(_counts(self.epoch + 1, self.epoch))
        fit["epoch_loop.batch_progress"] = {
            "total": _counts(total, total, total - open_batches),
            "current": _counts(done, done, done - open_batches),
            "is_last_batch": done >= whole,
        }
        # Lightning adds the step whose end is pending, or after the validation that is due
        fit["epoch_loop.state_dict"] = {"_batches_that_stepped": self.steps - 1}
        fit["epoch_loop.scheduler_progress"] = _both({"ready": self.steps, "completed": self.steps})
        fit["epoch_loop.automatic_optimization.optim_progress"] = {
            "optimizer": {
                "step": _both({"ready": self.steps, "completed": self.steps}),
                "zero_grad": _both(
                    {"ready": self.steps, "started": self.steps, "completed": self.steps}
                ),
            }
        }
        begun = _counts(1, 0)  # one batch begun, none finished: the whole validation runs again
        fit["epoch_loop.val_loop.batch_progress"] = {
            **_both(begun if self.validation_due else _counts(0, 0)),
            "is_last_batch": False,
        }


def _counts(started: int, processed: int, completed: int | None = None) -> dict[str, int]:
    completed = processed if completed is None else completed
    return {"ready": started, "started": started, "processed": processed, "completed": completed}


def _both(counts: dict[str, int]) -> dict[str, dict[str, int]]:
    return {"total": dict(counts), "current": dict(counts)}


def settle_validation(trainer: Trainer, progress: Progress) -> None:
    """Before the first batch: forget a due validation that the trainer's schedule no longer has."""
    if progress.validation_due and not validation_due(trainer):
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress
        for scope in (batches.total, batches.current):
            scope.completed = scope.processed - 1
        trainer.fit_loop.reset()


def is_trial(trainer: Trainer) -> bool:
    """A `fast_dev_run` or `overfit_batches`: it leaves nothing and goes on from nothing."""
    return bool(trainer.fast_dev_run) or trainer.overfit_batches > 0  # type: ignore[attr-defined]
