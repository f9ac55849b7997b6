"""A thread on each rank that ends a run which has stopped moving, and says which ranks lag.

A rank that dies or hangs leaves the others waiting in a collective: under DeepSpeed's subgroups
without any time limit. The threads share their ranks' progress through torch's key-value store.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.training.run.private import default_store

EXIT_STALLED = 70


class StallWatchdog(Callback):
    """End the process with exit code 70 after `stall_s` seconds without progress.

    Progress is a batch (training or validation) begun or ended, or a checkpoint written. The
    report names the ranks with the least progress, what each was doing, and for how long.

    Args:
        stall_s: Seconds without progress that count as a stall; more than the longest single
            step, checkpoint or metric computation of the run.
    """

    def __init__(self, stall_s: float = 900.0) -> None:
        if stall_s <= 0:
            raise ValueError(f"stall_s is {stall_s}; it must be above 0")
        self.stall_s = stall_s
        self._count, self._doing, self._since = 0, "starting", time.monotonic()
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    # -- progress -------------------------------------------------------------------------------
    def _mark(self, doing: str) -> None:
        self._count += 1
        self._doing, self._since = doing, time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start watching; loading and compiling before the first step is not watched."""
        self._mark("waiting for the first batch")
        self._done.clear()
        self._thread = threading.Thread(
            target=self._watch, args=(_Board(trainer),), name="stall-watchdog", daemon=True
        )
        self._thread.start()

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

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last validation batch is done."""
        self._mark("computing the validation metrics")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching."""
        self._done.set()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching, also after an exception."""
        self._done.set()

    # -- the thread -----------------------------------------------------------------------------
    def _watch(self, board: _Board) -> None:
        pause_s = min(5.0, self.stall_s / 5)
        while True:
            still_s = time.monotonic() - self._since
            board.publish(self._count, self._doing, still_s)
            if self._done.wait(pause_s):
                return
            if still_s > self.stall_s:
                # the ranks stall within moments of each other; let all of them publish
                time.sleep(pause_s)
                self._end(board, time.monotonic() - self._since)

    def _end(self, board: _Board, still_s: float) -> None:
        if still_s < self.stall_s or self._done.is_set():
            return
        print(f"eva02-at: {board.report(still_s)}", file=sys.stderr, flush=True)
        os._exit(EXIT_STALLED)  # the main thread is stuck in a collective and cannot be asked


class _Board:
    """Every rank's progress, in the process group's key-value store."""

    def __init__(self, trainer: Trainer) -> None:
        self.rank, self.world = trainer.global_rank, trainer.world_size
        self.store: Any = None
        if dist.is_available() and dist.is_initialized():
            # a connection of its own: the main thread may hold the other one for ever
            self.store = default_store().clone()

    def _key(self, rank: int) -> str:
        return f"eva02_at/progress/{rank}"

    def publish(self, count: int, doing: str, still_s: float) -> None:
        """Tell the others; a store that is gone is found out in the report."""
        self.own = {"count": count, "doing": doing, "still_s": round(still_s, 1)}
        if self.store is not None:
            try:
                self.store.set(self._key(self.rank), json.dumps({**self.own, "at": time.time()}))
            except RuntimeError:
                self.store = None

    def report(self, still_s: float) -> str:
        """Say who lags, as far as can be known."""
        head = f"rank {self.rank}: no progress for {still_s:.0f} s, ending the process"
        if self.world == 1:
            return f"{head}; it was {self.own['doing']}"
        if self.store is None:
            return f"{head}; rank 0, which holds the list of the others, cannot be reached"
        try:
            keys = [self._key(rank) for rank in range(self.world)]
            told = [
                json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys
            ]
        except RuntimeError:
            return f"{head}; rank 0, which holds the list of the others, cannot be reached"
        return f"{head}; lagging: {', '.join(_laggards(told, silent_s=still_s / 2))}"


def _laggards(told: list[dict[str, Any] | None], silent_s: float) -> list[str]:
    """The ranks that are silent if there are any (dead, or stopped), else those least advanced."""
    silent = [r for r, entry in enumerate(told) if entry is None or _ago(entry) > silent_s]
    least = min((entry["count"] for entry in told if entry), default=0)
    behind = [r for r, entry in enumerate(told) if entry and entry["count"] == least]
    return [
        f"rank {r} ({entry['doing']}, last heard of {_ago(entry):.0f} s ago)"
        if (entry := told[r])
        else f"rank {r} (never heard of)"
        for r in (silent or behind)
    ]


def _ago(entry: dict[str, Any]) -> float:
    return max(0.0, time.time() - entry["at"])
