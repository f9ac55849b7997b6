"""The order of samples: complete, even, and the same however it is cut."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.stream.order import (
    FULL_SHUFFLE_LIMIT,
    LARGE_WINDOW,
    StreamOrder,
    keyed_hash,
    keyed_permutation,
)


def epoch_pairs(order, epoch=0):
    tables = order.epoch(epoch)
    return [
        (int(s), int(r))
        for step in range(order.num_steps)
        for slots in [tables.batch(step)]
        for s, r in zip(slots.shard, slots.row, strict=True)
    ]


@st.composite
def orders(draw):
    counts = draw(st.lists(st.integers(0, 30), min_size=1, max_size=8))
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    per_lane = draw(st.integers(1, 3))
    window = draw(st.sampled_from([None, 1, 3, 8]))
    if sum(counts) < lanes * per_lane:
        counts.append(lanes * per_lane)
    return StreamOrder(
        counts,
        global_batch_size=lanes * per_lane,
        seed=draw(st.integers(0, 2**40)),
        lanes=lanes,
        window=window,
    )


@settings(max_examples=150, deadline=None)
@given(orders(), st.integers(0, 5))
def test_no_sample_twice_and_none_missing_but_the_tail(order, epoch):
    pairs = epoch_pairs(order, epoch)
    assert len(set(pairs)) == len(pairs) == order.num_samples - order.num_dropped
    assert order.num_dropped < order.global_batch_size
    assert all(0 <= row < order.counts[shard] for shard, row in pairs)


@settings(max_examples=150, deadline=None)
@given(orders(), st.data())
def test_parts_concatenate_to_the_global_batch(order, data):
    num_parts = data.draw(
        st.sampled_from([p for p in range(1, order.lanes + 1) if order.lanes % p == 0])
    )
    step = data.draw(st.integers(0, order.num_steps - 1))
    whole = order.epoch(1).batch(step)
    # fresh tables for each part, visited in any order: nothing depends on history
    parts = [order.epoch(1).batch(step, part, num_parts) for part in range(num_parts)]
    for name in ("shard", "row", "sample_index", "lane", "position"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(joined, getattr(whole, name))
    begin = step * order.global_batch_size
    assert whole.sample_index.tolist() == [*range(begin, begin + order.global_batch_size)]


def test_epochs_seeds_and_windows_differ():
    def make(**kwargs):
        return StreamOrder([50, 50], global_batch_size=10, **{"seed": 1, **kwargs})

    first = epoch_pairs(make())
    assert epoch_pairs(make()) == first
    assert epoch_pairs(make(), epoch=1) != first
    assert epoch_pairs(make(seed=2)) != first
    assert epoch_pairs(make(window=7)) != first


def test_weights_take_every_sample_equally_often_over_epochs():
    order = StreamOrder([10, 8], global_batch_size=13, weights=[0.5, 1.0], lanes=13)
    seen = [p for epoch in range(2) for p in epoch_pairs(order, epoch)]
    assert sorted(p for p in seen if p[0] == 0) == [(0, row) for row in range(10)]
    assert sorted(p for p in seen if p[0] == 1) == sorted([(1, row) for row in range(8)] * 2)
    twice = StreamOrder([4], global_batch_size=8, weights=[2.0])
    assert sorted(epoch_pairs(twice)) == sorted([(0, row) for row in range(4)] * 2)


def test_substitutes_follow_in_the_lane_and_wrap():
    order = StreamOrder([12], global_batch_size=4, lanes=2, window=3)
    tables = order.epoch(0)
    lane = np.array([1])
    walk = [tables.locate(lane, np.array([k]))[1][0] for k in range(7)]
    assert walk[6] == walk[0] and len(set(walk[:6])) == 6


def test_permutation_is_frozen():
    """The order of runs that are under way must not change with a library or with this code."""
    assert keyed_hash(1, 2, 3) == 0xD0734750FDE362B3
    assert keyed_permutation(8, 5).tolist() == [1, 4, 7, 3, 6, 2, 0, 5]
    large = keyed_permutation(1 << 20, 5).astype("<i8").tobytes()  # the lowest bits decide here
    assert hashlib.sha256(large).hexdigest()[:16] == "2086b4a287a0cd17"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "f51d8096446ee04d"),
        ({"window": 3}, "d891321ab435a994"),
        ({"window": 5, "lanes": 2}, "850b7fb85f5a0261"),
        ({"weights": [1.5, 0.5, 1.0]}, "51a046ca518ded7c"),
    ],
)
def test_orders_are_frozen(options, expected):
    """As above: a checkpoint's position means these samples, for ever."""
    order = StreamOrder([17, 5, 8], global_batch_size=4, seed=3, **options)
    pairs = [epoch_pairs(order, epoch) for epoch in range(3)]
    assert hashlib.sha256(repr(pairs).encode()).hexdigest()[:16] == expected


