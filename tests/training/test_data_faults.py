"""The rate of damaged samples: of all ranks together, over a window, from start to start."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
from gloo_ranks import run_ranks

from datamodules.stream.faults import FaultMonitor, TooManyDamagedSamples
from lightning_modules.training.run.data_faults import DataFaults

RANKS, WINDOW, MAX_RATE, LOOKS = 3, 3, 0.1, 8
Counts = list[list[tuple[int, int]]]  # [look][rank] (damaged, seen)


def sequences(number: int) -> list[tuple[Counts, int]]:
    """What each rank meets between two looks, and the look before which the run is started anew.

    One rank has most of the damage, more by itself than the limit allows.
    """
    chance = random.Random(0)
    made = []
    for _ in range(number):
        worst, level = chance.randrange(RANKS), chance.choice((2, 5, 8))
        counts = [
            [(chance.randint(0, level) if r == worst else chance.randint(0, 1), 20)
             for r in range(RANKS)]
            for _ in range(LOOKS)
        ]  # fmt: skip
        made.append((counts, chance.randint(1, LOOKS)))
    return made


def first_refusal(counts: Counts) -> int | None:
    """The slow way: sums of all ranks over the last looks."""
    for look in range(LOOKS):
        window = [pair for ranks in counts[max(0, look + 1 - WINDOW) : look + 1] for pair in ranks]
        damaged, seen = (sum(pair[k] for pair in window) for k in (0, 1))
        if damaged >= 10 and damaged > MAX_RATE * seen:
            return look
    return None


def live(rank: int, made: list[tuple[Counts, int]]) -> list[int | None]:
    return [one_life(rank, counts, restart) for counts, restart in made]


def one_life(rank: int, counts: Counts, restart: int) -> int | None:
    state = None
    for looks in (range(restart), range(restart, LOOKS)):
        monitor = FaultMonitor(0, MAX_RATE)
        monitor.judged_together = True
        trainer = SimpleNamespace(
            datamodule=SimpleNamespace(fault_monitor=monitor), accumulate_grad_batches=2
        )
        callback = DataFaults(every_n_steps=1, window=WINDOW)
        if state is not None:
            callback.load_state_dict(state)
        callback.on_train_start(trainer, None)
        for look in looks:
            damaged, seen = counts[look][rank]
            for k in range(seen):
                monitor.begin(0, k)
            for _ in range(damaged):
                monitor.report("a sample", "broken", "replaced")
            try:
                for batch in (2 * look, 2 * look + 1):  # a step is two batches
                    callback.on_train_batch_end(trainer, None, None, None, batch)
            except TooManyDamagedSamples:
                return look
        state = callback.state_dict()
    return None


@pytest.mark.distributed
def test_all_ranks_refuse_at_the_same_look_as_the_sums_say() -> None:
    made = sequences(40)
    expected = [first_refusal(counts) for counts, _ in made]
    assert None in expected and len(set(expected)) > 4
    assert run_ranks(RANKS, live, made) == [expected] * RANKS
