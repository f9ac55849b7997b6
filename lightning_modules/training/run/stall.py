"""A thread on each rank that ends a process which has stopped moving, and says which ranks lag.

A rank that dies, hangs or fails leaves the others waiting in a collective: under NCCL and
DeepSpeed's subgroups without any time limit. The threads share their ranks' progress through
torch's key-value store. They watch the main thread from outside: one that is busy, that starts
something or waits for a file is seen all the same, unless it holds Python's lock for ever.
"""

from __future__ import annotations

import faulthandler
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from lightning_modules.training.run.private import default_store

EXIT_STALLED = 70
_starts = itertools.count()  # the ranks start in step


class StallWatch:
    """End the process with exit code 70 after `stall_s` seconds without progress.

    Where another rank has failed, this one has half a minute to end by itself.

    Args:
        stall_s: Seconds that count as a stall.
    """

    def __init__(self, stall_s: float) -> None:
        if stall_s <= 0:
            raise ValueError(f"stall_s is {stall_s}; it must be above 0")
        self.stall_s = stall_s
        self.grace_s = min(30.0, stall_s / 10)
        self._count, self._doing, self._since = 0, "starting", time.monotonic()
        self._done = threading.Event()
        self._board: _Board | None = None

    def mark(self, doing: str) -> None:
        """There was progress; what comes now."""
        self._count += 1
        self._doing, self._since = doing, time.monotonic()

    def start(self, doing: str) -> None:
        """Begin to watch, once the ranks are connected, if there are several."""
        self.stop()
        self.mark(doing)
        self._done, self._board = threading.Event(), _Board()
        watched = threading.Thread(
            target=self._watch, args=(self._board, self._done), name="stall-watchdog", daemon=True
        )
        watched.start()

    def stop(self, error: BaseException | None = None) -> None:
        """Watch no more; the other ranks hear of an error that ends this one."""
        self._done.set()
        if error is not None and self._board is not None:
            self._board.fail(error)
        self._board = None

    @contextmanager
    def watching(self, doing: str) -> Iterator[StallWatch]:
        """Watch what is inside."""
        self.start(doing)
        try:
            yield self
        except BaseException as error:
            self.stop(error)
            raise
        finally:
            self.stop()

    def _watch(self, board: _Board, done: threading.Event) -> None:
        pause_s = min(5.0, self.stall_s / 5)
        failed_since: float | None = None
        while True:
            still_s = time.monotonic() - self._since
            board.publish(self._count, self._doing, still_s)
            if done.wait(pause_s):
                return
            if still_s > self.stall_s:
                # the ranks stall within moments of each other; let all of them publish
                done.wait(pause_s)
                still_s = time.monotonic() - self._since
                if still_s > self.stall_s:
                    self._end(done, board.report(still_s))
            failed = board.failed()
            if failed is not None:
                failed_since = failed_since or time.monotonic()
                if time.monotonic() - failed_since > self.grace_s:
                    self._end(done, board.after(failed))

    def _end(self, done: threading.Event, report: str) -> None:
        if done.is_set():
            return
        print(f"eva02-at: {report}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2, all_threads=True)  # into the log, whatever stands for it
        os._exit(EXIT_STALLED)  # the main thread is stuck in a collective and cannot be asked


class _Board:
    """Every rank's progress, in the process group's key-value store."""

    def __init__(self) -> None:
        self.rank, self.world = 0, 1
        self.store: Any = None
        self._failed = f"eva02_at/failed/{next(_starts)}"
        self.own: dict[str, Any] = {}
        if dist.is_available() and dist.is_initialized():
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
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

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank will not come any more."""
        if self.store is not None:
            told = f"rank {self.rank} failed ({type(error).__name__}: {str(error)[:200]})"
            try:
                self.store.set(self._failed, told)
            except RuntimeError:
                self.store = None  # rank 0 has left, and they have heard

    def failed(self) -> str | None:
        """What a rank that failed has told."""
        try:
            if self.store is not None and self.store.check([self._failed]):
                return self.store.get(self._failed).decode()
        except RuntimeError:
            self.store = None
        return None

    def _itself(self) -> str:
        return f"rank {self.rank} ({self.own['doing']})"

    def after(self, failed: str) -> str:
        """Why this rank ends because of another one."""
        return f"{self._itself()} waits in vain, ending the process: {failed}"

    def report(self, still_s: float) -> str:
        """Say who lags, as far as can be known."""
        head = f"{self._itself()}: no progress for {still_s:.0f} s, ending the process"
        if self.world == 1:
            return head
        unknown = f"{head}; rank 0, which holds the list of the others, cannot be reached"
        if self.store is None:
            return unknown
        try:
            keys = [self._key(rank) for rank in range(self.world)]
            told = [
                json.loads(self.store.get(key)) if self.store.check([key]) else None for key in keys
            ]
        except RuntimeError:
            return unknown
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
