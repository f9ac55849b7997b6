"""A run's folder belongs to one run at a time: taken before the first write, and watched."""

from __future__ import annotations

import atexit
import logging
import threading

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.training.run.agreement import run_ranks
from lightning_modules.training.run.loop_state import is_trial
from lightning_modules.training.run.owner import RunInUse, RunOwnership

log = logging.getLogger(__name__)


class RunTakenOver(OSError):
    """Another process has taken the run, since this one gave no sign of life."""


class RunOwner(Callback):
    """Keep a second `fit` out of the run's folder, and take over from an owner that died.

    Args:
        beat_s: Time between two signs of life.
        lost_s: How long they may fail to come before another run may take over.
    """

    def __init__(self, beat_s: float = 10.0, lost_s: float = 120.0) -> None:
        if not 0 < 3 * beat_s <= lost_s:
            raise ValueError(
                f"beat_s is {beat_s} and lost_s {lost_s}; lost_s must be at least three beats"
            )
        self.beat_s, self.lost_s = beat_s, lost_s
        self.number = 0  # of this owner, on all ranks
        self.lost = False  # another has taken over: known to rank 0
        self._ownership: RunOwnership | None = None
        self._done = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the folder on rank 0, before anything is written to it.

        Raises:
            RunInUse: It is another's; on all ranks, so that none is left waiting.
        """
        if stage != "fit" or is_trial(trainer):
            return
        ranks, refused = run_ranks(), None
        with ranks.together(f"taking {trainer.default_root_dir}"):
            try:
                if ranks.rank == 0:
                    self._take(trainer.default_root_dir)
            except RunInUse as error:
                refused = str(error)
        refused, self.number = ranks.first((refused, self.number))
        if refused is not None:
            raise RunInUse(refused)

    def _take(self, run_dir: str) -> None:
        ownership = RunOwnership(run_dir, self.lost_s, min(1.0, self.beat_s))
        taken_from = ownership.acquire()
        if taken_from is not None:
            log.warning("taking over %s from %s, which is dead", run_dir, taken_from)
        self._ownership, self.number, self.lost = ownership, ownership.number, False
        self._done.clear()
        threading.Thread(target=self._keep, args=(ownership,), daemon=True).start()
        atexit.register(self.release)

    def _keep(self, ownership: RunOwnership) -> None:
        told = False
        while not self._done.wait(self.beat_s):
            try:
                self.lost = not ownership.beat()
            except OSError as error:  # a disk that is away comes back, or the run ends otherwise
                if not told:
                    log.warning("no sign of life could be given in %s: %s", ownership.folder, error)
                told = True
            if self.lost:
                return

    def check(self) -> None:
        """On rank 0, before a checkpoint may count: the folder must still be this run's.

        Raises:
            RunTakenOver: It is not.
        """
        if self._ownership is not None and not self._ownership.is_mine():
            self.lost = True
            raise RunTakenOver(f"another process has taken over {self._ownership.run_dir}")

    def release(self) -> None:
        """Give the folder back, once nothing more will be written."""
        self._done.set()
        if self._ownership is not None and not self.lost:
            self._ownership.release()
        self._ownership = None
        atexit.unregister(self.release)
