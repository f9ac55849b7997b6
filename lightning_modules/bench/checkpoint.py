"""`eva02-at bench checkpoint`: how long a step waits for a checkpoint, and how long it takes.

The baseline is what a checkpoint was before: written, hashed and made to count while the training
waits. Both are the run's own callback on a real trainer, in turn within one run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.bench.timing import machine
from lightning_modules.training.run.checkpointing import SafeCheckpoints
from lightning_modules.training.run.strategies import ZeroStrategy

_WIDTH = 1024


class _Weights(LightningModule):
    """Square matrices under AdamW: three floats a weight in a checkpoint."""

    def __init__(self, megabytes: float) -> None:
        super().__init__()
        layers = max(1, round(megabytes * 1e6 / (3 * 4 * _WIDTH * _WIDTH)))
        self.model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(layers)))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.model(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-5)


class _Stopwatch(Callback):
    """Times a checkpoint after each step: alternately waited for, and left to the background."""

    def __init__(self, checkpoints: SafeCheckpoints) -> None:
        self.checkpoints = checkpoints
        self.seconds: dict[str, list[float]] = {"waited": [], "stall": [], "background": []}

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        self.checkpoints._finish()
        background = self.checkpoints.background = trainer.global_step % 2 == 0
        began = time.perf_counter()
        self.checkpoints._save(trainer)
        self.seconds["stall" if background else "waited"].append(time.perf_counter() - began)
        if background:
            self.checkpoints._finish()
            self.seconds["background"].append(time.perf_counter() - began)


class _Timed(SafeCheckpoints):
    """The run's callback; when it saves is the stopwatch's affair, after its own end of batch."""

    def __init__(self, folder: str) -> None:
        super().__init__(dirpath=folder, every_minutes=0, keep_last=1, monitor=None)
        self.stopwatch = _Stopwatch(self)

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, *args, **kwargs)
        self.stopwatch.on_train_batch_end(trainer)


def measure(folder: Path, megabytes: float, rounds: int, stage: int | None) -> dict[str, float]:
    """Return medians in seconds, the first of each left out.

    Args:
        folder: Where the checkpoints go.
        megabytes: Size of one checkpoint.
        rounds: Checkpoints of each kind.
        stage: ZeRO stage; None for plain files.
    """
    callback = _Timed(str(folder / "checkpoints"))
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="auto",
            devices=1,
            strategy="auto" if stage is None else ZeroStrategy(stage=stage),
            max_steps=2 * rounds + 2,
            callbacks=[callback],
            default_root_dir=folder,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data: Any = torch.randn(2 * rounds + 2, _WIDTH)
        trainer.fit(_Weights(megabytes), DataLoader(data, batch_size=1))
    return {name: statistics.median(s[1:]) for name, s in callback.stopwatch.seconds.items()}


def main(argv: list[str]) -> int:
    """Run the bench.

    Args:
        argv: Its options.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser("eva02-at bench checkpoint")
    parser.add_argument("--megabytes", type=float, default=600.0, help="of one checkpoint")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--stage", type=int, choices=(1, 2, 3), help="of ZeRO; without: plain files"
    )
    parser.add_argument("--folder", type=Path, help="where to write; a temporary one by default")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        row = measure(Path(folder), args.megabytes, args.rounds, args.stage)
    row["stall_over_waited"] = row["stall"] / row["waited"]
    print(f"one checkpoint of {args.megabytes:.0f} MB, medians of {args.rounds}; {machine()}")
    print(f"  written while the training waits   {row['waited']:8.3f} s")
    print(f"  copied, written in the background  {row['stall']:8.3f} s stall")
    print(f"  until that one is complete         {row['background']:8.3f} s")
    print(f"  stall over waiting                 {row['stall_over_waited']:8.1%}")
    if args.json:
        args.json.write_text(json.dumps(row, indent=2) + "\n")
    return 0
