"""Stopping, killing and damaging runs: every continuation equals the run that was never touched."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import tiny_run
from cluster_runs import REAL, TOTAL, average, curve, run
from tiny_run import STEPS_PER_EPOCH, steps

STRATEGIES = ["ddp", "zero1", "zero2", "zero3"]
KILLS = int(os.environ.get("EVA02_AT_KILLS", "1"))
KILL_EPOCHS = 3 * KILLS  # long enough that no kill comes too late


def outcome(folder, world=2):
    return curve(folder, world), tiny_run.validations(folder), average(folder)


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_stop_in_training_and_one_in_validation_change_nothing(
    zygote, tmp_path, untouched, strategy
):
    """SIGTERM reaches one rank only; both leave with 85, and the curve goes on exactly."""
    first = run(
        zygote, tmp_path, strategy=strategy, trouble={"at": 2, "where": "train", "rank": 1}, **REAL
    )
    assert first.codes == [85, 85], first.text()
    assert [line["step"] for line in steps(tmp_path)] == [0, 1, 2]
    second = run(
        zygote,
        tmp_path,
        strategy=strategy,
        trouble={"at": 10, "where": "validation", "rank": 0, "signum": signal.SIGUSR1},
        **REAL,
    )
    assert second.codes == [85, 85], second.text()
    third = run(zygote, tmp_path, strategy=strategy, **REAL)
    assert third.codes == [0, 0], third.text()
    assert len(steps(tmp_path)) == TOTAL  # no step twice
    assert outcome(tmp_path) == untouched(strategy)


def test_stopping_after_every_single_step_changes_nothing(zygote, tmp_path, untouched):
    """Epoch ends and pending validations included: each launch does one step."""
    for step in range(TOTAL):
        launched = run(zygote, tmp_path, world=1, trouble={"at": step}, **REAL)
        assert launched.codes == [85], launched.text()
    assert run(zygote, tmp_path, world=1, **REAL).codes == [0]
    assert len(steps(tmp_path)) == TOTAL
    assert outcome(tmp_path, 1) == untouched("ddp", 1)


def test_a_signal_while_saving_waits_for_the_checkpoint(zygote, tmp_path, untouched):
    for step, signum in ((4, signal.SIGINT), (5, signal.SIGTERM)):
        trouble = {"at": step, "where": "save", "signum": signum}
        assert run(zygote, tmp_path, world=1, trouble=trouble, **REAL).codes == [85]
    assert run(zygote, tmp_path, world=1, **REAL).codes == [0]
    assert outcome(tmp_path, 1) == untouched("ddp", 1)


def test_a_finished_run_that_is_started_again_does_nothing(zygote, tmp_path):
    assert run(zygote, tmp_path, world=1, epochs=1).codes == [0]
    assert run(zygote, tmp_path, world=1, epochs=1).codes == [0]
    assert len(steps(tmp_path)) == STEPS_PER_EPOCH


def kill_at_random(zygote, folder, strategy, chance):
    """Start a run, SIGKILL one rank or all of them a random time after the first step."""
    launched = zygote.start(
        folder / "log.txt",
        world=2,
        folder=str(folder),
        strategy=strategy,
        trouble={"pause_s": 0.02},
        epochs=KILL_EPOCHS,
        **REAL,
    )
    path = folder / "steps-0.jsonl"
    before = path.stat().st_size if path.exists() else 0
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_size == before:
        assert time.monotonic() < deadline, launched.text()
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 0.4))
    victims = launched.pids if chance.random() < 0.5 else [chance.choice(launched.pids)]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):  # it has finished
            os.kill(pid, signal.SIGKILL)
    return launched.wait()


@pytest.mark.distributed
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sigkill_at_random_instants(zygote, tmp_path, untouched, strategy):
    """EVA02_AT_KILLS=50 is the long form; whatever was redone must have come out the same."""
    chance = random.Random(f"{strategy}{os.environ.get('EVA02_AT_SEED', 0)}")
    for kill in range(KILLS):
        codes = kill_at_random(zygote, tmp_path, strategy, chance)
        assert any(code != 0 for code in codes), f"finished before kill {kill}"
    last = run(zygote, tmp_path, strategy=strategy, epochs=KILL_EPOCHS, **REAL)
    assert last.codes == [0, 0], last.text()
    done_again = len(steps(tmp_path)) - KILL_EPOCHS * STEPS_PER_EPOCH
    print(f"{strategy}: {KILLS} kills, {done_again} steps done again")
    assert curve(tmp_path) == untouched(strategy, epochs=KILL_EPOCHS)[0]


def test_the_stop_flag_is_there_before_torch():
    """A signal while a rank is still importing sets the flag; it does not kill the rank."""
    code = (
        "import os, signal, sys; from lightning_modules.cli import main; from "
        "lightning_modules.training.run.signals import STOP; assert 'torch' not in sys.modules; "
        "STOP.install(); os.kill(os.getpid(), signal.SIGTERM); print(STOP.received.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "SIGTERM", done.stderr
