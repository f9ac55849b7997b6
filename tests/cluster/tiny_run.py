"""A tiny training run with everything a real one has: ranks, workers, validation, checkpoints.

Each rank appends one line a step to `steps-RANK.jsonl` in the run's folder: the step, the exact
loss, and the ids of its samples. A run that stopped and went on appends to the same files.
"""

import functools
import importlib
import json
import logging
import os
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, Dataset

from datamodules.stream.loader import PlaceLoader
from lightning_modules.training.monitor.csv_log import AppendingCSVLogger
from lightning_modules.training.monitor.health import FiniteGuard
from lightning_modules.training.optim.ema import WeightAverage
from lightning_modules.training.optim.optimizers import OptimizerConfig, configure_optimizers
from lightning_modules.training.run.checkpointing import SafeCheckpoints
from lightning_modules.training.run.ownership import RunOwner
from lightning_modules.training.run.seeding import StepSeed
from lightning_modules.training.run.settings import SameSettings
from lightning_modules.training.run.signals import EXIT_REQUEUE, RunStopped
from lightning_modules.training.run.strategies import ZeroStrategy
from lightning_modules.training.run.watchdog import StallWatchdog
from lightning_modules.training.verbs import run_verb

GLOBAL_BATCH, STEPS_PER_EPOCH = 8, 5


@dataclass
class TinyBatch:
    x: torch.Tensor
    ids: torch.Tensor
    keys: list[str]


def collate(rows) -> TinyBatch:
    ids = [sample for _, sample in rows]
    return TinyBatch(
        torch.stack([x for x, _ in rows]), torch.tensor(ids), [f"clip{i}" for i in ids]
    )


class Samples(Dataset):
    def __getitem__(self, index):
        epoch, sample = index
        generator = torch.Generator().manual_seed(1000 * epoch + sample)
        return torch.randn(12, generator=generator), 1000 * epoch + sample

    def __len__(self) -> int:
        return GLOBAL_BATCH * STEPS_PER_EPOCH


class Batches(Dataset):
    def __getitem__(self, place):
        return collate([Samples()[index] for index in place])


class Order:
    """Batches of this rank as a function of (epoch, step); starts where the run stopped."""

    def __init__(self, data: "TinyData") -> None:
        self.data = data

    def __len__(self) -> int:
        return STEPS_PER_EPOCH

    def __iter__(self):
        epoch, first = self.data.take_position()
        rank, world = self.data.trainer.global_rank, self.data.trainer.world_size
        size = GLOBAL_BATCH // world
        for step in range(first, STEPS_PER_EPOCH):
            start = step * GLOBAL_BATCH + rank * size
            yield [(epoch, start + i) for i in range(size)]


class TinyData(LightningDataModule):
    batches_per_epoch = STEPS_PER_EPOCH

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.workers = workers
        self.position: tuple[int, int] | None = None

    def take_position(self) -> tuple[int, int]:
        position, self.position = self.position, None
        return position or (self.trainer.current_epoch, 0)

    def state_dict(self):
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.processed
        epoch, step = divmod(done, STEPS_PER_EPOCH)
        return {"epoch": epoch, "samples": step * GLOBAL_BATCH}

    def load_state_dict(self, state):
        self.position = (state["epoch"], state["samples"] // GLOBAL_BATCH)

    def train_dataloader(self):
        return PlaceLoader(
            Batches(), lambda: Order(self), STEPS_PER_EPOCH, num_workers=self.workers
        )

    def val_dataloader(self):
        batches = [[(9, 0), (9, 1)], [(9, 2), (9, 3)]]
        return DataLoader(Samples(), batch_sampler=batches, collate_fn=collate)

    test_dataloader = val_dataloader


class TinyModule(LightningModule):
    def __init__(self, folder: Path, optimizer: OptimizerConfig, dropout: float, poison) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(12, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 12)
        )
        self.config, self.folder = optimizer, folder
        self.poison = poison or {"steps": []}  # {"steps": [...], "rank": r}

    def configure_optimizers(self):
        return configure_optimizers(self, self.model, self.config)

    def training_step(self, batch, batch_idx):
        x, ids = batch.x.to(self.model[0].weight.dtype), batch.ids
        if self.trainer.global_step in self.poison["steps"] and (
            self.global_rank == self.poison["rank"]
        ):
            x = x * float("nan")
        loss = (self.model(x) - x.roll(1, 1)).float().square().mean()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        line = {"step": self.trainer.global_step, "loss": mean.item(), "ids": ids.tolist()}
        with (self.folder / f"steps-{self.global_rank}.jsonl").open("a") as file:
            print(json.dumps(line), file=file)
        self.log("train/loss", loss.detach(), batch_size=len(ids))
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val/map_avg", self.score(batch), sync_dist=True, batch_size=len(batch.ids))

    def test_step(self, batch, batch_idx):
        self.log("test/map_avg", self.score(batch), sync_dist=True, batch_size=len(batch.ids))

    def score(self, batch):
        x = batch.x.to(self.model[0].weight.dtype)
        return -(self.model(x) - x).float().square().mean()

    def on_validation_epoch_end(self):
        with (self.folder / f"validations-{self.global_rank}.jsonl").open("a") as file:
            print(json.dumps({"step": self.trainer.global_step}), file=file)


