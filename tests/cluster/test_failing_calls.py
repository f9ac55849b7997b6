"""Every call of the file system may fail: fit, save and resume end as documented, and lose nothing.

The n-th open, write, rename or fsync in the run's folder fails, once or from then on. Whatever
happens, no complete checkpoint is lost, none that counts is damaged, the exit code is 0 or 75 with
a word about it, and the next start goes on to the same losses.
"""

import collections
import errno
import json
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from cluster_runs import curve, run
from rank_zygote import Zygote
from tiny_run import STEPS_PER_EPOCH, steps

from lightning_modules.training.run.checkpoint_store import (
    CheckpointFolder,
    Manifest,
    check_contents,
    check_sizes,
)

CALLS = ("open", "write", "rename", "fsync")
ERRORS = ("ENOSPC", "EIO", "EROFS", "ESTALE", "EMFILE")
OPTIONS = {"world": 1, "epochs": 2, "csv": True, "ema": True, "checkpoints": {"keep_last": 2}}
STOP_AT = {"at": 3, "where": "train"}


@pytest.fixture(scope="module")
def failing(tmp_path_factory):
    """A zygote whose ranks can be told which call fails."""
    library = tmp_path_factory.mktemp("failing") / "failing_calls.so"
    source = Path(__file__).with_name("failing_calls.c")
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-Wall", "-o", str(library), str(source), "-ldl"],
        check=True,
    )
    zygote = Zygote(LD_PRELOAD=str(library))
    yield zygote
    zygote.close()


@pytest.fixture(scope="module")
def stopped(failing, tmp_path_factory):
    """A run that was stopped after a few steps, and the curve of one that nobody touched."""
    whole, part = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("part")
    assert run(failing, whole, **OPTIONS).codes == [0]
    assert run(failing, part, trouble=STOP_AT, **OPTIONS).codes == [85]
    return part, curve(whole, 1)


def complete(folder: Path) -> list[str]:
    """Checkpoints that count; each must be what its manifest says."""
    store = CheckpointFolder(folder / "checkpoints")
    for name in store.names():
        manifest = Manifest.read(store.root / name)
        check_sizes(store.root / name, manifest)
        check_contents(store.root / name, manifest.files)
    return store.names()


def start(failing, folder: Path, **options):
    """One run; its log lies elsewhere, since what it says may not fail."""
    folder.mkdir(exist_ok=True)
    log = folder.with_name("log.txt")
    log.unlink(missing_ok=True)
    launched = failing.start(log, folder=str(folder), **options)
    launched.wait()
    return launched


def inject(failing, folder: Path, stopped, begin: str, fault: dict) -> str:
    """One run with a fault, then one without; what became of the first."""
    part, whole = stopped
    shutil.rmtree(folder, ignore_errors=True)
    if begin == "resume":
        shutil.copytree(part, folder)
    before = complete(folder)
    hurt = start(failing, folder, fault={"under": str(folder), **fault}, **OPTIONS)
    told = hurt.text()
    assert hurt.codes in ([0], [75]), told
    hit = "fault: hit" in told
    kept = complete(folder)
    assert not before or kept[-1] >= before[-1], f"{before} -> {kept}: a checkpoint is lost"
    if hurt.codes == [75]:
        assert hit and "eva02-at: fault on" in told, told
        assert "Traceback" not in told, told
    else:
        assert kept[-1] == f"step-{2 * STEPS_PER_EPOCH:08d}", told
    again = start(failing, folder, **OPTIONS)
    assert again.codes == [0], again.text()
    assert curve(folder, 1) == whole
    assert complete(folder)[-1] == f"step-{2 * STEPS_PER_EPOCH:08d}"
    return ("ended with 75" if hurt.codes == [75] else "went on") if hit else "not reached"


def count_calls(failing, folder: Path, stopped, begin: str, call: str) -> int:
    shutil.rmtree(folder, ignore_errors=True)
    if begin == "resume":
        shutil.copytree(stopped[0], folder)
    done = start(failing, folder, fault={"under": str(folder), "call": call, "n": 10**9}, **OPTIONS)
    (line,) = (line for line in done.text().splitlines() if line.startswith("fault: "))
    return int(line.split()[-1])


