"""The order of training samples: a pure function, with no history and no state of its own.

Who trains on what at step s follows from (seed, epoch, s, the shards' sample counts, the global
batch size) and from nothing else. The number of ranks and loader workers only cuts the same global
batch into more or fewer pieces, so a run may stop anywhere and continue on another number of ranks.

One epoch of 3 shards (4, 3 and 5 samples), a global batch of G = 4 and L = 2 lanes:

    shards permuted      [ C0 C1 C2 C3 C4 | A0 A1 A2 A3 | B0 B1 B2 ]      12 samples = 3 steps of 4
    cut into lanes       [ C0 C1 C2 C3 C4   A0 | A1 A2 A3   B0 B1 B2 ]    6 = 3 steps x G/L each
    permuted in windows  [ C2 C0 C1 | A0 C4 C3 ][ A3 A1 A2 | B1 B0 B2 ]   window = 3
    step 0 takes G/L = 2 from each lane:  C2 C0 | A3 A1
    step 1                                C1 A0 | A2 B1
    step 2                                C4 C3 | B0 B2

With two ranks, rank 0 reads lane 0 and rank 1 lane 1. A data set that fits in one window is
permuted as a whole before it is cut: small data sets get a full shuffle, large ones keep each lane
within a few consecutive shards, so that a rank has few files open and remote reads stay local.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
MAX_LANES = 1024
FULL_SHUFFLE_LIMIT = 1 << 20  # 8 MB of table and about 0.1 s an epoch
LARGE_WINDOW = 4096


def keyed_hash(*key: int) -> int:
    """Hash integers to 64 bits with SplitMix64: the same on every machine and numpy version."""
    state = 0
    for word in key:
        state = _mix_int((state ^ (word & _WORD)) + _GOLDEN)
    return state


def keyed_permutation(size: int, *key: int) -> IntArray:
    """Return a permutation of range(size) that is a pure function of the key.

    numpy's own generators promise the same raw bits in later versions but not the same
    permutation; sorting hashes does not depend on them.
    """
    with np.errstate(over="ignore"):
        z = np.arange(1, size + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
        z += np.uint64(keyed_hash(*key))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return np.argsort(z, kind="stable")


def _mix_int(z: int) -> int:
    z &= _WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _WORD
    return z ^ (z >> 31)


@dataclass(frozen=True)
class Slots:
    """A part of one global batch: B places, each with the sample that belongs there.

    Attributes:
        lane: (B,) lane of each place.
        position: (B,) position within the lane.
        sample_index: (B,) number of the place within the epoch; seeds augmentation and texts.
        shard: (B,) shard number of the sample.
        row: (B,) row of the sample within its shard.
    """

    lane: IntArray
    position: IntArray
    sample_index: IntArray
    shard: IntArray
    row: IntArray

    def __len__(self) -> int:
        return len(self.lane)


class StreamOrder:
    """The order of every epoch over a list of shards.

    Args:
        counts: Samples in each shard.
        global_batch_size: G, samples a step over all ranks.
        seed: Seed of the permutations.
        lanes: L, canonical streams; must divide G, and the number of ranks must divide it. The
            default is the largest divisor of G up to 1,024.
        window: Samples of a lane that are permuted together. The default permutes data sets of
            up to about a million samples as a whole, larger ones in windows of 4,096.
        weights: How often each shard is seen in an epoch, 1 by default. With a fraction, an epoch
            takes that share of the shard's samples and the next epoch goes on with the following
            ones.

    Raises:
        ValueError: The sizes do not fit each other.
    """

    def __init__(
        self,
        counts: Sequence[int],
        *,
        global_batch_size: int,
        seed: int = 0,
        lanes: int | None = None,
        window: int | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        self.counts = np.asarray(counts, dtype=np.int64)
        self.global_batch_size = global_batch_size
        self.seed = seed
        if global_batch_size < 1:
            raise ValueError(f"global_batch_size is {global_batch_size}; it must be at least 1")
        self.lanes = lanes or _largest_divisor(global_batch_size, MAX_LANES)
        if global_batch_size % self.lanes:
            raise ValueError(f"lanes={lanes} does not divide global_batch_size={global_batch_size}")
        share = np.ones(len(self.counts)) if weights is None else np.asarray(weights, dtype=float)
        if len(share) != len(self.counts) or (share < 0).any():
            raise ValueError("weights must be one number >= 0 for each shard")
        self.taken = np.floor(share * self.counts + 0.5).astype(np.int64)
        self.num_samples = int(self.taken.sum())
        self.num_steps = self.num_samples // global_batch_size
        if self.num_steps == 0:
            raise ValueError(
                f"an epoch has {self.num_samples} samples, fewer than one global batch of "
                f"{global_batch_size}; lower global_batch_size or add data"
            )
        small = self.num_samples <= FULL_SHUFFLE_LIMIT
        self.window = window or (self.num_samples if small else LARGE_WINDOW)

    @property
    def num_dropped(self) -> int:
        """Samples of an epoch that do not fill a last global batch; other ones in each epoch."""
        return self.num_samples - self.num_steps * self.global_batch_size

    def check_parts(self, num_parts: int) -> None:
        """Refuse a number of parts (ranks x micro-batches) that cannot share a global batch."""
        if self.lanes % num_parts:
            raise ValueError(
                f"{num_parts} ranks x micro-batches cannot share {self.lanes} lanes evenly: they "
                f"must divide `lanes`, and that global_batch_size={self.global_batch_size}"
            )

    def epoch(self, epoch: int) -> EpochOrder:
        """Build the tables of one epoch."""
        return EpochOrder(self, epoch)


class EpochOrder:
    """The order of one epoch: tables of the size of the shard list, and the windows in use."""

    def __init__(self, order: StreamOrder, epoch: int) -> None:
        self.order = order
        self.number = epoch
        self._shards = keyed_permutation(len(order.counts), order.seed, epoch, 0)
        taken = order.taken[self._shards]
        self._starts = np.concatenate([[0], np.cumsum(taken)])
        self._first_rows = epoch * taken % np.maximum(order.counts[self._shards], 1)
        self._lane_length = order.num_steps * (order.global_batch_size // order.lanes)
        self._whole: IntArray | None = None
        if order.window >= order.num_samples:
            self._whole = keyed_permutation(order.num_samples, order.seed, epoch, 1)
        self._windows: dict[int, tuple[int, IntArray]] = {}  # lane -> (block, permutation)

    def batch(self, step: int, part: int = 0, num_parts: int = 1) -> Slots:
        """Return one part of the global batch of a step.

        Args:
            step: 0 .. num_steps - 1.
            part: Which of the equal consecutive parts: rank x micro_batches + micro_batch.
            num_parts: How many there are; the whole batch by default.
        """
        order = self.order
        order.check_parts(num_parts)
        if not 0 <= step < order.num_steps:
            raise IndexError(f"step {step} of an epoch of {order.num_steps}")
        share, lanes_here = order.global_batch_size // order.lanes, order.lanes // num_parts
        lanes = np.arange(part * lanes_here, (part + 1) * lanes_here)
        lane, offset = np.repeat(lanes, share), np.tile(np.arange(share), lanes_here)
        position = step * share + offset
        shard, row = self.locate(lane, position)
        sample_index = step * order.global_batch_size + lane * share + offset
        return Slots(lane, position, sample_index, shard, row)

    def needs(self, lanes: range) -> Iterator[tuple[int, int, IntArray]]:
        """Say which shards a run of lanes reads, and when.

        Substitutes for damaged samples, which may lie in the window after, do not count.

        Args:
            lanes: The lanes, as a rank or a node has them.

        Yields:
            For each window, in time order: the first step that reads from it, the step after its
            last, and its shards, in the order of their first use where it is the whole epoch.
        """
        order, length = self.order, self._lane_length
        share = order.global_batch_size // order.lanes
        firsts = np.asarray(lanes, dtype=np.int64) * length
        if self._whole is not None:
            # (position, lane): row by row in time order
            places = self._whole[firsts + np.arange(length)[:, None]].ravel()
            found, first_use = np.unique(
                np.searchsorted(self._starts, places, side="right") - 1, return_index=True
            )
            yield 0, order.num_steps, self._shards[found[np.argsort(first_use)]]
            return
        for begin in range(0, length, order.window):
            end = min(begin + order.window, length)
            low = np.searchsorted(self._starts, firsts + begin, side="right") - 1
            high = np.searchsorted(self._starts, firsts + end - 1, side="right")
            # in the list of shards, not by number; an empty one is read by nobody
            found = np.unique(
                np.concatenate([np.arange(*ends) for ends in zip(low, high, strict=True)])
            )
            shards = self._shards[found[np.diff(self._starts)[found] > 0]]
            yield begin // share, -(-end // share), shards

    @property
    def lane_length(self) -> int:
        """Samples of a lane in this epoch."""
        return self._lane_length

    def locate(self, lane: IntArray, position: IntArray) -> tuple[IntArray, IntArray]:
        """Return shard and row of the samples at positions of lanes.

        Positions wrap at the lane's end, so that position + k is the k-th substitute of a
        damaged sample.
        """
        position = position % self._lane_length
        place = lane * self._lane_length + position
        if self._whole is not None:
            place = self._whole[place]
        else:
            place = self._shuffle_windows(lane, position)
        found = np.searchsorted(self._starts, place, side="right") - 1
        shard = self._shards[found]
        row = (self._first_rows[found] + place - self._starts[found]) % self.order.counts[shard]
        return shard, row

    def _shuffle_windows(self, lane: IntArray, position: IntArray) -> IntArray:
        window = self.order.window
        block, within = np.divmod(position, window)
        place = np.empty_like(position)
        for pair in np.unique(np.stack([lane, block], axis=1), axis=0):
            here = (lane == pair[0]) & (block == pair[1])
            start = pair[1] * window
            permutation = self._window(int(pair[0]), int(pair[1]))
            place[here] = pair[0] * self._lane_length + start + permutation[within[here]]
        return place

    def _window(self, lane: int, block: int) -> IntArray:
        held = self._windows.get(lane)
        if held is None or held[0] != block:
            size = min(self.order.window, self._lane_length - block * self.order.window)
            permutation = keyed_permutation(size, self.order.seed, self.number, 2, lane, block)
            held = self._windows[lane] = (block, permutation.astype(np.int32))
        return held[1]


def _largest_divisor(number: int, limit: int) -> int:
    return next(d for d in range(min(number, limit), 0, -1) if number % d == 0)
