"""Damaged checkpoints, a full disk, dead and stopped ranks, batches that are not finite."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_runs import TOTAL, run
from tiny_run import steps

from lightning_modules.cli.main import main
from lightning_modules.training.run.checkpoint_store import CheckpointFolder, Manifest

SLOW = pytest.mark.slow
TWO_STEPS = {"at": 1, "where": "train"}  # stop after steps 0 and 1


def _largest(checkpoint: Path) -> Path:
    return max((p for p in (checkpoint / "state").rglob("*")), key=lambda p: p.stat().st_size)


def _truncate(checkpoint):
    path = _largest(checkpoint) if (checkpoint / "state").is_dir() else checkpoint / "state"
    os.truncate(path, path.stat().st_size // 2)


def _flip_a_bit(checkpoint):
    path = _largest(checkpoint) if (checkpoint / "state").is_dir() else checkpoint / "state"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _lose_a_file(checkpoint):
    path = _largest(checkpoint) if (checkpoint / "state").is_dir() else checkpoint / "state"
    path.unlink()


def _lose_the_manifest(checkpoint):
    (checkpoint / "manifest.json").unlink()


def _cut_the_manifest(checkpoint):
    os.truncate(checkpoint / "manifest.json", 40)


DAMAGES = [_truncate, _flip_a_bit, _lose_a_file, _lose_the_manifest, _cut_the_manifest]


@pytest.fixture(scope="module")
def stopped(zygote, tmp_path_factory):
    """strategy -> folder of a run that was stopped after two steps."""
    known = {}

    def folder_of(strategy, world):
        if strategy not in known:
            known[strategy] = tmp_path_factory.mktemp(strategy)
            done = run(zygote, known[strategy], world=world, strategy=strategy, trouble=TWO_STEPS)
            assert set(done.codes) == {85}
        return known[strategy]

    return folder_of


@pytest.mark.parametrize(
    ("strategy", "world", "damage"),
    [("ddp", 1, damage) for damage in DAMAGES]
    + [("zero2", 2, damage) for damage in (_truncate, _flip_a_bit)],
)
def test_a_damaged_checkpoint_is_skipped_for_the_newest_complete_one(
    zygote, tmp_path, stopped, strategy, world, damage
):
    folder = tmp_path / "run"
    shutil.copytree(stopped(strategy, world), folder)
    damage(folder / "checkpoints" / "step-00000002")
    done = run(zygote, folder, world=world, strategy=strategy, epochs=1)
    assert done.codes == [0] * world, done.text()
    assert "checkpoint skipped: step-00000002" in done.text()
    assert (damage is _truncate) == ("bytes, not" in done.text())  # told before anything is hashed
    assert [line["step"] for line in steps(folder)] == [0, 1, 1, 2, 3, 4]  # from step 1 again


def test_no_complete_checkpoint_is_an_error_not_a_fresh_start(zygote, tmp_path, stopped):
    folder = tmp_path / "run"
    shutil.copytree(stopped("ddp", 1), folder)
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        _truncate(checkpoint)
    done = run(zygote, folder, world=1)
    assert done.codes == [1]
    assert "no complete checkpoint" in done.text()
    assert len(steps(folder)) == 2


def test_another_strategys_checkpoint_is_refused_with_the_way_out(zygote, tmp_path, stopped):
    folder = tmp_path / "run"
    shutil.copytree(stopped("ddp", 1), folder)
    done = run(zygote, folder, world=1, strategy="zero2")
    assert done.codes == [1]
    assert "written by plain" in done.text()
    assert "init_checkpoint" in done.text()


@pytest.mark.parametrize(("strategy", "world"), [("ddp", 1), ("zero2", 2)])
def test_a_full_disk_leaves_the_old_checkpoints_and_the_run_alive(
    zygote, tmp_path, small_disk, strategy, world
):
    folder = tmp_path / "run"
    options = {"world": world, "strategy": strategy}
    keep_all = {"dirpath": str(small_disk), "keep_last": 0, "every_n_steps": 1}
    done = run(zygote, folder, checkpoints=keep_all, **options)
    assert len(steps(folder)) == TOTAL  # to the end, which is then missing on the disk: no success
    assert done.codes == [1] * world, done.text()
    assert f"trained to step {TOTAL}, but" in done.text()
    assert "NOT written" in done.text()
    assert "No space left" in done.text() or "write failed" in done.text(), done.text()
    complete = sorted(p.parent.name for p in small_disk.glob("step-*/manifest.json"))
    assert complete
    assert not list(small_disk.glob(".tmp-*"))  # nothing half written holds on to the disk
    assert (small_disk / "latest").read_text().strip() == complete[-1]
    # what is left can be resumed from
    shutil.copytree(small_disk, folder / "checkpoints")
    assert run(zygote, folder, **options).codes == [0] * world


# What a rank does by itself between two agreements while a checkpoint is written.
CALLS = [
    "checkpointing.refuse_poison",
    "checkpointing.dump_checkpoint",
    "checkpointing.CheckpointFolder.begin",
    "saving.HostMemory.copy",
    "checkpointing.Piece",
    "saving.file_record",
    "saving.CheckpointFolder.commit",
    "saving.CheckpointFolder.prune",
    "checkpoint_store.Manifest.read",
]
ON_RANK_0_ALONE = ("begin", "commit", "prune", "read")


@pytest.mark.distributed
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("strategy", "rank"), [("ddp", 0), ("zero2", 1), pytest.param("zero3", 0, marks=SLOW)]
)
def test_one_ranks_error_costs_one_checkpoint_and_hangs_nobody(
    zygote, tmp_path, strategy, rank, call
):
    """Whatever the exception is and wherever it comes from."""
    rank = 0 if call.endswith(ON_RANK_0_ALONE) else rank
    trouble = {"at": 3, "where": f"call:{call}", "rank": rank}
    options = {"checkpoints": {"keep_last": 20}, "epochs": 1}
    done = run(zygote, tmp_path, strategy=strategy, trouble=trouble, stall_s=60.0, **options)
    assert done.codes == [0, 0], done.text()
    names = {path.name for path in (tmp_path / "checkpoints").glob("step-*")}
    if call.endswith(("prune", "read")):  # it was complete by then
        assert "is complete, but older ones stay: KeyError('on fire')" in done.text()
        assert "NOT written" not in done.text()
        lost = set()
    else:
        assert f"rank {rank}: KeyError: 'on fire'" in done.text()
        (told,) = re.findall(r"checkpoint of step (\d) NOT written", done.text())
        assert told in "23"  # what is done in the background may be the one before's
        lost = {f"step-0000000{told}"}
    assert names == {f"step-0000000{step}" for step in range(1, 6)} - lost


def _wait_for_steps(folder: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    path = folder / "steps-0.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline, "the run does not move"
        time.sleep(0.02)


@pytest.mark.distributed
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_a_dead_or_stopped_rank_ends_the_run_with_the_laggard_named(zygote, tmp_path, signum):
    launched = zygote.start(
        tmp_path / "log.txt",
        world=2,
        folder=str(tmp_path),
        strategy="zero2",
        epochs=200,
        trouble={"pause_s": 0.02},
        stall_s=2.0,
    )
    _wait_for_steps(tmp_path, 3)
    os.kill(launched.pids[1], signum)
    if signum == signal.SIGSTOP:
        deadline = time.monotonic() + 30
        while "lagging" not in launched.text() and time.monotonic() < deadline:
            time.sleep(0.1)
        os.kill(launched.pids[1], signal.SIGKILL)
        assert launched.wait()[0] == 70
        report = launched.text().split("lagging:")[1]
        assert "rank 1 (" in report
        assert "rank 0 (" not in report
    else:
        assert all(code != 0 for code in launched.wait())


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("verb", "stall_s"),
    [
        ("fit", [2.0, 2.0]),
        ("fit", [2.0, 6.0]),  # rank 0 is gone, and the list with it, when rank 1 has to say why
        ("test", [2.0, 2.0]),
        ("test", [2.0]),
    ],
)
def test_a_rank_that_hangs_while_it_loads_ends_the_command(
    zygote, tmp_path, stopped, verb, stall_s
):
    folder = shutil.copytree(stopped("ddp", 1), tmp_path / "run")
    world = len(stall_s)
    trouble = {"where": "load", "rank": world - 1}
    done = run(zygote, folder, world=world, verb=verb, trouble=trouble, stall_s=stall_s)
    assert 70 in done.codes and 0 not in done.codes, done.text()
    told = [line for line in done.text().splitlines() if "ending the process" in line]
    assert told and all("restoring" in line or "loading" in line for line in told), told


@pytest.mark.distributed
@pytest.mark.parametrize("verb", ["fit", pytest.param("test", marks=SLOW)])
def test_a_rank_does_not_wait_long_for_one_that_failed(zygote, tmp_path, stopped, verb):
    """Where no broken connection tells it, as under NCCL."""
    folder = shutil.copytree(stopped("ddp", 1), tmp_path / "run")
    trouble = {"where": "fail", "rank": 1}
    done = run(zygote, folder, verb=verb, trouble=trouble, stall_s=20.0)
    assert done.codes == [70, 1], done.text()
    told = "waits in vain, ending the process: rank 1 failed (KeyError: 'on fire')"
    assert told in done.text()
    assert "no progress" not in done.text()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "precision"),
    [
        ("ddp", "32-true"),
        ("zero1", "32-true"),
        ("zero2", "bf16-mixed"),
        ("zero3", "32-true"),
        ("zero3", "bf16-mixed"),
    ],
)
def test_a_batch_that_is_not_finite_is_named_and_skipped(zygote, tmp_path, strategy, precision):
    """ZeRO skips by itself, in this version of DeepSpeed at every stage and without clipping."""
    options = {"strategy": strategy, "precision": precision, "clip": 0.0, "epochs": 2}
    done = run(zygote, tmp_path, poison={"steps": [3], "rank": 1}, **options)
    assert done.codes == [0, 0], done.text()
    told = [line for line in done.text().splitlines() if "not finite" in line]
    assert len(told) == 1
    ids = steps(tmp_path, rank=1)[3]["ids"]
    assert told[0].count("step 3: the model's output is not finite on rank 1: loss nan") == 1
    assert all(f"clip{i}" in told[0] for i in ids)
    assert "rank 0" not in told[0]
    losses = [line["loss"] for line in steps(tmp_path)]
    assert losses[3] != losses[3]  # the poisoned step itself
    assert all(loss == loss for loss in losses[:3] + losses[4:])


def test_too_many_skips_or_the_stop_policy_end_the_run_without_a_poisoned_checkpoint(
    zygote, tmp_path
):
    poison = {"steps": [2, 3, 4], "rank": 0}
    for name, guard, last in (("stop", {"policy": "stop"}, 2), ("many", {"max_skips": 2}, 4)):
        done = run(zygote, tmp_path / name, world=1, poison=poison, guard=guard)
        assert done.codes == [1]
        assert f"step {last}: the model's output is not finite" in done.text()
        newest = (tmp_path / name / "checkpoints" / "latest").read_text().strip()
        assert newest == f"step-{last:08d}"  # steps done before the last bad one


def test_weights_that_are_not_finite_never_reach_a_checkpoint(zygote, tmp_path):
    """However they came about: the guard looks at losses and gradients only."""
    run(zygote, tmp_path, world=1, trouble={"at": 3, "where": "weights"}, epochs=1)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert kept[-1] == "step-00000002"
    assert "the weights are not finite" in (tmp_path / "log.txt").read_text()


def test_the_csv_of_a_stopped_run_is_gone_on_with(zygote, tmp_path):
    assert run(zygote, tmp_path, world=1, csv=True, trouble=TWO_STEPS).codes == [85]
    assert run(zygote, tmp_path, world=1, csv=True, epochs=1).codes == [0]
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = [(int(r["step"]), float(r["train/loss"])) for r in rows if r["train/loss"]]
    assert [step for step, _ in logged] == [0, 1, 2, 3, 4]
    exact = [line["loss"] for line in steps(tmp_path)]
    assert [loss for _, loss in logged] == exact


def test_only_the_newest_and_the_best_are_kept(zygote, tmp_path):
    keep = {"every_n_steps": 1, "keep_last": 2, "keep_best": 1}
    assert run(zygote, tmp_path, world=1, checkpoints=keep).codes == [0]
    kept = sorted((tmp_path / "checkpoints").glob("step-*"))
    scores = {p.name: json.loads((p / "manifest.json").read_text())["metrics"] for p in kept}
    assert [p.name for p in kept][-2:] == ["step-00000014", "step-00000015"]
    assert len(kept) == 3 or scores["step-00000015"]["val/map_avg"] == max(
        row["val/map_avg"] for row in scores.values() if "val/map_avg" in row
    )


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_metric_that_is_not_finite_is_never_the_best(tmp_path, mode, value):
    store = CheckpointFolder(tmp_path)
    for step, metric in enumerate((value, 2.0, value, 1.0, value, value)):
        manifest = Manifest(step, 0, 1, "plain", {"val/map_avg": metric})
        store.begin(f"step-{step}")
        store.commit(f"step-{step}", manifest)
    store.prune(1, 1, "val/map_avg", mode)
    assert store.names() == ["step-1" if mode == "max" else "step-3", "step-5"]


@pytest.mark.parametrize("workers", [0, 1])
def test_too_much_damage_ends_a_run_with_one_line(recipe, tmp_path, capfd, workers):
    shards = shutil.copytree(recipe.parent / "shards", tmp_path / "shards")
    for tar in shards.glob("*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.read_text().replace(str(recipe.parent / "shards"), str(shards)))
    words = ["--config", str(file), f"--run_dir={tmp_path / 'run'}", "--trainer.devices=1"]
    assert main(["fit", *words, f"--data.num_workers={workers}"]) == 1
    told = capfd.readouterr().err
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith("eva02-at: error: 10 of ")
    assert "max_fault_rate" in told.splitlines()[-1]


def test_data_that_is_gone_is_a_mistake_at_first_and_a_fault_later(recipe, tmp_path, capfd):
    """Where the run has a checkpoint the path was right: another node may have it mounted."""
    shards = shutil.copytree(recipe.parent / "shards", tmp_path / "shards")
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.read_text().replace(str(recipe.parent / "shards"), str(shards)))
    words = ["fit", "--config", str(file), "--trainer.devices=1", "--trainer.max_epochs=1"]
    assert main([*words, f"--run_dir={tmp_path / 'run'}"]) == 0
    shards.rename(tmp_path / "elsewhere")
    for run_dir, code, kind in (("run", 75, "fault on"), ("other", 2, "error")):
        assert main([*words, "--trainer.max_epochs=2", f"--run_dir={tmp_path / run_dir}"]) == code
        told = capfd.readouterr().err
        assert "Traceback" not in told
        assert f"eva02-at: {kind}" in told.splitlines()[-1]
        assert f"no manifest at {shards}" in told.splitlines()[-1]


@pytest.mark.parametrize(
    "size", ["64k", pytest.param("4k", marks=SLOW), pytest.param("16k", marks=SLOW)]
)
def test_a_full_shared_memory_is_named(recipe, tmp_path, size):
    """What has no room: a table, the queues' semaphores, a batch."""
    run_dir = f"--run_dir={tmp_path / 'run'}"
    words = f"fit --config {recipe} {run_dir} --trainer.devices=1 --data.num_workers=1"
    inner = f"mount -t tmpfs -o size={size} none /dev/shm && exec "
    inner += f"{sys.executable} -m lightning_modules.cli.main {words}"
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"]).returncode != 0:
        pytest.skip("a /dev/shm of one's own needs root and mount namespaces")
    done = subprocess.run(["unshare", "-m", "sh", "-c", inner], capture_output=True, text=True)
    assert done.returncode == 75, done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("eva02-at: fault")]
    assert "/dev/shm is full" in told and "--shm-size" in told
