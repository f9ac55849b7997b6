"""When to write a checkpoint, and how all ranks write one together."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from datamodules.files import write_atomically
from datamodules.stream.retry import NoBatch, StorageUnavailable
from lightning_modules.training.monitor.csv_log import AppendingCSVLogger
from lightning_modules.training.optim.ema import (
    EMA_FILE,
    WeightAverage,
    local_tensor,
    save_average,
)
from lightning_modules.training.run.agreement import Ranks, run_ranks
from lightning_modules.training.run.checkpoint_store import (
    RECIPE,
    STATE,
    CheckpointFolder,
    Manifest,
    checkpoint_name,
)
from lightning_modules.training.run.loop_state import Progress, is_trial, settle_validation
from lightning_modules.training.run.ownership import RunOwner, RunTakenOver
from lightning_modules.training.run.private import (
    dump_checkpoint,
    gradients_pending,
    let_children_exit_nonzero,
    log_last_step,
    norms,
    silence_lightning_signals,
    validation_due,
)
from lightning_modules.training.run.saving import HostMemory, Piece, Saving, write_state
from lightning_modules.training.run.signals import STOP, RunStopped
from lightning_modules.training.run.strategies import PlainCheckpointIO, ZeroStrategy, kind_of

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
        background: Copy the state to host memory and write it while the training goes on. Each
            process keeps memory for one copy of what it writes: under ZeRO its share of the
            optimiser state, otherwise rank 0 the whole state. The next checkpoint, a stop and the
            end of the run wait for the one under way.

    Attributes:
        recipe: The resolved recipe as YAML, kept in the run's folder and in each checkpoint.
    """

    recipe: str | None = None

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
        background: bool = True,
    ) -> None:
        if every_n_steps < 0 or every_minutes < 0:
            raise ValueError(
                "every_n_steps and every_minutes must not be negative; 0 turns one off"
            )
        self.dirpath = dirpath
        self.every_n_steps, self.every_minutes = every_n_steps, every_minutes
        self.after_validation = after_validation
        self.keep = (keep_last, keep_best, monitor, mode)
        self.background = background
        self._saving: Saving | None = None  # the one under way
        self._memory = HostMemory()
        self.flag = STOP
        self._folder: CheckpointFolder
        self._owner: RunOwner | None = None
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
        if is_trial(trainer):
            self.flag.restore()
            return
        root = self.dirpath or Path(trainer.default_root_dir) / "checkpoints"
        self._owner = next((c for c in trainer.callbacks if isinstance(c, RunOwner)), None)  # type: ignore[attr-defined]
        fence = () if self._owner is None else (self._owner.number, self._owner.check)
        self._folder = CheckpointFolder(self._ranks.first(str(root)), *fence)
        with self._ranks.together(f"tidying {root}"):
            if self._ranks.rank == 0:
                self._folder.clean()
                _tell_the_job(self._folder.root)
        silence_lightning_signals(trainer)
        self.flag.install()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put Lightning's loops where the checkpoint's progress says, before they are restored."""
        if trainer.state.fn != "fit":
            return
        if (progress := Progress.of(checkpoint)) is not None:
            progress.place(trainer, checkpoint["loops"])
            self._progress = progress

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The resumed step needs no checkpoint of its own; what comes after it is done again."""
        if is_trial(trainer):
            return
        if self._progress is not None:
            settle_validation(trainer, self._progress)
        self._saved = self._progress
        if self.recipe is not None and self._ranks.rank == 0:
            self._keep_recipe(Path(trainer.default_root_dir) / RECIPE)
        for logger in trainer.loggers:
            if isinstance(logger, AppendingCSVLogger):
                logger.resume_at(trainer.global_step)

    def _keep_recipe(self, path: Path) -> None:
        """The run's configuration is that of what trains; each checkpoint has its own beside it."""
        try:
            write_atomically(path, str(self.recipe))
        except OSError as error:
            log.warning("%s NOT written: %s", path, error)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back, unless the process is about to end because of one."""
        self._leave_no_thread()
        if self.flag.received is None:
            self.flag.restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Complete what is under way if all ranks are here; else it ends, and does not count."""
        if self._saving is not None and (
            self._ranks.size == 1 or getattr(exception, "on_all_ranks", False)
        ):
            self._finish()
        self._leave_no_thread()

    def _leave_no_thread(self) -> None:
        """Nothing is written any more: the folder is free for the next run."""
        if self._saving is not None:
            self._saving.wait()
            self._saving = None
        if self._owner is not None:
            self._owner.release()

    # -- when -----------------------------------------------------------------------------------
    takes_no_batch = True  # loaders may hand over a NoBatch, instead of raising on one rank

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Stop together, with a checkpoint, where some rank's storage failed for good."""
        self._all_have_batches(trainer, batch)

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """The same; the resumed run repeats the whole validation."""
        if self._is_validating(trainer):
            self._all_have_batches(trainer, batch)

    def _all_have_batches(self, trainer: Trainer, batch: Any) -> None:
        fault = batch.storage_fault if isinstance(batch, NoBatch) else None
        if not self._ranks.maximum([int(fault is not None)])[0]:
            return
        told = [(r, why) for r, why in enumerate(self._ranks.gather(fault)) if why is not None]
        saved = is_trial(trainer) or self._save_and_wait(trainer) or self._progress is None
        what = "with" if saved else "WITHOUT"
        raise StorageUnavailable(
            f"{'; '.join(f'rank {r}: {why}' for r, why in told)}. Stopped after step "
            f"{trainer.global_step}, {what} a checkpoint of it"
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimiser step: agree, save if one is due, stop if asked to."""
        if gradients_pending(trainer) or is_trial(trainer):
            return
        done = Progress.after_batch(trainer)
        self._progress = replace(done, validation_due=validation_due(trainer))
        stop, late = self._agree(trainer)
        if stop:
            log_last_step(trainer)
            self._stop(trainer)
        if late or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            self._save(trainer)

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
        if self._is_validating(trainer) and self._agree(trainer)[0]:
            self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with the metrics of this validation."""
        if not self._is_validating(trainer) or self._progress is None:
            return
        self._name_unknown_monitor(trainer)
        self._progress = replace(self._progress, validation_due=False)
        if self.after_validation:
            self._saved = None
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step.

        Raises:
            OSError: It could not be saved: what was trained last is lost, and must be done again.
        """
        if not is_trial(trainer) and not self._save_and_wait(trainer):
            raise OSError(
                f"trained to step {trainer.global_step}, but the checkpoint could not be written; "
                f"the older ones in {self._folder.root} are intact"
            )

    def _is_validating(self, trainer: Trainer) -> bool:
        """A validation within a run, of which something is kept."""
        return trainer.state.fn == "fit" and not trainer.sanity_checking and not is_trial(trainer)

    def _name_unknown_monitor(self, trainer: Trainer) -> None:
        _, keep_best, monitor, _ = self.keep
        if monitor is None or keep_best <= 0 or monitor in trainer.callback_metrics:
            return
        self.keep = (*self.keep[:2], None, self.keep[3])
        if self._ranks.rank == 0:
            known = ", ".join(sorted(trainer.callback_metrics))
            log.warning(
                "checkpoints.monitor is %r, which this run does not log (it logs %s); no "
                "checkpoint is kept as the best",
                monitor,
                known,
            )

    def _agree(self, trainer: Trainer) -> tuple[bool, bool]:
        """Whether to stop and whether a checkpoint is late; a write that is done goes on."""
        minutes = (time.monotonic() - self._saved_at) / 60
        late = self._ranks.rank == 0 and 0 < self.every_minutes <= minutes
        busy = self._saving is not None and self._saving.busy
        lost = self._owner is not None and self._owner.lost
        flags = self.flag.received is not None, late, busy, lost
        stop, late, busy, lost = map(bool, self._ranks.maximum([int(flag) for flag in flags]))
        if lost:
            raise RunTakenOver(
                f"another process has taken over {trainer.default_root_dir} and goes on from its "
                "newest checkpoint; this one ends"
            )
        if self._saving is not None and not busy:
            self._advance()
        return stop, late

    def _stop(self, trainer: Trainer) -> None:
        if not self._save_and_wait(trainer):
            raise OSError(
                f"asked to stop at step {trainer.global_step}, but the checkpoint could not be "
                f"written; the older ones in {self._folder.root} are intact"
            )
        self._ranks.gather(None)  # nobody leaves while another still works
        let_children_exit_nonzero()
        raise RunStopped(trainer.global_step)

    # -- how ------------------------------------------------------------------------------------
    def _save(self, trainer: Trainer) -> None:
        """Begin a checkpoint of what has been trained, unless there is one; the last one first."""
        self._finish()
        progress = self._progress
        if progress is None or progress == self._saved:
            return
        name = checkpoint_name(progress.steps)
        self._saved_at = time.monotonic()
        try:
            pieces = self._snapshot(trainer, name, progress)
        except OSError as error:
            self._give_up(name, progress.steps, error)
            return
        manifest = Manifest(
            step=progress.steps,
            epoch=progress.epoch,
            world_size=trainer.world_size,
            strategy=kind_of(trainer.strategy),
            metrics={k: float(v) for k, v in trainer.callback_metrics.items()},
        )
        self._saved = progress
        self._saving = Saving(self._ranks, self._folder, name, manifest, pieces, self.keep)
        if not self.background:
            self._finish()

    def _save_and_wait(self, trainer: Trainer) -> bool:
        """Write a checkpoint of what has been trained to its end; whether it is on the disk."""
        self._save(trainer)
        self._finish()
        return self._progress == self._saved

    def _finish(self) -> None:
        while self._saving is not None:
            self._advance()

    def _advance(self) -> None:
        saving = self._saving
        assert saving is not None
        try:
            if saving.advance():
                self._saving = None
        except OSError as error:
            self._saving = None
            self._give_up(saving.name, saving.step, error)

    def _give_up(self, name: str, step: int, error: OSError) -> None:
        self._saved = None  # the next one is due as before
        if self._ranks.rank == 0:
            self._folder.discard(name)
            log.warning("checkpoint of step %d NOT written: %s", step, error)

    def _snapshot(self, trainer: Trainer, name: str, progress: Progress) -> list[Piece]:
        """Copy what this rank is to write; what it does by itself ends in an agreement."""
        ranks, module, strategy = self._ranks, trainer.lightning_module, trainer.strategy
        averages = [c for c in trainer.callbacks if isinstance(c, WeightAverage)]  # type: ignore[attr-defined]
        folder = self._folder.temporary(name)
        with ranks.together(f"preparing {name}"):
            for average in averages:
                average.put_weights_back(module)
            refuse_poison(module)
            if ranks.rank == 0:
                self._folder.begin(name)
            checkpoint = dump_checkpoint(trainer)
            progress.put_into(checkpoint)
        whole = [average.whole(module) for average in averages]
        if isinstance(strategy, ZeroStrategy):
            states = strategy.collect(checkpoint, folder / STATE)
        else:
            states = [(folder / STATE, checkpoint)] if ranks.rank == 0 else []
        with ranks.together(f"copying {name}"):
            whole = whole if ranks.rank == 0 else []
            copies, averages_copy = self._memory.copy(([state for _, state in states], whole))
            paths = [path for path, _ in states]
            pieces = [Piece(p, c, write_state) for p, c in zip(paths, copies, strict=True)]
            pieces += [Piece(folder / EMA_FILE, copy, save_average) for copy in averages_copy]
            if ranks.rank == 0 and self.recipe is not None:
                pieces.append(Piece(folder / RECIPE, self.recipe, _write_text))
        return pieces


def _write_text(text: str, path: Path) -> None:
    path.write_text(text)


def refuse_poison(module: LightningModule) -> None:
    """Raise where a weight of this rank is not finite: such a checkpoint must not replace one.

    Raises:
        ValueError: One is not.
    """
    weights = [local_tensor(p).detach() for p in module.parameters()]
    if not torch.isfinite(torch.stack([norm.float() for norm in norms(weights)])).all():
        raise ValueError("the weights are not finite")


def _tell_the_job(root: Path) -> None:
    """Write down for slurm/requeue.sh where the run's progress can be seen."""
    folder = os.environ.get("EVA02_AT_JOB")
    if folder is None:
        return
    try:
        (Path(folder) / "checkpoints").write_text(f"{root.absolute()}\n")
    except OSError as error:
        log.warning("faults will be counted without regard to progress: %s", error)
