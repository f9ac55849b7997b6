"""Two runs in one folder: who may write, who takes over from a dead owner, who must not commit."""

import errno
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster_runs import run

from lightning_modules.training.run import owner as owner_module
from lightning_modules.training.run.checkpoint_store import CheckpointFolder, Manifest
from lightning_modules.training.run.owner import RunInUse, RunOwnership

HOLD = """
import sys, time
from lightning_modules.training.run.owner import RunOwnership
ownership = RunOwnership(sys.argv[1])
ownership.acquire()
print("taken", flush=True)
while True:
    ownership.beat()
    time.sleep(0.05)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that owns tmp_path and gives signs of life."""
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "taken\n"
        yield process
        process.kill()


def move_elsewhere(folder: Path, **changes) -> None:
    """Make the newest owner one of another machine, whose processes cannot be looked up."""
    path = max(p for p in (folder / ".owner").iterdir() if p.name.isdigit())
    content = path.read_text()
    owner = json.loads(content[12:]) | {"host": "far", "machine": "far", **changes}
    path.write_text(content[:12] + "\n" + json.dumps(owner) + "\n")


@pytest.mark.distributed
def test_a_second_fit_is_refused_and_changes_nothing(zygote, recipe, holder, tmp_path):
    """Both ranks leave with 2, and one line says whose the folder is."""
    words = ["--config", str(recipe), f"--run_dir={tmp_path}", "--trainer.devices=2"]
    before = sorted(tmp_path.rglob("*"))
    launched = zygote.start(tmp_path.parent / "log.txt", world=2, argv=["fit", *words])
    assert launched.wait() == [2, 2], launched.text()
    told = [line for line in launched.text().splitlines() if line.startswith("eva02-at: error")]
    assert len(told) == 1
    assert f"{tmp_path} is in use by process {holder.pid} of " in told[0]
    assert f"kill {holder.pid}" in told[0]
    after = sorted(p for p in tmp_path.rglob("*") if "tfevents" not in p.name and p.name != "logs")
    assert after == before


def test_a_run_whose_owner_was_killed_is_taken_over_at_once(zygote, holder, tmp_path):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    done = run(zygote, tmp_path, world=1, epochs=1)
    assert done.codes == [0], done.text()
    assert f"from process {holder.pid} of" in done.text()


def test_a_run_that_has_ended_leaves_the_folder_free(zygote, tmp_path):
    for trouble in ({"at": 1, "where": "train"}, None):  # stopped by a signal, and at its end
        done = run(zygote, tmp_path, world=1, epochs=1, trouble=trouble)
        assert "taking over" not in done.text()
        (newest,) = [
            p for p in (tmp_path / ".owner").iterdir() if p.name == f"{1 + (not trouble):08d}"
        ]
        assert newest.read_text().startswith("released")


def test_an_owner_on_another_machine_is_alive_while_its_heartbeat_changes(holder, tmp_path):
    move_elsewhere(tmp_path)
    second = RunOwnership(tmp_path, lost_s=60, look_s=0.02)
    with pytest.raises(RunInUse, match=r"process \d+ of \w+ on far, since"):
        second.acquire()


def test_an_owner_on_another_machine_is_dead_once_its_heartbeat_stands_still(holder, tmp_path):
    move_elsewhere(tmp_path)
    holder.send_signal(signal.SIGSTOP)
    second = RunOwnership(tmp_path, lost_s=0.5, look_s=0.05)
    assert "on far" in second.acquire()
    assert second.is_mine()


