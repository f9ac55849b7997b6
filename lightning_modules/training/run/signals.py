"""Stopping on a signal: handlers only set a flag, and all ranks agree on the step to stop at.

SLURM sends SIGTERM at preemption, and what `--signal=SIGUSR1@SECONDS` names before a time limit.
Lightning's own handlers are taken out (`private.silence_lightning_signals`).

Imports nothing heavy: the command line installs the flag before it imports torch. A rank that
died of a signal while it was still importing would leave its peers waiting at their rendezvous.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

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
