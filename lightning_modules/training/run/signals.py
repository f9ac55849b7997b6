"""Stopping on a signal: handlers only set a flag, and all ranks agree on the step to stop at.

SLURM sends SIGTERM at preemption, and what `--signal=SIGUSR1@SECONDS` names before a time limit.
Lightning's own handlers save from inside the handler, each rank by itself, which dead-locks in
the collectives of a sharded checkpoint; they are taken out (private attributes of this version).

Imports nothing heavy: the command line installs the flag before it imports torch. A rank that
died of a signal while it was still importing would leave its peers waiting at their rendezvous.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

EXIT_REQUEUE = 85
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class RunStopped(Exception):
    """The run was asked to stop, and a complete checkpoint is on the disk."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped by a signal after step {step}, with a complete checkpoint")
        self.step = step


class StopFlag:
    """Set by SIGTERM, SIGUSR1 or Ctrl-C; a second Ctrl-C interrupts at once."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take over the stop signals, where this is the main thread."""
        if threading.current_thread() is threading.main_thread() and not self._previous:
            self._previous = {s: signal.signal(s, self._note) for s in STOP_SIGNALS}

    def restore(self) -> None:
        """Give the signals back to whoever had them before."""
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)


STOP = StopFlag()  # the process's: signals have no other owner


def silence_lightning_signals(trainer: Trainer) -> None:
    """Keep Lightning from handling signals: no handlers, and no broadcast of them every batch."""
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def let_children_exit_nonzero() -> None:
    """Keep Lightning's launcher from killing this process because another rank has left with 85."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]