@pytest.mark.parametrize(
    ("job", "restart", "queue", "outcome"),
    [
        ("7", "0", "", "dead"),  # not in the queue any more
        ("7", "0", "PENDING", "dead"),  # requeued, not started
        ("7", "0", "RUNNING", "alive"),
        ("7", "0", None, "alive"),  # no queue to ask
        ("8", "0", "RUNNING", "dead"),  # this job's own earlier start
        ("8", "1", "RUNNING", "alive"),  # another step of this job
    ],
)
def test_slurm_knows_of_an_owner_on_another_node(
    holder, tmp_path, monkeypatch, job, restart, queue, outcome
):
    squeue = tmp_path.parent / "squeue"
    squeue.write_text(f"#!/bin/sh\necho {queue}\n" if queue is not None else "#!/bin/sh\nexit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(squeue.parent), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    move_elsewhere(tmp_path, job=job, restart=restart)
    second = RunOwnership(tmp_path, lost_s=60, look_s=0.02)
    if outcome == "dead":
        assert f"SLURM job {job}" in second.acquire()
    else:
        with pytest.raises(RunInUse, match=f"scancel {job}"):
            second.acquire()


def contend(folder: Path, start, winners) -> None:
    start.wait()
    try:
        RunOwnership(folder, lost_s=0.2, look_s=0.01).acquire()
    except RunInUse:
        return
    winners.put(os.getpid())
    time.sleep(1)  # alive until everybody has looked


@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_come_at_once_one_gets_the_folder(tmp_path, monkeypatch, links):
    """Over nothing, over a dead owner, over one that gave it back; with and without hard links."""
    if not links:
        monkeypatch.setattr(os, "link", _no_links)
    context = multiprocessing.get_context("fork")
    for turn in range(3):
        start, winners = context.Barrier(8), context.Queue()
        crowd = [context.Process(target=contend, args=(tmp_path, start, winners)) for _ in range(8)]
        for process in crowd:
            process.start()
        for process in crowd:
            process.join()
        assert winners.get(timeout=5)
        assert winners.empty(), f"turn {turn}: two owners"


def _no_links(*args):
    raise OSError(errno.EPERM, "no hard links here")


def test_a_sleeper_who_takes_an_old_number_is_not_the_owner(tmp_path, monkeypatch):
    """It saw number 1 free, slept, and links 2 when 4 is the owner and 2 is long gone."""
    sleeper = RunOwnership(tmp_path)
    for _ in range(4):
        last = RunOwnership(tmp_path)
        last.acquire()
    assert not (tmp_path / ".owner" / "00000002").exists()
    assert not sleeper._claim(2)
    assert last.is_mine()


def test_a_heartbeat_needs_no_room_on_a_full_disk(small_disk):
    ownership = RunOwnership(small_disk)
    ownership.acquire()
    with pytest.raises(OSError, match="No space"), (small_disk / "filler").open("wb") as file:
        while True:
            file.write(bytes(4096))
            file.flush()
    assert ownership.beat()
    ownership.release()
    assert RunOwnership(small_disk).owner() is None


class Sleeper:
    """An owner that falls asleep at one of its looks at the lock; meanwhile another takes over."""

    def __init__(self, folder: Path, asleep_at: int) -> None:
        self.folder, self.asleep_at, self.looks = folder, asleep_at, 0
        self.ownership = RunOwnership(folder)
        self.ownership.acquire()
        self.store = CheckpointFolder(folder / "checkpoints", 1, self.check)

    def check(self) -> None:
        if not self.ownership.is_mine():
            raise OSError("taken over")
        self.looks += 1
        if self.looks == self.asleep_at:
            move_elsewhere(self.folder)
            successor = RunOwnership(self.folder, lost_s=0.0, look_s=0.01)
            successor.acquire()
            successor_store = CheckpointFolder(self.folder / "checkpoints", 2)
            successor_store.clean()
            write(successor_store, "step-00000009")

    def save(self, name: str) -> None:
        write(self.store, name)


def write(store: CheckpointFolder, name: str) -> None:
    folder = store.begin(name)
    (folder / "state").write_text(name)
    store.commit(name, Manifest(int(name[-1]), 0, 1, "plain"))


@pytest.mark.parametrize("asleep_at", [1, 2, 3, 4, 5])
def test_an_owner_that_was_declared_dead_cannot_commit(tmp_path, asleep_at):
    """Whenever it falls asleep: between its last look and the rename, too."""
    sleeper = Sleeper(tmp_path, asleep_at)
    committed = []
    try:
        for step in (1, 2, 3):
            sleeper.save(f"step-{step:08d}")
            committed.append(f"step-{step:08d}")
    except OSError:
        pass
    root = tmp_path / "checkpoints"
    assert len(committed) == (asleep_at - 1) // 2
    assert sorted(p.name for p in root.glob("step-*")) == [*committed, "step-00000009"]
    assert (root / "latest").read_text().strip() == "step-00000009"


@pytest.mark.distributed
def test_a_run_that_is_taken_over_ends_without_a_checkpoint_of_its_own(zygote, tmp_path):
    """Two ranks; all leave at the same step, since only rank 0 knows."""
    launched = zygote.start(
        tmp_path / "log.txt",
        world=2,
        folder=str(tmp_path),
        epochs=500,
        trouble={"pause_s": 0.02},
        owner={"beat_s": 0.2, "lost_s": 60.0},
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "checkpoints" / "latest").exists():
        assert time.monotonic() < deadline, launched.text()
        time.sleep(0.05)
    move_elsewhere(tmp_path, job="1", restart="0")
    successor = RunOwnership(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner_module, "job_state", lambda job: "GONE")
        successor.acquire()
    CheckpointFolder(tmp_path / "checkpoints", successor.number).clean()
    before = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert launched.wait() == [1, 1]
    assert "another process has taken over" in launched.text()
    after = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert after == before


def test_an_owner_that_cannot_be_read_is_unknown_and_not_gone(tmp_path):
    """To who only looks; who wants the run hears what the storage says."""
    (tmp_path / owner_module.FOLDER / "00000001").mkdir(parents=True)
    ownership = RunOwnership(tmp_path)
    assert ownership.owner() is None and not ownership.was_released()
    with pytest.raises(IsADirectoryError):
        ownership.acquire()
