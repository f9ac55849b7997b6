"""What a person at a terminal, or a reader of a job's log, sees of a run."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer

from datamodules.files import write_atomically
from lightning_modules.training.runs import ENDED

log = logging.getLogger(__name__)


class RunProgress(Callback):
    """Tell what runs, how far it is, how fast, how long it will take, and what to do next.

    On a terminal one line is kept up to date; elsewhere (a SLURM log, a file) a line is written
    every `every_s` seconds, without carriage returns. A line is due at the earliest where the
    trainer logs, so that none costs the device a synchronisation of its own. Rank 0 writes, to the
    error stream. Takes the place of Lightning's progress bar.

    Args:
        every_s: Seconds between two lines of a log; 0 says nothing at all.
    """

    def __init__(self, every_s: float = 60.0) -> None:
        if not 0 <= every_s < math.inf:
            raise ValueError(f"progress.every_s is {every_s}; it must be 0 (silent) or seconds")
        self.every_s = every_s
        self._stream: TextIO | None = None
        self._start = self._last = 0.0
        self._first_step = 0
        self._paused_s = 0.0  # in validation
        self._paused_at = 0.0
        self._line_open = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Only rank 0 speaks."""
        self._stream = sys.stderr if trainer.is_global_zero and self.every_s else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what begins."""
        self._start = self._last = time.monotonic()
        self._paused_s, self._first_step = 0.0, trainer.global_step
        parameters = sum(_num_elements(p) for p in pl_module.parameters())
        ranks = f"{trainer.world_size} process" + ("es" if trainer.world_size > 1 else "")
        total = _total_steps(trainer)
        begin = f"from step {trainer.global_step}" if trainer.global_step else "from the start"
        self._say(
            f"{trainer.default_root_dir}: {type(pl_module).__name__}, {parameters / 1e6:.1f} M "
            f"parameters, {ranks} on {pl_module.device.type}, {trainer.precision}; "
            f"{total:,} steps, {begin}"
            if total
            else f"{trainer.default_root_dir}: {begin}"
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say how far the run is, where it is time."""
        if self._stream is None or (batch_idx + 1) % trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return
        now = time.monotonic()
        if now - self._last < (1.0 if self._stream.isatty() else self.every_s):
            return
        self._last = now
        self._say(self._position(trainer, now), lasting=not self._stream.isatty())

    def _position(self, trainer: Trainer, now: float) -> str:
        step, total = trainer.global_step, _total_steps(trainer)
        parts = [f"step {step:,}" + (f"/{total:,} ({step / total:.0%})" if total else "")]
        parts.append(f"epoch {trainer.current_epoch + 1}")
        for key, text in (("train/loss", "loss {:.4g}"), ("clips_per_s", "{:,.0f} clips/s")):
            if key in trainer.callback_metrics:
                parts.append(text.format(float(trainer.callback_metrics[key])))
        done = step - self._first_step
        if total and done:
            seconds = (now - self._start - self._paused_s) / done * (total - step)
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        return ", ".join(parts)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation does not count as training time."""
        self._paused_at = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what was measured."""
        seconds = time.monotonic() - self._paused_at
        self._paused_s += seconds
        figures = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if figures and not trainer.sanity_checking:
            told = ", ".join(f"{name} {value:.2f}" for name, value in sorted(figures.items()))
            self._say(f"validated after step {trainer.global_step:,} in {seconds:.0f} s: {told}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the run stands and what may come next, and keep it for `eva02-at runs`."""
        run = Path(trainer.default_root_dir)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            ended = {
                "step": trainer.global_step,
                "max_steps": trainer.max_steps,
                "max_epochs": trainer.max_epochs,
            }
            try:
                write_atomically(run / ENDED, json.dumps(ended) + "\n")
            except OSError as error:
                log.warning("%s could not be written: %s", run / ENDED, error)
        self._say(
            f"trained to step {trainer.global_step:,}, epoch {trainer.current_epoch}"
            f"{_figure(trainer)}\nwrote {', '.join(map(str, _written(run)))}\n"
            f"next: {_following(trainer, run)} (to train on: the same `fit` with a larger "
            "--trainer.max_epochs or max_steps)"
        )

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say that nothing is lost, before the reason is told; nothing where nothing began."""
        if not self._start:
            return
        self._say(
            f"ended at step {trainer.global_step:,}; the same command goes on from the newest "
            f"complete checkpoint in {trainer.default_root_dir}"
        )

    def _say(self, text: str, lasting: bool = True) -> None:
        """Write a line; one that does not last is written over by the next."""
        if self._stream is None:
            return
        clear = "\r\033[K" if self._line_open else ""
        self._line_open = not lasting
        if not lasting:  # a line that wraps cannot be written over
            text = text[: shutil.get_terminal_size().columns - 1]
        self._stream.write(clear + text + ("\n" if lasting else ""))
        self._stream.flush()


def _written(run: Path) -> list[Path]:
    """What a run leaves; one shorter than `log_every_n_steps` has no figures."""
    paths = [run / "checkpoints", run / "logs" / "metrics.csv"]
    return [path for path in paths if path.exists()]


def _figure(trainer: Trainer) -> str:
    """The figure that matters: of the last validation, else of the last step that was logged."""
    found = trainer.callback_metrics
    keys = ["val/map_avg", *sorted(key for key in found if key.startswith("val/")), "train/loss"]
    return next((f": {key} {float(found[key]):.4g}" for key in keys if key in found), "")


def _following(trainer: Trainer, run: Path) -> str:
    """The command for what a run has become; one without data to test on is used as it is."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    if data is not None and (not hasattr(data, "eval_split") or data.eval_split("test") is None):
        return f"eva02-at convert --input {run} --output {run / 'model.safetensors'}"
    return f"eva02-at test --config {run / 'config.yaml'} --run_dir={run}"


def _num_elements(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())  # of a partition, under ZeRO 3


def _total_steps(trainer: Trainer) -> int:
    """Steps of the whole run, 0 where nobody knows.

    Lightning's `estimated_stepping_batches` sets loaders up and breaks a restore (issue 20550).
    """
    batches = trainer.num_training_batches
    by_epochs = 0
    if trainer.max_epochs is not None and trainer.max_epochs > 0 and math.isfinite(batches):
        by_epochs = trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches)
    by_steps = trainer.max_steps if trainer.max_steps > 0 else 0
    return min(by_steps, by_epochs) if by_steps and by_epochs else by_steps or by_epochs
