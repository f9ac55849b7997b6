"""Damaged samples of all ranks together: one rate, over a window, kept from start to start."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.stream.faults import refuse_rate
from lightning_modules.training.run.agreement import Ranks, run_ranks

log = logging.getLogger(__name__)


class DataFaults(Callback):
    """End the run where too large a share of its samples is damaged, as seen by all ranks.

    A rank reads few shards at a time: its own share says little, and at hundreds of ranks some
    rank always meets one missing shard alone. A shard of which nothing can be read is told of once
    in the life of a run.

    Args:
        every_n_steps: Optimiser steps between two looks at all ranks' counts.
        window: Looks over which the share is taken.
    """

    judges_faults = True  # the loaders' own monitors leave it to this one

    def __init__(self, every_n_steps: int = 50, window: int = 20) -> None:
        if every_n_steps < 1 or window < 1:
            raise ValueError(f"every_n_steps is {every_n_steps} and window {window}; at least 1")
        self.every_n_steps, self.window = every_n_steps, window
        self._looks: list[list[int]] = []  # [damaged, seen] of all ranks between two looks
        self._told: list[int] = []  # missing shards
        self._counted = [0, 0]  # of this rank, since the process started
        self._ranks: Ranks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Meet the other ranks."""
        self._ranks = run_ranks()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Look at the counts from time to time."""
        if (batch_idx + 1) % (self.every_n_steps * trainer.accumulate_grad_batches) == 0:
            self._look(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch may be shorter than the time between two looks."""
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        """Raise on all ranks where the share is too large.

        Raises:
            TooManyDamagedSamples: It is.
        """
        data: Any = getattr(trainer, "datamodule", None)
        monitor = getattr(data, "fault_monitor", None)
        if monitor is None:
            return
        now = [monitor.num_damaged + monitor.num_lost, monitor.num_seen]
        new = [max(0, a - b) for a, b in zip(now, self._counted, strict=True)]
        self._counted = now
        reports = self._ranks.gather((new, monitor.missing_shards))
        self._looks.append([sum(counts[k] for counts, _ in reports) for k in (0, 1)])
        del self._looks[: -self.window]
        for shard in sorted({s for _, gone in reports for s in gone} - set(self._told)):
            self._told.append(shard)
            manifest, number = data.corpus.shard(shard)
            if self._ranks.rank == 0:
                log.warning(
                    "shard %s cannot be used: its %d samples are replaced by others",
                    manifest.url(manifest.shards[number].name),
                    manifest.shards[number].num_samples,
                )
        damaged, seen = (sum(look[k] for look in self._looks) for k in (0, 1))
        refuse_rate(damaged, seen, monitor.max_rate, monitor.max_rate, "named in the log above")

    def state_dict(self) -> dict[str, Any]:
        """The window, and what has been told."""
        return {"looks": self._looks, "told": self._told}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the window; what is counted by this process starts anew."""
        self._looks = [list(look) for look in state_dict["looks"]]
        self._told = list(state_dict["told"])
