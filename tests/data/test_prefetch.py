"""What is fetched ahead: the order's own needs, as far as the cache holds them."""

import multiprocessing
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning import LightningModule, Trainer
from test_remote import batches, server

from datamodules.manifest import Manifest
from datamodules.pretrain import PretrainDataModule
from datamodules.stream.order import StreamOrder
from datamodules.stream.prefetch import Upcoming

__all__ = ["server"]


def make_order(counts, lanes=4, window=None, seed=0, weights=None):
    return StreamOrder(
        counts, global_batch_size=2 * lanes, lanes=lanes, window=window, seed=seed, weights=weights
    )


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda c: sum(c) >= 16),
    st.sampled_from([None, 1, 3, 8]),
    st.integers(0, 5),
    st.sampled_from([(0, 4), (0, 2), (2, 4), (3, 4)]),
    st.booleans(),
)
def test_needs_are_what_batches_read(counts, window, seed, ends, half):
    weights = [0.5] * len(counts) if half and sum(counts) >= 40 else None
    order = make_order(counts, window=window, seed=seed, weights=weights)
    epoch, lanes = order.epoch(seed), range(*ends)
    read: dict[int, set[int]] = {}
    for step in range(order.num_steps):
        slots = epoch.batch(step)
        here = np.isin(slots.lane, list(lanes))
        read[step] = set(slots.shard[here].tolist())
    covered = {step: set() for step in read}
    for first, end, shards in epoch.needs(lanes):
        for step in range(first, end):
            covered[step] |= set(shards.tolist())
    assert all(read[step] <= covered[step] for step in read)
    # nothing is named that nobody reads
    assert set().union(*covered.values()) == set().union(*read.values())


def test_a_whole_epoch_is_named_by_first_use():
    order = make_order([10] * 6, seed=3)
    ((first, end, shards),) = order.epoch(1).needs(range(4))
    assert (first, end) == (0, order.num_steps)
    seen: dict[int, None] = {}
    for step in range(order.num_steps):
        slots = order.epoch(1).batch(step)
        for shard in slots.shard[np.lexsort([slots.lane, slots.position])].tolist():
            seen[shard] = None
    assert shards.tolist() == list(seen)


def test_upcoming_keeps_to_the_cache_and_to_the_number_ahead():
    order = make_order([8] * 16, lanes=1, window=16)  # two shards a window, none twice
    needs = [shards.tolist() for _, _, shards in order.epoch(0).needs(range(1))]
    flat = [shard for shards in needs for shard in shards]
    sizes = [100] * 16
    assert Upcoming(order, range(1), sizes, 500).after(0, 0) == flat[:5]
    assert Upcoming(order, range(1), sizes, 500).after(0, 8) == flat[2:7]
    assert Upcoming(order, range(1), sizes, 10**9, 3).after(0, 0) == flat[:5]
    last = Upcoming(order, range(1), sizes, 10**9).after(0, order.num_steps - 1)
    assert last[:2] == flat[-2:] and sorted(last) == list(range(16))  # the next epoch follows
    assert Upcoming(order, range(1), sizes, 500).in_use(0, 0) == set(flat[:2])


def wait_until(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_shards_are_there_before_they_are_asked_for(shards, server, tmp_path):
    url, asked = server
    module = PretrainDataModule(
        [url + "/manifest.json"],
        global_batch_size=4,
        num_frames=2,
        image_size=32,
        num_workers=0,
        cache_dir=str(tmp_path),
    )
    loader = iter(module.train_dataloader())
    first = next(loader)
    files = [name for shard in Manifest.load(shards).shards for name in (shard.name, shard.index)]
    wait_until(lambda: sorted(path[1:] for path in asked if "shard" in path) == sorted(files))
    rest = list(loader)
    assert len([path for path in asked if "shard" in path]) == len(files)
    module.teardown("fit")
    assert list(tmp_path.glob("*.plan")) == []
    expected = batches(str(shards))
    assert [batch.keys for batch in (first, *rest)] == [batch.keys for batch in expected]


class Reader(LightningModule):
    """Trains nothing; notes what it is given."""

    def __init__(self):
        super().__init__()
        self.keys = []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch, _):
        self.keys.append(batch.keys)
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_trainers_run_fetches_ahead_and_leaves_no_process(shards, server, tmp_path):
    runs = []
    before = multiprocessing.active_children()
    for place in (str(shards), server[0] + "/manifest.json"):
        module = PretrainDataModule(
            [place],
            global_batch_size=4,
            num_frames=2,
            image_size=32,
            num_workers=1,
            cache_dir=str(tmp_path),
        )
        reader = Reader()
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        Trainer(max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet).fit(
            reader, datamodule=module
        )
        runs.append(reader.keys)
        assert [p for p in multiprocessing.active_children() if p not in before] == []
    assert runs[0] == runs[1]
    names = [path[1:] for path in server[1] if "shard" in path]
    assert len(names) == len(set(names))  # of two epochs, each file once


@pytest.mark.parametrize("prefetch_shards", [0, None])
def test_a_cache_for_one_shard_alone_still_gives_every_batch(
    shards, server, tmp_path, prefetch_shards
):
    size = max(shard.num_bytes for shard in Manifest.load(shards).shards)
    found = batches(
        server[0] + "/manifest.json",
        cache_dir=str(tmp_path),
        cache_gb=1.5 * size / 1e9,
        prefetch_shards=prefetch_shards,
    )
    assert [b.keys for b in found] == [b.keys for b in batches(str(shards))]
    kept = sum(path.stat().st_size for path in tmp_path.iterdir() if not path.suffix)
    assert kept <= 1.5 * size
