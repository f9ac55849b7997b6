"""Damaged samples: named in the log, counted, replaced, and fatal past a rate."""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

logger = logging.getLogger(__name__)

_SEEN, _DAMAGED, _SHARD, _ROW = range(4)
# A rate says little about few samples: one damaged clip among the first ten is no reason to stop.
_MIN_DAMAGED = 10


class TooManyDamagedSamples(RuntimeError):
    """More samples are damaged than the policy allows; the message says how many."""


class FaultMonitor:
    """Counts samples over all loader workers of a rank, and knows what each is reading.

    The counts lie in shared memory, one row a process, so that no lock is needed and the main
    process can tell which sample a worker died on.

    Args:
        num_workers: Loader workers; with 0 the main process reads.
        max_rate: Share of damaged samples above which the run ends.
    """

    def __init__(self, num_workers: int, max_rate: float) -> None:
        if not 0 <= max_rate <= 1:
            raise ValueError(f"max_fault_rate is {max_rate}; it must be from 0 to 1")
        self.max_rate = max_rate
        self._table: Tensor = torch.zeros(max(1, num_workers), 4, dtype=torch.int64)
        self._table[:, _SHARD] = -1
        self._table.share_memory_()

    @property
    def num_seen(self) -> int:
        """Samples that were read so far."""
        return int(self._table[:, _SEEN].sum())

    @property
    def num_damaged(self) -> int:
        """Samples among them that were damaged."""
        return int(self._table[:, _DAMAGED].sum())

    def begin(self, shard: int, row: int) -> None:
        """Note that this process turns to a sample."""
        mine = self._table[_worker()]
        mine[_SHARD], mine[_ROW] = shard, row
        mine[_SEEN] += 1

    def in_work(self, worker: int) -> tuple[int, int] | None:
        """Return (shard, row) of the sample that a worker turned to last."""
        shard, row = self._table[worker, _SHARD].item(), self._table[worker, _ROW].item()
        return None if shard < 0 else (int(shard), int(row))

    def report(self, name: str, reason: str, what_next: str) -> None:
        """Count a damaged sample and write it to the log.

        Raises:
            TooManyDamagedSamples: It was one too many.
        """
        logger.warning("damaged sample %s: %s; %s", name, reason, what_next)
        self._table[_worker(), _DAMAGED] += 1
        damaged, seen = self.num_damaged, self.num_seen
        if damaged >= _MIN_DAMAGED and damaged > self.max_rate * seen:
            raise TooManyDamagedSamples(
                f"{damaged} of {seen} samples are damaged, more than max_fault_rate="
                f"{self.max_rate:g} allows; the last was {name}: {reason}. Check the data with "
                "`eva02-at shards verify`, mend it with its --repair, or raise the limit"
            )


def _worker() -> int:
    info = get_worker_info()
    return 0 if info is None else info.id
