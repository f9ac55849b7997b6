"""How fast a run goes and what it waits for, to the loggers and the progress bar."""

from __future__ import annotations

import resource
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.models import DualEncoder
from lightning_modules.training.monitor.flops import pair_flops, peak_tflops
from lightning_modules.training.run.private import gradients_pending


class ThroughputMonitor(Callback):
    """Log speed, waiting, memory and learning rate over each window of `log_every_n_steps`.

    Logged under `speed/`: clips and video tokens a second over all ranks; `data_wait`, the share
    of the time in which the trainer waited for its next batch (rank 0's; the GPU may still have
    been busy with the last one); `mfu`, FLOPs of the model (three forward passes a pair; none for
    recomputation) over the device's peak, where that is known; `memory_gib`, the peak of this
    device or, on CPU, of this process. Validation and checkpoints are left out of the window.
    """

    def __init__(self) -> None:
        self._window_start = self._batch_end = time.perf_counter()
        self._waited_s = 0.0
        self._clips = 0
        self._lr = 0.0  # of the step in progress: by its end the schedule has gone on

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the first window."""
        self._reset()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start anew: the window would hold the validation's time."""
        self._reset()

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch has come: what has passed since the last one's end was waiting."""
        self._waited_s += time.perf_counter() - self._batch_end
        self._lr = max(group["lr"] for group in trainer.optimizers[0].param_groups)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; log where the loggers write a row, at the end of a whole step."""
        self._clips += len(batch) * trainer.world_size
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and not gradients_pending(trainer) and trainer.global_step % every == 0:
            figures = self._figures(trainer, pl_module, batch)
            pl_module.log_dict({f"speed/{k}": v for k, v in figures.items()}, batch_size=1)
            pl_module.log(
                "clips_per_s", figures["clips_per_s"], prog_bar=True, logger=False, batch_size=1
            )
            self._reset()
        self._batch_end = time.perf_counter()

    def _figures(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any
    ) -> dict[str, float]:
        seconds = time.perf_counter() - self._window_start
        figures = {
            "clips_per_s": self._clips / seconds,
            "data_wait": self._waited_s / seconds,
            "memory_gib": _peak_memory_bytes() / 2**30,
            "lr": self._lr,
        }
        model = getattr(pl_module, "model", None)
        if isinstance(model, DualEncoder):
            vision = model.config.vision
            tokens = 1 + vision.num_frames * vision.num_patches
            figures["tokens_per_s"] = figures["clips_per_s"] * tokens
            peak = torch.cuda.is_available() and peak_tflops(torch.cuda.get_device_name())
            if peak:
                flops = 3 * pair_flops(model.config, batch.tokens.shape[1]) * figures["clips_per_s"]
                figures["mfu"] = flops / (peak * 1e12 * trainer.world_size)
        return figures

    def _reset(self) -> None:
        self._window_start = self._batch_end = time.perf_counter()
        self._waited_s = 0.0
        self._clips = 0


def _peak_memory_bytes() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
