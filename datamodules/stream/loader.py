"""The loader: asks a data set for given places, with workers, and explains a worker's death."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from datamodules.manifest import WrongManifest
from datamodules.stream.faults import FaultMonitor
from datamodules.stream.hung import DecodeWatch
from datamodules.stream.retry import NoBatch, StorageUnavailable
from datamodules.stream.shared import (
    full_shared_memory_named,
    hand_over,
    refuse_full_shared_memory,
)
from datamodules.video.workers import die_with

# Workers share the process group of the trainer. A signal to stop is for the trainer, which still
# needs batches to reach the step where all ranks agree to stop.
_TRAINERS_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGCONT, signal.SIGINT)


class PlaceLoader:
    """Iterates over the batches of a data set at given places, in order.

    Not a `DataLoader` itself: Lightning takes any iterable as it is, while it would replace the
    sampler of a DataLoader. The places are asked for when the first batch is, not at `iter()`:
    Lightning calls that early, before a checkpoint's position is known.

    Args:
        dataset: Gives a batch for a place.
        places: Called at the first batch of each iteration; gives the places to visit.
        length: Batches in a whole epoch, wherever this iteration begins.
        num_workers: Worker processes; 0 reads in this one.
        prefetch: Batches that each worker prepares ahead.
        monitor: Knows what a dead worker was doing.
        describe: Names a sample by (shard, row).
        watch: Ends workers that hang in a sample; their batches are made again without it.
        start_method: "fork"; "spawn" for workers that use CUDA, which a forked process cannot.
    """

    def __init__(
        self,
        dataset: Dataset,
        places: Callable[[], Iterable[Any]],
        length: int,
        *,
        num_workers: int = 0,
        prefetch: int = 2,
        monitor: FaultMonitor | None = None,
        describe: Callable[[int, int], str] | None = None,
        watch: DecodeWatch | None = None,
        start_method: str = "fork",
    ) -> None:
        self.dataset, self.places, self.length = dataset, places, length
        self.num_workers, self.prefetch, self.start_method = num_workers, prefetch, start_method
        self.monitor, self.describe, self.watch = monitor, describe, watch
        self.hands_over = False  # a NoBatch where the storage fails for good, to who knows it

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        places = _Places(self.places())
        generator = None  # as everywhere: the workers' seed comes from the global one
        while True:
            batches = self._start(places, generator)
            try:
                yield from self._batches(batches, places)
                return
            except _WorkersReplaced:
                # what was asked for is asked for again; the global generator is left alone
                generator = torch.Generator()
            finally:
                _end(batches)

    def _start(self, places: _Places, generator: torch.Generator | None) -> Iterator[Any]:
        loader: DataLoader = DataLoader(
            self.dataset,
            sampler=places,
            batch_size=None,  # a place is a whole batch
            collate_fn=hand_over,
            num_workers=self.num_workers,
            # a forkserver, the default in a rank that came from one, would be their parent
            multiprocessing_context=self.start_method if self.num_workers else None,
            prefetch_factor=self.prefetch if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=partial(_begin_worker, os.getpid(), self._gpu()),
            generator=generator,
        )
        if self.watch is not None:
            self.watch.clear()
        with signals_held_back(), full_shared_memory_named():  # the workers inherit the former
            batches = iter(loader)
        if self.num_workers:
            _leave_deaths_to_the_queue()
        return batches

    def _gpu(self) -> int | None:
        """The rank's device, for workers that decode on it."""
        spawned = self.start_method == "spawn" and torch.cuda.is_available()
        return torch.cuda.current_device() if spawned else None

    def _batches(self, batches: Iterator[Any], places: _Places) -> Iterator[Any]:
        workers = getattr(batches, "_workers", [])
        with self._watched(workers) as ended:
            while True:
                try:
                    batch = next(batches)
                except StopIteration:
                    return
                except WrongManifest as error:
                    # a worker's comes with its traceback before it; the message is the last line
                    message = str(error).strip().splitlines()[-1]
                    raise WrongManifest(
                        message.partition("WrongManifest: ")[2] or message
                    ) from None
                except StorageUnavailable as error:
                    message = str(error).strip().splitlines()[-1]
                    told = message.partition("StorageUnavailable: ")[2] or message
                    if not self.hands_over:
                        raise StorageUnavailable(told) from None
                    yield NoBatch(told)
                    return
                # a dead worker also breaks the pipe on which it handed over its last batch
                except (RuntimeError, OSError, EOFError) as error:
                    dead = _dead(workers)
                    refuse_full_shared_memory(error, [workers[number].exitcode for number in dead])
                    if not dead:
                        raise  # what a living worker raised explains itself
                    if ended.issuperset(dead):
                        raise _WorkersReplaced from error
                    raise RuntimeError(self._death(workers, dead)) from error
                places.done()
                yield batch

    def _watched(self, workers: list[Any]) -> contextlib.AbstractContextManager[set[int]]:
        if self.watch is None or not workers:
            return contextlib.nullcontext(set())
        return self.watch.over(workers, self.describe or (lambda shard, row: f"{shard}, {row}"))

    def state_dict(self) -> dict[str, Any]:
        """Tell Lightning that this loader resumes; the position itself is the DataModule's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load: see `state_dict`."""

    def _death(self, workers: list[Any], dead: list[int]) -> str:
        """Say what dead workers were reading; torch says only that they are dead."""
        lines = []
        for number in dead:
            place = None if self.monitor is None else self.monitor.in_work(number)
            sample = "no sample yet"
            if place is not None and self.describe is not None:
                sample = f"sample {self.describe(*place)}"
            exitcode = workers[number].exitcode
            lines.append(f"loader worker {number} (exit code {exitcode}) was at {sample}")
        return "; ".join(lines) + ". After exit code -9, the system is short of memory"