class Trouble(Callback):
    """Send a signal to a rank at a given place, or wait long enough to be killed."""

    def __init__(self, at=None, where="train", rank=0, signum=signal.SIGTERM, pause_s=0.0):
        self.at, self.where, self.rank, self.signum = at, where, rank, signum
        self.pause_s = pause_s

    def _strike(self, trainer, place):
        if (place, trainer.global_step, trainer.global_rank) == (self.where, self.at, self.rank):
            os.kill(os.getpid(), self.signum)

    def on_fit_start(self, trainer, module):
        """`load`: this rank hangs before the first step; `fail`: it fails, and the others hang."""
        mine = trainer.global_rank == self.rank
        if self.where == "fail" and mine:
            raise KeyError("on fire")
        if (self.where, mine) in (("load", True), ("fail", False)):
            time.sleep(1000)

    on_test_start = on_fit_start

    def on_train_start(self, trainer, module):
        """`call:MODULE.NAME`: that call fails on this rank from step `at` until it has once."""
        if self.where.startswith("call:") and trainer.global_rank == self.rank:
            *owner, name = self.where.removeprefix("call:").split(".")
            place = importlib.import_module(f"lightning_modules.training.run.{owner[0]}")
            for inner in owner[1:]:
                place = getattr(place, inner)
            call = getattr(place, name)

            @functools.wraps(call)
            def failing(*args, **kwargs):
                if self.at is not None and trainer.global_step >= self.at:
                    self.at = None
                    raise KeyError("on fire")  # no kind of error that anybody counts on
                return call(*args, **kwargs)

            setattr(place, name, failing)

    def on_train_batch_start(self, trainer, module, *args):
        """`hold`: wait before step `at` until the test makes the file `go`."""
        time.sleep(self.pause_s)
        if self.where == "hold" and trainer.global_step == self.at:
            (module.folder / "held").touch()
            while not (module.folder / "go").exists():
                time.sleep(0.01)
        self._strike(trainer, "train")

    def on_train_batch_end(self, trainer, module, *args):
        """`weights`: something spoils a weight after step `at`; `should_stop`: early stopping."""
        if self.where == "should_stop" and trainer.global_step == self.at:
            trainer.should_stop = True
        if self.where == "weights" and trainer.global_step == self.at:
            module.model[0].weight.data[0, 0] = float("inf")

    def on_validation_batch_start(self, trainer, *args):
        self._strike(trainer, "validation")

    def on_save_checkpoint(self, trainer, *args):
        self._strike(trainer, "save")


def strategy_of(name: str, world: int):
    if name.startswith("zero"):
        return ZeroStrategy(stage=int(name[4]))
    return "ddp" if world > 1 else "auto"


def main(
    folder: str,
    strategy: str = "ddp",
    epochs: int = 3,
    precision: str = "32-true",
    workers: int = 0,
    dropout: float = 0.0,
    optimizer: dict | None = None,
    checkpoints: dict | None = None,
    trouble: dict | None = None,
    ema: bool = False,
    accumulate: int = 1,
    poison: dict | None = None,
    guard: dict | None = None,
    stall_s: float | list[float] = 0.0,  # a list: of each rank
    csv: bool = False,
    clip: float = 0.3,
    trainer_options: dict | None = None,
    owner: dict | None = None,
    on_change: str = "extend",
    recipe: str | None = None,
    verb: str = "fit",
    ckpt_path: str | None = None,
) -> int:
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    world = int(os.environ.get("SLURM_NTASKS") or os.environ["WORLD_SIZE"])
    nodes = int(os.environ.get("SLURM_NNODES", 1))
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    safe = SafeCheckpoints(**{"every_n_steps": 1, "keep_last": 3, **(checkpoints or {})})
    safe.recipe = recipe
    callbacks = [RunOwner(**(owner or {})), StepSeed(seed=5), safe, SameSettings(on_change)]
    callbacks += [Trouble(**(trouble or {}))]
    callbacks += [WeightAverage(decay=0.5)] if ema else []
    callbacks += [FiniteGuard(**(guard or {}))]
    if isinstance(stall_s, list):
        stall_s = stall_s[int(os.environ.get("SLURM_PROCID") or os.environ["RANK"])]
    callbacks += [StallWatchdog(stall_s)] if stall_s else []
    trainer = Trainer(
        accelerator="cpu",
        devices=world // nodes,
        num_nodes=nodes,
        strategy=strategy_of(strategy, world),
        precision=precision,
        max_epochs=epochs,
        default_root_dir=folder,
        logger=AppendingCSVLogger(folder) if csv else False,
        log_every_n_steps=1,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip or None,
        **(trainer_options or {}),
    )
    config = OptimizerConfig(
        **{"lr": 0.02, "schedule": "cosine", "warmup_epochs": 0.4, **(optimizer or {})}
    )
    module = TinyModule(path, config, dropout, poison)
    if verb != "fit":
        return run_verb(verb, as_cli(trainer, module, TinyData(workers), ckpt_path))
    store = path / "checkpoints"
    resume = str(store) if any(store.glob("step-*")) else None
    try:
        trainer.fit(module, TinyData(workers), ckpt_path=resume)
    except RunStopped:
        return EXIT_REQUEUE
    return 0


def as_cli(trainer, module, data, ckpt_path):
    """What a verb reads of a parsed recipe."""
    config = SimpleNamespace(
        ckpt_path=ckpt_path,
        run_dir=trainer.default_root_dir,
        checkpoints=SimpleNamespace(dirpath=None),
        data=SimpleNamespace(as_dict=lambda: {"class_path": "tiny"}),
    )
    return SimpleNamespace(
        trainer=trainer, model=module, datamodule=data, config=config, kept=lambda: "tiny: run\n"
    )


def steps(folder: Path, rank: int = 0) -> list[dict]:
    return [json.loads(x) for x in (folder / f"steps-{rank}.jsonl").read_text().splitlines()]


def validations(folder: Path, rank: int = 0) -> list[int]:
    lines = (folder / f"validations-{rank}.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


if __name__ == "__main__":  # as a SLURM task: `fit`, Lightning's words, then our options as JSON
    import sys

    sys.exit(main(**json.loads(sys.argv[-1])))
