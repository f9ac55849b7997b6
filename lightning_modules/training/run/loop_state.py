"""Lightning's loop counters at the moment of a checkpoint, private to the pinned version.

Lightning restores a checkpoint taken at the end of a batch by going on with the next batch. Where
a validation was due after that batch, or was running, it would be skipped; here the saved counters
are made to say "one validation batch begun, none finished", and Lightning then runs the whole
validation again before it goes on (its RESTARTED_MID_EVALUATION).
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer


def gradients_pending(trainer: Trainer) -> bool:
    """True between the micro-batches of one optimiser step: no checkpoint can hold that state."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def validation_due(trainer: Trainer) -> bool:
    """At the end of a training batch: whether Lightning is about to validate."""
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    return fetcher is not None and loop.epoch_loop._should_check_val_fx(fetcher)


def mark_validation_pending(checkpoint: dict[str, Any]) -> None:
    """Change the loops' state in a checkpoint so that a resumed run validates first."""
    fit = checkpoint["loops"]["fit_loop"]
    batches = fit["epoch_loop.batch_progress"]
    for scope in ("total", "current"):
        batches[scope]["completed"] = batches[scope]["processed"]
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    fit["epoch_loop.val_loop.batch_progress"] = {
        "total": dict(begun),
        "current": dict(begun),
        "is_last_batch": False,
    }
