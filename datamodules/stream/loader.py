"""The loader: asks a data set for given places, with workers, and explains a worker's death."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from datamodules.manifest import WrongManifest
from datamodules.stream.faults import FaultMonitor

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
    ) -> None:
        self.dataset, self.places, self.length = dataset, places, length
        self.num_workers, self.prefetch = num_workers, prefetch
        self.monitor, self.describe = monitor, describe

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Any]:
        loader: DataLoader = DataLoader(
            self.dataset,
            sampler=self.places(),
            batch_size=None,  # a place is a whole batch
            num_workers=self.num_workers,
            prefetch_factor=self.prefetch if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=heed_the_trainer_alone,
        )
        with signals_held_back():  # the workers inherit this
            batches = iter(loader)
        if self.num_workers:
            _leave_deaths_to_the_queue()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except WrongManifest as error:
                # a worker's comes with its traceback before it; the message is the last line
                message = str(error).strip().splitlines()[-1]
                raise WrongManifest(message.partition("WrongManifest: ")[2] or message) from None
            # a dead worker also breaks the pipe on which it handed over its last batch
            except (RuntimeError, OSError, EOFError) as error:
                death = self._death(getattr(batches, "_workers", []))
                if death is None:
                    raise  # what a living worker raised explains itself
                raise RuntimeError(death) from error
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Tell Lightning that this loader resumes; the position itself is the DataModule's."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to load: see `state_dict`."""

    def _death(self, workers: list[Any]) -> str | None:
        """Say which workers are dead and what they were reading; torch says only that they are."""
        lines = []
        for number, process in enumerate(workers):
            process.join(timeout=0.1)
            if process.exitcode in (None, 0):
                continue
            place = None if self.monitor is None else self.monitor.in_work(number)
            sample = "no sample yet"
            if place is not None and self.describe is not None:
                sample = f"sample {self.describe(*place)}"
            lines.append(f"loader worker {number} (exit code {process.exitcode}) was at {sample}")
        if not lines:
            return None
        return "; ".join(lines) + ". After exit code -9, the system is short of memory"


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
