"""Damaged samples: named in the log, counted, replaced, and fatal past a rate."""

from __future__ import annotations

import logging

from torch import Tensor
from torch.utils.data import get_worker_info

from datamodules.stream.shared import shared_zeros

logger = logging.getLogger(__name__)

_SEEN, _DAMAGED, _SHARD, _ROW, _LOST, _GONE = range(6)
_MOST_GONE = 64  # shards that a process can name as missing
# Where all ranks judge together, only what can be no accident ends a rank before.
_LOCAL_RATE = 0.5
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
        self.judged_together = False  # all ranks look at their counts together, over a window
        self._table: Tensor = shared_zeros(max(1, num_workers), _GONE + _MOST_GONE)
        self._table[:, _SHARD] = -1
        self._table[:, _GONE:] = -1

    @property
    def num_seen(self) -> int:
        """Samples that were read so far."""
        return int(self._table[:, _SEEN].sum())

    @property
    def num_damaged(self) -> int:
        """Samples among them that were damaged."""
        return int(self._table[:, _DAMAGED].sum())

    @property
    def num_lost(self) -> int:
        """Samples whose shard was missing."""
        return int(self._table[:, _LOST].sum())

    @property
    def missing_shards(self) -> list[int]:
        """Shards of which nothing could be read."""
        gone = self._table[:, _GONE:]
        return sorted({int(shard) for shard in gone[gone >= 0]})

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
        limit = max(_LOCAL_RATE, self.max_rate) if self.judged_together else self.max_rate
        refuse_rate(self.num_damaged, self.num_seen, limit, self.max_rate, f"{name}: {reason}")

    def report_missing(self, shard: int, name: str, reason: str, is_substitute: bool) -> None:
        """Count a sample whose shard is missing; the shard itself is told of once.

        Args:
            shard: Its number.
            name: Its name.
            reason: Why it cannot be read.
            is_substitute: The sample stood in for another, which is counted already.
        """
        mine = self._table[_worker()]
        gone = mine[_GONE:]
        if shard not in gone:
            free = (gone < 0).nonzero()
            if len(free):
                gone[free[0]] = shard
            if not self.judged_together:
                logger.warning("shard %s cannot be used: %s", name, reason)
        if is_substitute:
            mine[_SEEN] -= 1
            return
        mine[_LOST] += 1
        if not self.judged_together:
            bad = self.num_damaged + self.num_lost
            refuse_rate(bad, self.num_seen, self.max_rate, self.max_rate, name)


def refuse_rate(damaged: int, seen: int, limit: float, max_rate: float, last: str) -> None:
    """Raise where too many samples are damaged.

    Raises:
        TooManyDamagedSamples: More than `limit`, and not just a few.
    """
    if damaged >= _MIN_DAMAGED and damaged > limit * seen:
        raise TooManyDamagedSamples(
            f"{damaged} of {seen} samples are damaged, more than max_fault_rate={max_rate:g} "
            f"allows; the last was {last}. Check the data with `eva02-at shards verify`, mend it "
            "with its --repair, or raise the limit"
        )


def _worker() -> int:
    info = get_worker_info()
    return 0 if info is None else info.id
