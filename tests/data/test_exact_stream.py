"""The stream's promise: the same global batches, wherever it stops and on however many ranks."""

import dataclasses
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from datamodules.manifest import Manifest
from datamodules.pretrain import PretrainDataModule

FIELDS = ("video", "tokens", "clip_index", "sample_index", "verb_classes", "noun_classes")


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of cutting a run into pieces: (steps, ranks, workers), one after another."""

    manifest: str
    weights: list[float]
    settings: dict
    pieces: list[tuple[int, int, int]]


@st.composite
def cases(draw, folder: Path):
    """Random data sets, made of the fixture's shards in any number, and random interruptions."""
    manifest = Manifest.load(folder)
    picked = draw(st.lists(st.integers(0, 3), min_size=1, max_size=5))
    path = folder / f"{'-'.join(map(str, picked))}.json"
    chosen = tuple(manifest.shards[k] for k in picked)
    Manifest("", chosen).save(path)
    weight = draw(st.sampled_from([1.0, 0.7, 1.5]))
    lanes, per_lane = draw(st.sampled_from([(1, 3), (2, 1), (4, 1), (2, 2), (6, 1)]))
    size = lanes * per_lane
    if sum(int(weight * shard.num_samples + 0.5) for shard in chosen) < size:
        weight = 2.0
    window = draw(st.sampled_from([None, 2, 5]))
    seed = draw(st.integers(0, 1000))
    worlds = [w for w in (1, 2, 3, 4, 6) if lanes % w == 0]
    pieces = draw(
        st.lists(
            st.tuples(st.integers(1, 9), st.sampled_from(worlds), st.sampled_from([0, 0, 0, 1, 2])),
            min_size=1,
            max_size=3,
        )
    )
    data = {"global_batch_size": size, "lanes": lanes, "shuffle_window": window, "seed": seed}
    return Case(str(path), [weight], data, pieces)


def run(case: Case, rank: int, world: int, workers: int, state: dict | None, num_steps: int):
    """One rank's batches from a state on, at most `num_steps`, to the end of the epoch."""
    module = PretrainDataModule(
        [case.manifest], case.weights, num_frames=2, image_size=16, num_workers=workers,
        **case.settings,
    )  # fmt: skip
    module._rank_and_world_size = lambda: (rank, world)
    if state is not None:
        module.load_state_dict({**module.state_dict(), **state})
    batches = []
    for batch in module.train_dataloader():
        batches.append(batch)
        if len(batches) == num_steps:
            break
    return batches, module.order.num_steps


def test_any_interruption_gives_the_uninterrupted_batches(shards, tmp_path):
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(cases(shutil.copytree(shards, tmp_path / "set")))
    def check(case):
        epoch, samples, size = 3, 0, case.settings["global_batch_size"]
        whole, num_steps = run(case, 0, 1, 0, {"epoch": epoch, "samples": 0}, 10**9)
        later, _ = run(case, 0, 1, 0, {"epoch": epoch + 1, "samples": 0}, 10**9)
        expected = {epoch: whole, epoch + 1: later}
        assert len(whole) == len(later) == num_steps
        for steps, world, workers in case.pieces:
            state = {"epoch": epoch, "samples": samples}
            ranks = [run(case, rank, world, workers, state, steps)[0] for rank in range(world)]
            assert len({len(batches) for batches in ranks}) == 1
            for k, parts in enumerate(zip(*ranks, strict=True)):
                reference = expected[epoch][samples // size + k]
                for name in FIELDS:
                    joined = [getattr(part, name) for part in parts]
                    width = max(t.shape[-1] for t in joined) if name.endswith("classes") else None
                    joined = [widen(t, width) for t in joined]
                    assert torch.equal(torch.cat(joined), widen(getattr(reference, name), width))
                assert [key for part in parts for key in part.keys] == reference.keys
            samples += len(ranks[0]) * size
            if samples == num_steps * size:
                epoch, samples = epoch + 1, 0
                if epoch not in expected:
                    return

    check()


def widen(ids: torch.Tensor, width: int | None) -> torch.Tensor:
    """Pad class ids: each part is as wide as its own longest row."""
    if width is None:
        return ids
    return torch.nn.functional.pad(ids, (0, width - ids.shape[-1]), value=-1)[:, :width]


class Model(LightningModule):
    """Learns next to nothing, and writes the ids of every batch that it trained on."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        line = [self.current_epoch, self.global_step, batch.clip_index.tolist()]
        with (self.folder / f"rank{self.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        return self.weight * batch.video.float().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StopAt(Callback):
    """Saves after a step, then breaks the run off as a signal would."""

    def __init__(self, step: int, path: Path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
            trainer.limit_val_batches = 0


def train(shards, folder: Path, ranks: int, stop: StopAt | None = None, resume: Path | None = None):
    """Train on real processes over gloo; returns the ids of each step's global batch."""
    folder.mkdir()
    trainer = Trainer(
        accelerator="cpu", devices=ranks, strategy="ddp_fork" if ranks > 1 else "auto",
        max_epochs=2, min_epochs=0, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
        callbacks=[stop] if stop else [], default_root_dir=folder,
    )  # fmt: skip
    module = PretrainDataModule(
        [str(shards)], global_batch_size=4, num_frames=1, image_size=16, num_workers=2
    )
    trainer.fit(Model(folder), datamodule=module, ckpt_path=resume)
    logs = [
        [json.loads(line) for line in (folder / f"rank{rank}.jsonl").read_text().splitlines()]
        for rank in range(ranks)
    ]
    steps = []
    for lines in zip(*logs, strict=True):
        assert len({(epoch, step) for epoch, step, _ in lines}) == 1
        steps.append((lines[0][0], [clip for _, _, ids in lines for clip in ids]))
    return steps


@pytest.mark.distributed
def test_a_stopped_run_of_two_ranks_goes_on_with_one_two_and_four(shards, tmp_path):
    whole = train(shards, tmp_path / "whole", 2)
    assert len(whole) == 16
    assert sorted(clip for _, batch in whole[:8] for clip in batch) == [*range(32)]
    path = tmp_path / "stopped.ckpt"
    stop = random.randrange(1, 16)
    told = f"stopped after step {stop}"
    assert train(shards, tmp_path / "stopped", 2, stop=StopAt(stop, path)) == whole[:stop], told
    for ranks in (1, 2, 4):
        assert train(shards, tmp_path / f"on{ranks}", ranks, resume=path) == whole[stop:], told
