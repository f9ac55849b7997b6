"""When to write a checkpoint, and how all ranks write one together."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_modules.training.monitor.csv_log import AppendingCSVLogger
from lightning_modules.training.optim.ema import WeightAverage, local_tensor
from lightning_modules.training.run.agreement import Ranks, run_ranks
from lightning_modules.training.run.checkpoint_store import (
    STATE,
    CheckpointFolder,
    FileRecord,
    Manifest,
    checkpoint_name,
    file_record,
)
from lightning_modules.training.run.loop_state import Progress, settle_validation
from lightning_modules.training.run.private import (
    dump_checkpoint,
    gradients_pending,
    let_children_exit_nonzero,
    log_last_step,
    norms,
    silence_lightning_signals,
    validation_due,
)
from lightning_modules.training.run.signals import STOP, RunStopped
from lightning_modules.training.run.strategies import PlainCheckpointIO, ZeroStrategy

log = logging.getLogger(__name__)


class SafeCheckpoints(Checkpoint):
    """Checkpoints that are complete or do not count, and a clean stop on a signal.

    A checkpoint holds the state after an optimiser step. It is written every `every_n_steps`,
    every `every_minutes`, after each validation, at the end, and when a signal asks the run to
    stop; then every rank raises `RunStopped`, which the command line turns into exit code 85.
    A failed write (a full disk) is reported and the run goes on with its older checkpoints; only
    a stop that could not be saved is an error.

    Args:
        dirpath: Folder of the checkpoints; `checkpoints` in the run's folder by default.
        every_n_steps: Optimiser steps between two; 0 for none.
        every_minutes: Wall time between two, by rank 0's clock; 0 for none.
        after_validation: Write one after each validation, with its metrics.
        keep_last: How many of the newest stay; 0 keeps all.
        keep_best: How many of the best by `monitor` stay besides.
        monitor: Metric for `keep_best`.
        mode: Whether a large (`max`) or small (`min`) metric is good.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        every_n_steps: int = 0,
        every_minutes: float = 30.0,
        after_validation: bool = True,
        keep_last: int = 2,
        keep_best: int = 1,
        monitor: str | None = "val/map_avg",
        mode: Literal["max", "min"] = "max",
    ) -> None:
        if every_n_steps < 0 or every_minutes < 0:
            raise ValueError(
                "every_n_steps and every_minutes must not be negative; 0 turns one off"
            )
        self.dirpath = dirpath
        self.every_n_steps, self.every_minutes = every_n_steps, every_minutes
        self.after_validation = after_validation
        self.keep = (keep_last, keep_best, monitor, mode)
        self.flag = STOP
        self._folder: CheckpointFolder
        self._ranks: Ranks
        self._progress: Progress | None = None  # what has been trained, once anything has
        self._saved: Progress | None = None  # that of the newest checkpoint
        self._saved_at = time.monotonic()

    # -- set-up ---------------------------------------------------------------------------------
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take over signals and the writing of files."""
        if not isinstance(trainer.strategy, ZeroStrategy):
            trainer.strategy.checkpoint_io = PlainCheckpointIO()
        if stage != "fit":
            return
        self._ranks = run_ranks()
        root = self.dirpath or Path(trainer.default_root_dir) / "checkpoints"
        self._folder = CheckpointFolder(self._ranks.first(str(root)))
        if self._ranks.rank == 0:
            self._folder.clean()
        silence_lightning_signals(trainer)
        self.flag.install()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put Lightning's loops where the checkpoint's progress says, before they are restored."""
        if trainer.state.fn == "fit" and (progress := Progress.of(checkpoint)) is not None:
            progress.place(trainer, checkpoint["loops"])
            self._progress = progress

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The resumed step needs no checkpoint of its own; what comes after it is done again."""
        if self._progress is not None:
            settle_validation(trainer, self._progress)
        self._saved = self._progress
        for logger in trainer.loggers:
            if isinstance(logger, AppendingCSVLogger):
                logger.resume_at(trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back, unless the process is about to end because of one."""
        if self.flag.received is None:
            self.flag.restore()

    # -- when -----------------------------------------------------------------------------------
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimiser step: agree, save if one is due, stop if asked to."""
        if gradients_pending(trainer):
            return
        done = Progress.after_batch(trainer)
        self._progress = replace(done, validation_due=validation_due(trainer))
        stop, late = self._agree()
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        if stop or late or due:
            saved = self._save(trainer)
            if stop:
                log_last_step(trainer)
                self._stop(trainer, saved)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop within a validation; the resumed run repeats the whole validation."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking and self._agree()[0]:
            self._stop(trainer, self._save(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with the metrics of this validation."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or self._progress is None:
            return
        self._progress = replace(self._progress, validation_due=False)
        if self.after_validation:
            self._saved = None
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        self._save(trainer)

    def _agree(self) -> tuple[bool, bool]:
        minutes = (time.monotonic() - self._saved_at) / 60
        late = self._ranks.rank == 0 and 0 < self.every_minutes <= minutes
        stop, late_anywhere = self._ranks.maximum([int(self.flag.received is not None), int(late)])
        return bool(stop), bool(late_anywhere)

    def _stop(self, trainer: Trainer, saved: bool) -> None:
        if not saved:
            raise OSError(
                f"asked to stop at step {trainer.global_step}, but the checkpoint could not be "
                f"written; the older ones in {self._folder.root} are intact"
            )
        self._ranks.gather(None)  # nobody leaves while another still works
        let_children_exit_nonzero()
        raise RunStopped(trainer.global_step)

    # -- how ------------------------------------------------------------------------------------
    def _save(self, trainer: Trainer) -> bool:
        """Write a checkpoint on all ranks; False (and a warning) where that failed."""
        if self._progress is None or self._progress == self._saved:
            return True
        name, error = checkpoint_name(trainer.global_step), None
        self._saved_at = time.monotonic()
        try:
            self._write(trainer, name, self._progress)
            self._saved = self._progress
        except (OSError, ValueError) as caught:
            error = caught
            if self._ranks.rank == 0:
                self._folder.discard(name)
                log.warning("checkpoint of step %d NOT written: %s", trainer.global_step, caught)
        return error is None

    def _write(self, trainer: Trainer, name: str, progress: Progress) -> None:
        """Write under a temporary name, then commit on rank 0; every step ends in agreement."""
        ranks, module = self._ranks, trainer.lightning_module
        averages = [c for c in trainer.callbacks if isinstance(c, WeightAverage)]  # type: ignore[attr-defined]
        for average in averages:
            average.put_weights_back(module)
        self._refuse_poison(module)
        error: Exception | None = None
        try:
            if ranks.rank == 0:
                self._folder.begin(name)
        except OSError as caught:
            error = caught
        ranks.raise_together(error, f"making the folder of {name}")
        folder = self._folder.temporary(name)
        checkpoint = dump_checkpoint(trainer)
        progress.put_into(checkpoint)
        records: list[FileRecord] = []
        try:
            trainer.strategy.save_checkpoint(checkpoint, folder / STATE)
            for average in averages:
                average.save(module, folder)
            # each rank hashes what it wrote; rank 0 adds what nobody claims
            written = getattr(trainer.strategy, "written", [])
            records = [file_record(folder, path) for path in written]
        except (OSError, RuntimeError) as caught:  # torch raises RuntimeError on a full disk
            error = caught
        ranks.raise_together(error, f"writing {name}")
        self._commit(trainer, name, ranks.gather(records))

    def _commit(self, trainer: Trainer, name: str, records: list[list[FileRecord]]) -> None:
        error: Exception | None = None
        try:
            if self._ranks.rank == 0:
                strategy = trainer.strategy
                zero = f"zero{strategy.stage}" if isinstance(strategy, ZeroStrategy) else "plain"
                folder = self._folder.temporary(name)
                files = {record.path: record for rows in records for record in rows}
                for path in folder.rglob("*"):
                    if path.is_file() and str(path.relative_to(folder)) not in files:
                        record = file_record(folder, path)
                        files[record.path] = record
                manifest = Manifest(
                    step=trainer.global_step,
                    epoch=trainer.current_epoch,
                    world_size=trainer.world_size,
                    strategy=zero,
                    metrics={k: float(v) for k, v in trainer.callback_metrics.items()},
                    files=sorted(files.values(), key=lambda record: record.path),
                )
                self._folder.commit(name, manifest)
                self._folder.prune(*self.keep)
        except OSError as caught:
            error = caught
        self._ranks.raise_together(error, f"completing {name}")

    def _refuse_poison(self, module: LightningModule) -> None:
        """Raise on all ranks where a weight is not finite: such a checkpoint must not replace one.

        Raises:
            ValueError: Some weight on some rank is not finite.
        """
        weights = [local_tensor(p).detach() for p in module.parameters()]
        sizes = torch.stack([norm.float() for norm in norms(weights)])
        if self._ranks.maximum([int(not torch.isfinite(sizes).all())])[0]:
            raise ValueError("the weights are not finite")
