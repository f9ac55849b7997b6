"""slurm/train.sbatch on a real two-node cluster: preempted, requeued, finished, nothing changed.

EVA02_AT_PREEMPTIONS=10 is the long form of the preemption test.
"""

import csv
import json
import os
import sys
import time
from pathlib import Path

import pytest
from cluster_runs import REAL, TOTAL, curve
from tiny_run import STEPS_PER_EPOCH, steps

REPOSITORY = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
PREEMPTIONS = int(os.environ.get("EVA02_AT_PREEMPTIONS", "2"))
EPOCHS = 2 + 2 * PREEMPTIONS  # SLURM takes a few steps' time to come round

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]


def submit(slurm, folder: Path, *words: str, **options) -> str:
    """Submit the tiny run through the project's own batch script, two nodes of one task."""
    folder.mkdir(exist_ok=True)
    command = folder / "tiny"
    script = Path(__file__).with_name("tiny_run.py")
    # as the command line does it: the flag first, then the imports that take seconds
    start = (
        "from lightning_modules.training.run.signals import STOP; STOP.install(); import runpy; "
        "from lightning_modules.training.run.launch import meet; meet(); "
        f"runpy.run_path('{script}', run_name='__main__')"
    )
    command.write_text(f'#!/bin/bash\nexec {sys.executable} -c "{start}" "$@"\n')
    command.chmod(0o755)
    slurm.environment |= {"EVA02_AT": str(command), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    return slurm.submit(
        "--nodes=2",
        "--ntasks-per-node=1",
        f"--chdir={REPOSITORY}",
        f"--output={folder}/log.txt",
        *words,
        str(REPOSITORY / "slurm" / "train.sbatch"),
        json.dumps({"folder": str(folder), **options}),
    )


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text()


def wait_for_steps(slurm, job, folder: Path, count: int) -> None:
    deadline = time.monotonic() + 240  # a start takes 10 s, on a loaded machine a minute
    while not (folder / "steps-0.jsonl").exists() or len(steps(folder)) < count:
        assert time.monotonic() < deadline, log(folder)
        assert slurm.state(job) not in ENDED, log(folder)
        time.sleep(0.1)


@pytest.mark.timeout(3000)
@pytest.mark.parametrize("strategy", ["zero2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_preempted_job_is_requeued_and_nothing_changes(slurm, tmp_path, untouched, strategy):
    """A job of higher priority takes the nodes; the run goes on when it has finished."""
    options = {"strategy": strategy, "epochs": EPOCHS, **REAL}
    pause = {"pause_s": 0.4}  # so that SLURM's scheduler comes round within the run
    job = submit(slurm, tmp_path, "--partition=low", trouble=pause, **options)
    before = 0
    for preemption in range(PREEMPTIONS):
        wait_for_steps(slurm, job, tmp_path, before + 1)  # this start has begun to train
        rival = slurm.submit("--nodes=2", "--partition=high", "--output=/dev/null", "--wrap=true")
        assert slurm.wait_for(rival, "COMPLETED", "FAILED") == "COMPLETED", log(tmp_path)
        before = len(steps(tmp_path))
        assert before < EPOCHS * STEPS_PER_EPOCH, f"finished before preemption {preemption}"
        slurm.wait_for(job, "RUNNING")
    assert slurm.wait_for(job, "COMPLETED", "FAILED", seconds=300) == "COMPLETED", log(tmp_path)
    assert log(tmp_path).count("after exit code 85") == PREEMPTIONS
    assert len(steps(tmp_path)) == EPOCHS * STEPS_PER_EPOCH  # every batch exactly once
    assert curve(tmp_path) == untouched(strategy, epochs=EPOCHS)[0]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_a_job_at_its_time_limit_saves_and_is_requeued(slurm, tmp_path, untouched, strategy):
    """SLURM sends SIGUSR1 to the tasks 95 s before the limit: some 25 s after each start."""
    words = ("--partition=low", "--time=2", "--signal=SIGUSR1@95")
    pause = {"pause_s": 3.0}  # 45 s in all: no start can be done before its signal comes
    job = submit(slurm, tmp_path, *words, strategy=strategy, trouble=pause, **REAL)
    ended = slurm.wait_for(job, "COMPLETED", "FAILED", seconds=280)
    assert ended == "COMPLETED", log(tmp_path)
    assert log(tmp_path).count("after exit code 85") >= 1
    assert "fault" not in log(tmp_path)
    assert len(steps(tmp_path)) == TOTAL
    assert curve(tmp_path) == untouched(strategy)[0]


def test_a_users_mistake_is_not_tried_again_and_a_fault_only_so_often(slurm, tmp_path):
    """Exit code 2 ends the job; another one is tried again EVA02_AT_MAX_FAULTS times."""
    slurm.environment |= {"EVA02_AT_MAX_FAULTS": "1", "EVA02_AT_LOGS": str(tmp_path)}
    for code, tries in ((2, 1), (9, 2)):
        folder = tmp_path / str(code)
        folder.mkdir()
        command = folder / "command"
        command.write_text(f"#!/bin/bash\necho started\nexit {code}\n")
        command.chmod(0o755)
        slurm.environment["EVA02_AT"] = str(command)
        job = slurm.submit(
            "--partition=low",
            f"--chdir={REPOSITORY}",
            f"--output={folder}/log.txt",
            str(REPOSITORY / "slurm" / "train.sbatch"),
        )
        assert slurm.wait_for(job, "COMPLETED", "FAILED") == "FAILED"
        assert log(folder).count("started") == tries


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_task_of_an_array_that_fails_takes_no_other_along(slurm, tmp_path):
    """Each task writes down its starts; one faults once, one stops once, one makes a mistake."""
    starts = f"echo $1 >>{tmp_path}/starts; n=$(grep -cx $1 {tmp_path}/starts)"
    ends = "[[ $1 == fault && $n == 1 ]] && exit 9; [[ $1 == stop && $n == 1 ]] && exit 85"
    command = executable(tmp_path / "command", f"{starts}; {ends}; [[ $1 != mistake ]] || exit 2")
    (tmp_path / "jobs.txt").write_text("fine\nfault\nstop\nmistake\n")
    slurm.environment |= {"EVA02_AT": str(command), "EVA02_AT_LOGS": str(tmp_path)}
    slurm.environment.pop("EVA02_AT_MAX_FAULTS", None)
    job = slurm.submit(
        "--partition=low",
        "--array=0-3%2",
        f"--chdir={REPOSITORY}",
        f"--output={tmp_path}/log-%a.txt",
        *(str(REPOSITORY / "slurm" / "array.sbatch"), str(tmp_path / "jobs.txt")),
    )
    ends = [slurm.wait_for(f"{job}_{task}", "COMPLETED", "FAILED") for task in range(4)]
    assert ends == ["COMPLETED", "COMPLETED", "COMPLETED", "FAILED"]
    starts = (tmp_path / "starts").read_text().split()
    counts = {name: starts.count(name) for name in ("fine", "fault", "stop", "mistake")}
    assert counts == {"fine": 1, "fault": 2, "stop": 2, "mistake": 1}


def test_a_node_without_the_command_is_left_alone(slurm, tmp_path):
    """The environment is mounted on the second node only."""
    first, second = slurm.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N").split()
    executable(tmp_path / second / "eva02-at", "echo started on $SLURMD_NODENAME")
    env = executable(tmp_path / "env.sh", f"EVA02_AT={tmp_path}/$SLURMD_NODENAME/eva02-at")
    slurm.environment |= {
        "EVA02_AT_ENV": str(env),
        "EVA02_AT_LOGS": str(tmp_path),
        "EVA02_AT_EXCLUDE": "1",
    }
    try:
        job = slurm.submit(
            "--partition=low",
            f"--chdir={REPOSITORY}",
            f"--output={tmp_path}/log.txt",
            str(REPOSITORY / "slurm" / "train.sbatch"),
        )
        assert slurm.wait_for(job, "COMPLETED", "FAILED") == "COMPLETED", log(tmp_path)
    finally:
        del slurm.environment["EVA02_AT_ENV"], slurm.environment["EVA02_AT_EXCLUDE"]
    assert f"started on {second}" in log(tmp_path)
    assert f"keeping off {first}" in log(tmp_path)


def test_two_steps_of_one_allocation_run_side_by_side(slurm, tmp_path, untouched):
    """Each of two ranks on two nodes, at the same time: no port is taken, no rank is confused."""
    submit(slurm, tmp_path, "--hold")  # for the command it writes
    lines = []
    for name in ("a", "b"):
        options = json.dumps({"folder": str(tmp_path / name), "epochs": 2, "strategy": "zero2"})
        words = f"srun --overlap --nodes=2 --ntasks=2 {tmp_path}/tiny '{options}'"
        lines.append(f"{words} >{tmp_path}/{name}.txt 2>&1 & {name}=$!")
    ends = "wait $a; a=$?; wait $b; b=$?; echo codes $a $b"
    batch = executable(tmp_path / "batch", "\n".join([*lines, ends]))
    words = ("--nodes=2", "--ntasks-per-node=1", f"--output={tmp_path}/codes.txt", str(batch))
    job = slurm.submit("--partition=high", *words)
    slurm.wait_for(job, "COMPLETED", "FAILED", seconds=240)
    told = [(tmp_path / f"{name}.txt").read_text() for name in ("a", "b")]
    assert (tmp_path / "codes.txt").read_text() == "codes 0 0\n", told
    assert curve(tmp_path / "a") == curve(tmp_path / "b")


def test_a_node_that_slurm_takes_for_dead_cannot_spoil_its_successor(slurm, tmp_path, untouched):
    """Its slurmd hangs, the job is started on the other node, and the first start runs on."""
    options = {"epochs": 12, "owner": {"beat_s": 1.0, "lost_s": 60.0}, "strategy": "ddp"}
    words = ("--nodes=1", "--partition=low")
    job = submit(slurm, tmp_path, *words, trouble={"pause_s": 0.5}, **options)
    wait_for_steps(slurm, job, tmp_path, 4)
    node = slurm.run("squeue", "-h", f"--jobs={job}", "-o", "%N")
    first = json.loads((tmp_path / ".owner" / "00000001").read_text()[12:])["pid"]
    with slurm.hanging(node):
        slurm.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=test")
        slurm.wait_for(job, "PENDING", "RUNNING")
        ended = slurm.wait_for(job, "COMPLETED", "FAILED", seconds=240)
        deadline = time.monotonic() + 60
        while Path(f"/proc/{first}").exists():  # its words are lost with its srun
            assert time.monotonic() < deadline, log(tmp_path)
            time.sleep(0.5)
    assert ended == "COMPLETED", log(tmp_path)
    assert "taking over" in log(tmp_path)
    assert f"SLURM job {job}" in log(tmp_path)
    done = curve(tmp_path, 1)  # what was done twice came out the same
    assert sorted(done) == list(range(12 * STEPS_PER_EPOCH))
    kept = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert kept[-1].name == f"step-{12 * STEPS_PER_EPOCH:08d}"
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def test_a_command_that_nobody_started_for_each_task_says_so_at_once(slurm, tmp_path, recipe):
    """`srun` was forgotten in a batch script; and a shell of `salloc` trains on one machine."""
    program = Path(sys.executable).with_name("eva02-at")
    words = f"--config {recipe} --run_dir={tmp_path}/run --trainer.accelerator=cpu"
    more = "--trainer.devices=1 --trainer.max_epochs=1"
    slurm.environment |= {"EVA02_AT_START_S": "60"}
    wrap = f"--wrap={program} fit {words} {more}; echo code $?"
    told = f"--output={tmp_path}/log.txt"
    job = slurm.submit("--partition=high", "--nodes=2", "--ntasks=2", told, wrap)
    slurm.wait_for(job, "COMPLETED", "FAILED")
    assert "code 2" in log(tmp_path)
    assert "not started by `srun`" in log(tmp_path)
    alone = f"{program} fit {words} {more}; echo code $?"
    out = slurm.run("salloc", "-Q", "-n1", "-phigh", "-Jtrain", "bash", "-c", alone)
    assert "code 0" in out, out


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("strategy", ["zero2", "ddp"])
def test_a_real_recipe_is_preempted_and_goes_on(slurm, tmp_path, recipe, strategy):
    """`eva02-at fit` itself, loaders, validation and all: every logged loss is the same."""

    def start(name: str) -> str:
        slurm.environment |= {"EVA02_AT": str(Path(sys.executable).with_name("eva02-at"))}
        (tmp_path / name).mkdir()
        return slurm.submit(
            "--nodes=2",
            "--ntasks-per-node=1",
            f"--chdir={REPOSITORY}",
            f"--output={tmp_path / name}/log.txt",
            str(REPOSITORY / "slurm" / "train.sbatch"),
            *("--config", str(recipe), "--config", f"configs/strategy/{strategy}.yaml"),
            *(f"--run_dir={tmp_path / name}", "--trainer.accelerator=cpu"),
            f"--trainer.max_epochs={6 * PREEMPTIONS}",
        )

    def losses(name: str) -> list[tuple[str, str]]:
        path = tmp_path / name / "logs" / "metrics.csv"
        if not path.exists():
            return []
        with path.open() as file:
            rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
        return [(row["step"], row["train/loss"]) for row in rows]

    whole = start("whole")
    assert slurm.wait_for(whole, "COMPLETED", "FAILED", seconds=900) == "COMPLETED"
    job = start("parts")
    for preemption in range(PREEMPTIONS):
        before = len(losses("parts"))
        deadline = time.monotonic() + 200
        while len(losses("parts")) < before + 4:
            assert time.monotonic() < deadline, log(tmp_path / "parts")
            time.sleep(0.1)
        rival = slurm.submit("--nodes=2", "--partition=high", "--output=/dev/null", "--wrap=true")
        slurm.wait_for(rival, "COMPLETED")
        assert slurm.state(job) != "COMPLETED", f"finished before preemption {preemption}"
        slurm.wait_for(job, "RUNNING")
    ended = slurm.wait_for(job, "COMPLETED", "FAILED", seconds=900)
    assert ended == "COMPLETED", log(tmp_path / "parts")
    assert log(tmp_path / "parts").count("after exit code 85") == PREEMPTIONS
    assert losses("parts") == losses("whole")
    assert len(losses("whole")) == 4 * 6 * PREEMPTIONS