def cases(failing, folder: Path, stopped, number: int, seed: int):
    chance = random.Random(seed)
    counts = {
        (begin, call): count_calls(failing, folder, stopped, begin, call)
        for begin in ("fit", "resume")
        for call in CALLS
    }
    assert all(counts.values()), counts
    for k in range(number):
        begin, call = ("fit", "resume")[k % 2], CALLS[k // 2 % 4]
        yield (
            begin,
            {
                "call": call,
                "n": chance.randint(1, counts[begin, call]),
                "error": getattr(errno, ERRORS[k // 8 % 5]),
                "times": chance.choice((1, 1, 3, 0)),
            },
        )


@pytest.mark.parametrize(
    "number", [8, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_no_call_that_fails_costs_a_checkpoint_or_a_loss(failing, tmp_path, stopped, number):
    ends = collections.Counter()
    for begin, fault in cases(failing, tmp_path / "run", stopped, number, seed=number):
        try:
            ends[inject(failing, tmp_path / "run", stopped, begin, fault)] += 1
        except AssertionError as error:
            raise AssertionError(f"{begin} {fault}: {error}") from error
    print(f"{number} injections: {dict(ends)}")
    assert ends["ended with 75"] + ends["went on"] >= number / 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("error", ["ENOSPC", "ESTALE"])
def test_every_open_of_a_resume_may_fail(failing, tmp_path, stopped, error):
    count = count_calls(failing, tmp_path / "run", stopped, "resume", "open")
    for n in range(1, count + 1):
        fault = {"call": "open", "n": n, "error": getattr(errno, error), "times": 1}
        inject(failing, tmp_path / "run", stopped, "resume", fault)


@pytest.fixture(scope="module")
def stopped_pair(failing, tmp_path_factory):
    """The same of two ranks."""
    whole, part = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("part")
    assert run(failing, whole, **{**OPTIONS, "world": 2}).codes == [0, 0]
    assert run(failing, part, trouble=STOP_AT, **{**OPTIONS, "world": 2}).codes == [85, 85]
    return part, curve(whole)


@pytest.mark.parametrize(
    "number", [4, pytest.param(100, marks=[pytest.mark.slow, pytest.mark.timeout(7200)])]
)
def test_no_call_that_fails_on_one_rank_leaves_the_other_waiting(
    failing, tmp_path, stopped_pair, number
):
    """In set-up, resume, training, saving and the end alike, on the first rank or the second."""
    (part, whole), folder = stopped_pair, tmp_path / "run"
    chance, options, ends = random.Random(number), {**OPTIONS, "world": 2}, collections.Counter()
    for k in range(number):
        rank, call = k % 2, CALLS[k // 2 % 4]
        fault = {
            "rank": rank,
            "call": call,
            "n": chance.randint(1, 12 if rank == 0 else 4),
            "error": getattr(errno, ERRORS[k % 5]),
            "times": chance.choice((1, 0)),
        }
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(part, folder)
        before = complete(folder)
        hurt = start(failing, folder, fault={"under": str(folder), **fault}, **options)
        told = hurt.text()
        # 70: it heard that the other had failed
        assert set(hurt.codes) in ({0}, {75}, {70, 75}), f"{fault}: {hurt.codes} {told}"
        assert complete(folder)[-1] >= before[-1], f"{fault}: a checkpoint is lost"
        again = start(failing, folder, **options)
        assert again.codes == [0, 0], f"{fault}: {again.text()}"
        assert curve(folder) == whole, fault
        ends[str(hurt.codes) if "fault: hit" in told else "not reached"] += 1
    print(f"{number} injections on one of two ranks: {dict(ends)}")
    assert ends["not reached"] < number


@pytest.mark.parametrize("error", ["EIO", "ESTALE", "ENOSPC"])
def test_storage_that_fails_is_no_fault_of_the_checkpoint_that_test_reads(
    failing, tmp_path, stopped, error
):
    """It ends with 75, and what figures there are are those of the newest checkpoint.

    A read error of its manifest is the checkpoint's own: it is passed over, which is told.
    """
    options, ends = {**OPTIONS, "verb": "test"}, collections.Counter()
    for call in CALLS:
        folder = shutil.copytree(stopped[0], tmp_path / call / "run")
        n, hit = 0, True
        while hit and n < 8:  # in a row, until there is no such call any more
            n += 1
            fault = {"under": str(folder), "call": call, "n": n, "error": getattr(errno, error)}
            done = start(failing, folder, fault=fault, **options)
            told, results = done.text(), folder / "test.json"
            hit = "fault: hit" in told
            assert done.codes == [0] or (hit and done.codes == [75]), told
            assert done.codes == [75] or results.exists(), told
            if results.exists():
                older = error == "EIO" and "checkpoint skipped: step-" in told
                step = json.loads(results.read_text())["weights"]["step"]
                assert step == STOP_AT["at"] + (0 if older else 1)
                results.unlink()
            ends[call] += hit
    assert all(ends.values()), ends


def test_the_first_steps_of_a_run_are_steps(stopped):
    assert len(steps(stopped[0])) == STOP_AT["at"] + 1
