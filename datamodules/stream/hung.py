"""Samples whose decoding never ends: found by a watch over the loader's workers, and avoided after.

A decoder that loops in native code hears neither signals nor exceptions, so the worker is killed by
the main process. The sample is written down first: neither the worker that takes over nor a later
start of the run meets it again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from datamodules.stream.shared import shared_zeros
from datamodules.video.decode import DamagedSample

logger = logging.getLogger(__name__)

LIST_NAME = "hung_samples.jsonl"
_SHARD, _ROW, _TURN = range(3)
_LOOKS = 20  # within the limit
_LONGEST_WAIT_S = 1.0


class HungSamples:
    """The samples of a data set that no process is to decode.

    Args:
        path: Where they are kept, a line each; None forgets them with the process.
        fingerprint: Of the manifests and their weights, which say what (shard, row) means.
    """

    def __init__(self, path: Path | None = None, fingerprint: str = "") -> None:
        self.path, self.fingerprint = path, fingerprint
        self._known: set[tuple[int, int]] = set()
        if path is not None and path.is_file():
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):  # a line cut short
                    found = json.loads(line)
                    if found["manifests"] == fingerprint:
                        self._known.add((int(found["shard"]), int(found["row"])))

    def __contains__(self, place: tuple[int, int]) -> bool:
        return place in self._known

    def add(self, shard: int, row: int, name: str) -> None:
        """Write a sample down; several ranks may do so at once."""
        known = (shard, row) in self._known  # two workers may have been stuck in one
        self._known.add((shard, row))
        if self.path is None or known:
            return
        about = {"manifests": self.fingerprint, "shard": shard, "row": row, "sample": name}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(about) + "\n")


class DecodeWatch:
    """Ends workers that decode one sample for too long.

    Args:
        num_workers: Loader workers. With 0 the main process decodes, and nobody watches it.
        limit_s: The longest that decoding one sample may take.
        hung: Where the samples go that took longer.
    """

    def __init__(self, num_workers: int, limit_s: float, hung: HungSamples | None = None) -> None:
        if not limit_s > 0:
            raise ValueError(f"decode_timeout_s is {limit_s}; it must be above 0")
        self.limit_s, self.hung = limit_s, hung or HungSamples()
        # shard, row, and a count that is odd while the sample is being decoded; no lock is needed
        self._table: Tensor = shared_zeros(max(1, num_workers), 3)

    @contextlib.contextmanager
    def decoding(self, shard: int, row: int) -> Iterator[None]:
        """Say that this process decodes a sample.

        Raises:
            DamagedSample: Its decoding did not end before.
        """
        if (shard, row) in self.hung:
            raise DamagedSample("hung: its decoding did not end in time")
        info = get_worker_info()
        worker = 0 if info is None else info.id
        if worker >= len(self._table):  # made for fewer workers, so that nobody watches this one
            yield
            return
        mine = self._table[worker].numpy()
        mine[_SHARD], mine[_ROW] = shard, row
        mine[_TURN] += 1
        try:
            yield
        finally:
            mine[_TURN] += 1

    def clear(self) -> None:
        """Forget what workers said; to be called before new ones start, not after.

        A worker may be in its first sample before anybody watches it.
        """
        self._table.zero_()

    @contextlib.contextmanager
    def over(
        self, workers: Sequence[Any], describe: Callable[[int, int], str]
    ) -> Iterator[set[int]]:
        """Watch over workers; yields the set of those that were ended, which grows.

        Args:
            workers: Their processes.
            describe: Names a sample by (shard, row).
        """
        ended: set[int] = set()
        done = threading.Event()
        arguments = (workers, describe, ended, done)
        thread = threading.Thread(target=self._look, args=arguments, daemon=True)
        thread.start()
        try:
            yield ended
        finally:
            done.set()
            thread.join()

    def _look(
        self,
        workers: Sequence[Any],
        describe: Callable[[int, int], str],
        ended: set[int],
        done: threading.Event,
    ) -> None:
        wait_s = min(_LONGEST_WAIT_S, self.limit_s / _LOOKS)
        seen = [(0, 0, 0)] * len(workers)
        # what was waited, not what the clock says: a machine that stood still is no decoder's fault
        stuck_s = [0.0] * len(workers)
        while not done.wait(wait_s):
            for number, worker in enumerate(workers):
                now = tuple(self._table[number].tolist())
                decoding = now[_TURN] % 2 == 1 and now == seen[number]
                stuck_s[number] = stuck_s[number] + wait_s if decoding else 0.0
                seen[number] = now
                if stuck_s[number] >= self.limit_s and number not in ended:
                    name = describe(now[_SHARD], now[_ROW])
                    logger.warning(
                        "decoding of %s has taken more than decode_timeout_s=%g; loader worker %d "
                        "is replaced, and the sample is not tried again",
                        name,
                        self.limit_s,
                        number,
                    )
                    self.hung.add(now[_SHARD], now[_ROW], name)
                    ended.add(number)
                    worker.kill()
