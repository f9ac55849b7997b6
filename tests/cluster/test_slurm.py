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
    # as cli/main.py does it: the flag first, then the imports that take seconds
    start = (
        "from lightning_modules.training.run.signals import STOP; STOP.install(); import runpy; "
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
