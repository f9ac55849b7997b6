"""Fetching remote shards ahead of their use: the order is known, so what comes next is, too."""

from __future__ import annotations

import logging
import multiprocessing
import os
import socket
import time
import weakref
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from datamodules.stream.cache import FileCache
from datamodules.stream.loader import heed_the_trainer_alone, signals_held_back
from datamodules.stream.order import StreamOrder
from datamodules.stream.reader import Corpus
from datamodules.stream.shared import shared_zeros
from datamodules.stream.stores import is_remote

logger = logging.getLogger(__name__)

CONNECTIONS = 8
_LOOK_S = 0.1  # how often the position is looked at
_REPUBLISH_S = 600.0
_PAUSE_S = 30.0  # after a shard that could not be fetched; who needs it says why


class Upcoming:
    """Which shards some lanes need next, as far as a cache can hold them.

    Args:
        order: The order of samples.
        lanes: The lanes of a node.
        sizes: Bytes of each shard.
        limit_bytes: How much the cache holds.
        max_ahead: Most shards beyond those in use.
    """

    def __init__(
        self,
        order: StreamOrder,
        lanes: range,
        sizes: Sequence[int],
        limit_bytes: int,
        max_ahead: int | None = None,
    ) -> None:
        self.order, self.lanes, self.sizes = order, lanes, sizes
        self.limit_bytes, self.max_ahead = limit_bytes, max_ahead
        self._needs: dict[int, list[tuple[int, int, list[int]]]] = {}

    def after(self, epoch: int, step: int) -> list[int]:
        """List shards by their next use, those in use at a step first."""
        listed: dict[int, None] = {}
        total = ahead = 0
        for number in (epoch, epoch + 1):
            for first, end, shards in self._epoch(number):
                if number == epoch and end <= step:
                    continue
                waits = number > epoch or first > step
                for shard in shards:
                    if shard in listed:
                        continue
                    total, ahead = total + self.sizes[shard], ahead + waits
                    if total > self.limit_bytes or ahead > (self.max_ahead or len(self.sizes)):
                        return list(listed)
                    listed[shard] = None
        return list(listed)

    def in_use(self, epoch: int, step: int) -> set[int]:
        """The shards that are read at a step's time, which the cache should hold."""
        windows = self._epoch(epoch)
        return {s for first, end, shards in windows if first <= step < end for s in shards}

    def _epoch(self, number: int) -> list[tuple[int, int, list[int]]]:
        if number not in self._needs:
            self._needs = {n: needs for n, needs in self._needs.items() if n == number - 1}
            needs = self.order.epoch(number).needs(self.lanes)
            self._needs[number] = [(first, end, shards.tolist()) for first, end, shards in needs]
        return self._needs[number]


class Prefetcher:
    """Keeps a node's cache ahead of its readers, in a process of its own.

    Readers that need a shard which is on its way wait for that copy; they never depend on this
    process: without it they fetch for themselves.

    Args:
        corpus: The shards.
        cache: The node's.
        upcoming: What its ranks need next.
        behind: Steps that readers may lag behind the place that was last asked for.
    """

    def __init__(self, corpus: Corpus, cache: FileCache, upcoming: Upcoming, behind: int) -> None:
        self.corpus, self.cache, self.upcoming, self.behind = corpus, cache, upcoming, behind
        self._place = shared_zeros(2)
        self._process: Any = None
        self._name = f"{socket.gethostname()}-{os.getpid()}"

    def move_to(self, epoch: int, step: int) -> None:
        """Say which step is asked for next; starts the process at the first call."""
        self._place[0], self._place[1] = epoch, max(0, step - self.behind)
        if self._process is None:
            context = multiprocessing.get_context("fork")
            self._process = context.Process(target=self._run, daemon=True, name="prefetch")
            with signals_held_back():
                self._process.start()
            self._end = weakref.finalize(self, _kill, self._process, self.cache, self._name)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._end()
            self._process = None

    def _run(self) -> None:
        heed_the_trainer_alone(0)
        torch.set_num_threads(1)
        pool = ThreadPoolExecutor(CONNECTIONS)
        running: dict[int, Future[None]] = {}
        paused: dict[int, float] = {}
        published: tuple[list[int], float] = ([], 0.0)
        self._warn_if_small()
        while True:
            epoch, step = (int(value) for value in self._place)
            shards = self.upcoming.after(epoch, step)
            if shards != published[0] or time.monotonic() > published[1] + _REPUBLISH_S:
                published = shards, time.monotonic()
                self.cache.publish(self._name, [sha for s in shards for _, sha in self._files(s)])
            for shard in [shard for shard, future in running.items() if future.done()]:
                error = running.pop(shard).exception()
                if error is not None:
                    logger.warning("shard %d was not fetched ahead: %s", shard, error)
                    paused[shard] = time.monotonic() + _PAUSE_S
            urgent = self.upcoming.in_use(epoch, step)
            for shard in shards:
                if len(running) == CONNECTIONS:
                    break
                if shard not in urgent and urgent & running.keys():
                    break  # what is waited for has the bandwidth to itself
                if shard in running or paused.get(shard, 0.0) > time.monotonic():
                    continue
                if not all(self.cache.has(sha256) for _, sha256 in self._files(shard)):
                    running[shard] = pool.submit(self._fetch, shard)
            time.sleep(_LOOK_S)

    def _files(self, shard: int) -> list[tuple[str, str]]:
        """(location, SHA-256) of the remote files of a shard."""
        manifest, number = self.corpus.shard(shard)
        entry = manifest.shards[number]
        named = (entry.index, entry.index_sha256), (entry.name, entry.sha256)
        places = [(manifest.url(name), sha256) for name, sha256 in named]
        return [place for place in places if is_remote(place[0])]

    def _fetch(self, shard: int) -> None:
        for url, sha256 in self._files(shard):
            self.cache.open(url, sha256).close()

    def _warn_if_small(self) -> None:
        epoch, step = (int(value) for value in self._place)
        needed = sum(self.upcoming.sizes[shard] for shard in self.upcoming.in_use(epoch, step))
        if needed > self.cache.limit_bytes:
            logger.warning(
                "this node reads from %.0f GB of shards at a time, but cache_gb holds %.0f: shards "
                "are fetched again and again. Give more room, or a smaller shuffle_window",
                needed / 1e9,
                self.cache.limit_bytes / 1e9,
            )


def _kill(process: Any, cache: FileCache, name: str) -> None:
    process.kill()
    process.join()
    cache.withdraw(name)