class _WorkersReplaced(Exception):
    """Workers were ended because they hung."""


class _Places:
    """Places to visit; those whose batches never came are visited again."""

    def __init__(self, places: Iterable[Any]) -> None:
        self._rest = iter(places)
        self._again: deque[Any] = deque()
        self._asked: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        self._again.extendleft(reversed(self._asked))
        self._asked.clear()
        while True:
            try:
                place = self._again.popleft() if self._again else next(self._rest)
            except StopIteration:
                return
            self._asked.append(place)
            yield place

    def done(self) -> None:
        """The batch of the place that was asked for first has come."""
        self._asked.popleft()


def _dead(workers: list[Any]) -> list[int]:
    for process in workers:
        process.join(timeout=0.1)
    return [number for number, w in enumerate(workers) if w.exitcode not in (None, 0)]


def _end(batches: Iterator[Any]) -> None:
    """End the workers, those that hear nothing as well."""
    workers = getattr(batches, "_workers", [])
    if workers:
        batches._shutdown_workers()  # type: ignore[attr-defined]
    for process in workers:
        if process.is_alive():
            process.kill()
            process.join()


def _leave_deaths_to_the_queue() -> None:
    """Take away torch's SIGCHLD handler, which raises wherever the main process happens to be.

    A dead worker is noticed within five seconds as well where the next batch is waited for, and
    there it can be explained.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and getattr(handler, "__module__", "") == signal_handling.__name__:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
    """Block the trainer's signals; a child started in here calls `heed_the_trainer_alone`."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _TRAINERS_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(trainer: int, gpu: int | None, worker: int) -> None:
    if gpu is not None:
        torch.cuda.set_device(gpu)
    die_with(trainer)  # also of one that is killed, and also while a decoder hears nothing
    heed_the_trainer_alone(worker)


def heed_the_trainer_alone(worker: int) -> None:
    """Ignore the trainer's signals, but end on a SIGTERM that the trainer itself sends.

    Python sends one to the workers that are left when it exits, and then waits for them.
    """
    ignored = [number for number in _TRAINERS_SIGNALS if number != signal.SIGTERM]
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ignored)
    threading.Thread(target=_end_on_the_trainers_word, daemon=True).start()


def _end_on_the_trainers_word() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
