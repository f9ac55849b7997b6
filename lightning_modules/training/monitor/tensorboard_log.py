"""TensorBoard's log, of which no run dies: a disk that is full or away costs points, no more."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

log = logging.getLogger(__name__)

_PAUSE_S = 60.0


class TolerantTensorBoardLogger(TensorBoardLogger):
    """Lightning's logger, which leaves off with one warning and comes back when the disk does.

    What is logged in between is missing here; the CSV has it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._back_at: float | None = None  # when to try again
        _quiet_writer_threads()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Write points, if the disk lets them through."""
        self._try(lambda: super(TolerantTensorBoardLogger, self).log_metrics(metrics, step))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The resolved recipe is saved elsewhere."""

    def save(self) -> None:
        """Flush, if there is anything and the disk lets it through.

        Lightning's own also looks whether hyperparameters could be kept, for which it imports
        s3fs, half a second; and it does so at the start, before there is a point to flush.
        """
        if self._experiment is not None:
            self._try(self.experiment.flush)

    def finalize(self, status: str) -> None:
        """Flush and close, if the disk lets it through."""
        self._try(lambda: super(TolerantTensorBoardLogger, self).finalize(status))

    def _try(self, write: Callable[[], object]) -> None:
        if self._back_at is not None and time.monotonic() < self._back_at:
            return
        try:
            write()
        except (OSError, ValueError) as error:
            # Lightning makes a ValueError of whatever a writer says
            cause = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(cause, OSError):
                raise
            if self._back_at is None:
                log.warning("TensorBoard's log is not written for now: %s", cause)
            self._back_at = time.monotonic() + _PAUSE_S
            # a writer that has failed once raises for ever; the next one begins a file of its own
            if self._experiment is not None:
                with contextlib.suppress(OSError):
                    self._experiment.close()
            self._experiment = None
        else:
            if self._back_at is not None:
                log.warning("TensorBoard's log is written again")
            self._back_at = None


def _quiet_writer_threads() -> None:
    """The thread that fails tells the logger, which says it once; its traceback adds nothing."""
    usual = threading.excepthook
    if getattr(usual, "__name__", "") == "_without_writers":
        return

    def _without_writers(failed: threading.ExceptHookArgs) -> None:
        if not (
            type(failed.thread).__name__ == "_AsyncWriterThread"
            and isinstance(failed.exc_value, OSError)
        ):
            usual(failed)

    threading.excepthook = _without_writers
