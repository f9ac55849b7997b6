"""A pool of child processes that survives the death of any of them.

A damaged video can kill the process that decodes it, so clips are made in child processes. Before
each clip a child says which one it begins; the parent thus knows which clip killed a child, rejects
it, and gives the shard to a fresh one.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import signal
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, cast

# A kill -9 is the system's doing (out of memory, a scheduler), not the clip's.
_CLIPS_FAULT = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
_MAX_RETRIES = 3
ITEM_LIMIT_S = 1800.0  # a clip of an hour's video without an index is read from its start
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass
class Job:
    """One piece of work.

    Attributes:
        number: Its number.
        payload: What the work function gets.
        crashed: Item name to reason, of items that killed a process.
        retries: How often it was started anew for other causes.
    """

    number: int
    payload: Any
    crashed: dict[str, str] = field(default_factory=dict)
    retries: int = 0


@dataclass(frozen=True)
class Event:
    """What the pool reports: an item begun (`result` is None) or a job finished."""

    job: Job
    item: str | None = None
    result: Any = None


Work = Callable[[Job, Callable[[str | None], None]], Any]


def run_jobs(
    work: Work, jobs: Sequence[Job], num_workers: int, limit_s: float = math.inf
) -> Iterator[Event]:
    """Run jobs in child processes; yields events as they come, in no fixed order.

    Args:
        work: Called as work(job, begin) in a child; must call begin(name) before each item, and
            begin(None) before long work on none.
        jobs: What to do.
        num_workers: Child processes at a time.
        limit_s: The longest that one item may take; a decoder that hangs costs its item alone.

    Raises:
        ValueError: The work function raised one (its message is passed on), or `num_workers` is
            below 1.
        RuntimeError: It raised anything else, or a child was killed from outside again and again.
    """
    _refuse_none(num_workers)
    waiting = deque(jobs)
    busy: dict[Connection, tuple[Any, Job, str | None]] = {}
    watch = _Watch(limit_s)
    try:
        while waiting or busy:
            while waiting and len(busy) < num_workers:
                job = waiting.popleft()
                process, connection = _start(work, job)
                busy[connection] = (process, job, None)
            for ready in wait(list(busy), watch.wait_s):
                watch.moved(ready)
                connection = cast(Connection, ready)
                process, job, item = busy[connection]
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):
                    del busy[connection]
                    process.join()
                    waiting.appendleft(_blame(job, item, process.exitcode))
                    continue
                if kind == "begin":
                    busy[connection] = (process, job, value)
                    if value is not None:
                        yield Event(job, item=value)
                    continue
                del busy[connection]
                process.join()
                if kind == "error":
                    raise value
                yield Event(job, result=value)
            for connection in watch.stuck([c for c, (_, _, item) in busy.items() if item]):
                process, job, item = busy.pop(connection)
                process.kill()
                process.join()
                assert item is not None
                job.crashed[item] = f"hung: not done within {limit_s:g} s"
                waiting.appendleft(job)
    finally:
        for process, _, _ in busy.values():
            process.terminate()
            process.join()


def _refuse_none(num_workers: int) -> None:
    if num_workers < 1:
        raise ValueError(f"the number of workers is {num_workers}; it must be at least 1")


class _Watch:
    """Counts how long each child has been at its item: in waits, for machines may stand still."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self.wait_s = None if limit_s == math.inf else min(1.0, limit_s / 10)
        self._silent_s: dict[Any, float] = {}
        self._last = time.monotonic()

    def moved(self, connection: Any) -> None:
        """A child said something."""
        self._silent_s.pop(connection, None)

    def stuck(self, busy: Iterable[Connection]) -> list[Connection]:
        """Count a wait; return the children that are over the limit."""
        if self.wait_s is None:
            return []
        now = time.monotonic()
        passed, self._last = min(now - self._last, 2 * self.wait_s), now
        self._silent_s = {c: self._silent_s.get(c, 0.0) + passed for c in busy}
        return [c for c, silent_s in self._silent_s.items() if silent_s > self.limit_s]


def _start(work: Work, job: Job) -> tuple[Any, Connection]:
    context = multiprocessing.get_context("fork")  # inherits the work function as it is
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, job, theirs, os.getpid()), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _child(work: Work, job: Job, connection: Connection, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends us
    # nobody would collect the work, and a build that is started again must not meet a writer that
    # is still alive
    die_with(parent)

    def begin(item: str | None) -> None:
        connection.send(("begin", item))

    try:
        connection.send(("result", work(job, begin)))
    except ValueError as error:
        connection.send(("error", ValueError(str(error))))
    except BaseException:
        connection.send(("error", RuntimeError(traceback.format_exc())))


def die_with(parent: int) -> None:
    """Let this process die with its parent, even with a killed one."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def _blame(job: Job, item: str | None, exitcode: int | None) -> Job:
    """Decide what the death of a child means for its job."""
    number = -exitcode if exitcode is not None and exitcode < 0 else 0
    if item is not None and number in _CLIPS_FAULT:
        job.crashed[item] = f"crashed the decoder ({signal.Signals(number).name})"
        return job
    job.retries += 1
    if job.retries > _MAX_RETRIES:
        raise RuntimeError(
            f"the process of job {job.number} ended with exit code {exitcode} {job.retries} times "
            f"(last at {item}); out of memory? Use fewer workers"
        )
    return job
