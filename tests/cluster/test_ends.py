"""Every kind of end, and going on from it: the same losses, batches, labels and validations."""

import csv
import json

import pytest
from cluster_runs import REAL, TOTAL, curve, run
from tiny_run import steps

# The length of a cosine is the run's; with a constant rate an untouched longer run is the oracle.
CONSTANT = {"optimizer": {"schedule": "constant"}, "csv": True}


def labels(folder):
    """(step, loss) and (step, metric) as they were logged."""
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [
        (int(row["step"]), name, row[name])
        for row in rows
        for name in ("train/loss", "val/map_avg")
        if row.get(name)
    ]


@pytest.fixture(scope="module")
def oracle(zygote, tmp_path_factory):
    known = {}

    def outcome_of(world, **options):
        key = world, str(sorted(options.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("oracle")
            done = run(zygote, folder, world=world, **REAL, **{**CONSTANT, **options})
            assert done.codes == [0] * world, done.text()
            known[key] = curve(folder, world), labels(folder)
        return known[key]

    return outcome_of


ENDS = {
    "max_steps": {"trainer_options": {"max_steps": 7}},
    "max_steps at an epoch's end": {"trainer_options": {"max_steps": 10}},
    "max_epochs": {"epochs": 1},
    "max_epochs and max_steps": {"epochs": 1, "trainer_options": {"max_steps": 40}},
    "should_stop": {"trouble": {"at": 7, "where": "should_stop"}},
    "should_stop at an epoch's end": {"trouble": {"at": 10, "where": "should_stop"}},
    "a signal": {"trouble": {"at": 6}},
}
CONTINUATIONS = {
    "max_epochs": {},
    "max_steps": {"epochs": -1, "trainer_options": {"max_steps": TOTAL}},
    "both": {"trainer_options": {"max_steps": TOTAL}},
}


@pytest.mark.parametrize(
    ("end", "more"),
    [
        # each end once and each continuation twice; all of them in the long form
        pytest.param(end, more, marks=[] if (i + j) % 3 == 0 else pytest.mark.slow)
        for i, end in enumerate(ENDS)
        for j, more in enumerate(CONTINUATIONS)
    ],
)
def test_a_run_goes_on_exactly_after_every_end(zygote, tmp_path, oracle, end, more):
    first = run(zygote, tmp_path, world=1, **REAL, **{**CONSTANT, **ENDS[end]})
    assert first.codes == [85 if end == "a signal" else 0], first.text()
    assert len(steps(tmp_path)) < TOTAL
    last = run(zygote, tmp_path, world=1, **REAL, **CONSTANT, **CONTINUATIONS[more])
    assert last.codes == [0], last.text()
    assert len(steps(tmp_path)) == TOTAL
    whole, logged = oracle(1)
    assert curve(tmp_path, 1) == whole
    early = [row for row in labels(tmp_path) if row not in logged]
    assert all(name == "val/map_avg" and "should_stop" in end for _, name, _ in early)
    assert [row for row in labels(tmp_path) if row not in early] == logged


def test_a_run_goes_on_exactly_after_max_time(zygote, tmp_path, oracle):
    """It ends in mid-epoch: a step takes a third of the second that there is."""
    slow = {"trouble": {"pause_s": 0.3}, "trainer_options": {"max_time": {"seconds": 1}}}
    first = run(zygote, tmp_path, world=1, **REAL, **CONSTANT, **slow)
    assert first.codes == [0], first.text()
    assert 0 < len(steps(tmp_path)) < TOTAL
    last = run(zygote, tmp_path, world=1, **REAL, **CONSTANT)
    assert last.codes == [0], last.text()
    assert len(steps(tmp_path)) == TOTAL
    whole, logged = oracle(1)
    assert curve(tmp_path, 1) == whole
    assert [row for row in labels(tmp_path) if "loss" in row[1]] == [
        row for row in logged if "loss" in row[1]
    ]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_test_scores_a_zero_runs_checkpoint_under_any_strategy(zygote, tmp_path, stage):
    """The last validation saw the same clips with the same weights."""
    strategy = f"zero{stage}"
    options = {"epochs": 1, "csv": True, "strategy": strategy}
    assert run(zygote, tmp_path, **options).codes == [0, 0]
    due = float(next(value for _, name, value in labels(tmp_path) if name == "val/map_avg"))
    for world, strategy in ((2, f"zero{stage}"), (1, "ddp")):
        done = run(zygote, tmp_path, world=world, strategy=strategy, verb="test")
        assert done.codes == [0] * world, done.text()
        told = json.loads((tmp_path / "test.json").read_text())
        assert told["weights"]["step"] == 5
        assert told["test/map_avg"] == pytest.approx(due, rel=1e-6)