def test_defaults():
    plain = StreamOrder([9, 4], global_batch_size=4)
    assert epoch_pairs(plain) == epoch_pairs(StreamOrder([9, 4], global_batch_size=4, seed=0))
    assert plain.counts.dtype == plain.taken.dtype == np.int64  # products of rows and lanes
    small = np.array([100, 100], dtype=np.int8)  # whose sum it could not hold
    assert StreamOrder(small, global_batch_size=4).num_samples == 200


@pytest.mark.parametrize(
    ("batch", "lanes"), [(7, 7), (1024, 1024), (1031, 1), (2049, 683), (3 * 1031, 3), (1536, 768)]
)
def test_lanes_are_the_largest_divisor_up_to_1024(batch, lanes):
    assert StreamOrder([batch], global_batch_size=batch).lanes == lanes


@pytest.mark.parametrize(
    ("more", "window"), [(-1, FULL_SHUFFLE_LIMIT - 1), (0, FULL_SHUFFLE_LIMIT), (1, LARGE_WINDOW)]
)
def test_a_million_samples_are_shuffled_as_a_whole(more, window):
    order = StreamOrder([FULL_SHUFFLE_LIMIT + more], global_batch_size=4)
    assert order.window == window


def test_a_shard_may_have_no_weight_but_not_a_negative_one():
    order = StreamOrder([4, 4], global_batch_size=4, weights=[0, 1])
    assert {shard for shard, _ in epoch_pairs(order)} == {1}
    for weights in ([1.0], [1.0, -0.5], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match=r"^weights must be one number >= 0 for each shard$"):
            StreamOrder([4, 4], global_batch_size=4, weights=weights)


@pytest.mark.parametrize("step", [-1, 3])
def test_a_step_outside_the_epoch_is_an_error(step):
    epoch = StreamOrder([12], global_batch_size=4).epoch(0)
    assert len(epoch.batch(2)) == 4
    with pytest.raises(IndexError, match=f"step {step} of an epoch of 3"):
        epoch.batch(step)


def test_each_window_is_permuted_once(monkeypatch):
    """A permutation of 4,096 for every sample would take longer than to decode it."""
    asked = []

    def counting(size, *key):
        asked.append(key)
        return keyed_permutation(size, *key)

    monkeypatch.setattr("datamodules.stream.order.keyed_permutation", counting)
    epoch_pairs(StreamOrder([24], global_batch_size=4, lanes=2, window=6))
    assert len(asked) == len(set(asked)) == 1 + 2 * 2  # the shards', and two windows a lane


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="fewer than one global batch"):
        StreamOrder([3], global_batch_size=4)
    with pytest.raises(ValueError, match="lanes=3 does not divide"):
        StreamOrder([30], global_batch_size=4, lanes=3)
    with pytest.raises(ValueError, match="cannot share 4 lanes evenly"):
        StreamOrder([30], global_batch_size=4).epoch(0).batch(0, 0, 3)
    with pytest.raises(ValueError, match="at least 1"):
        StreamOrder([30], global_batch_size=0)
