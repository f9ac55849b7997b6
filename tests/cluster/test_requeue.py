"""What slurm/requeue.sh decides from an exit code, with a `scontrol` that writes down its words."""

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


class Job:
    """One SLURM job whose command ends again and again."""

    def __init__(self, folder: Path, **environment: str) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "77",
            "SLURMD_NODENAME": "n0",
            "EVA02_AT_LOGS": str(folder / "logs"),
            "EVA02_AT_MAX_STOPS": "5",  # 50 take a while
            **environment,
        }
        self.restarts = 0
        (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >>{folder}/asked\n')
        (folder / "sleep").write_text("#!/bin/sh\n")  # until SLURM ends the script
        for program in ("scontrol", "sleep"):
            (folder / program).chmod(0o755)

    def end(self, code: int | str, **environment: str) -> tuple[bool, str]:
        """End the command with a code, or run one; whether it is requeued, and what is said."""
        asked = self.folder / "asked"
        asked.unlink(missing_ok=True)
        command = f"(exit {code})" if isinstance(code, int) else code
        script = f"set -uo pipefail; source slurm/requeue.sh; {command}; finish $?"
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=REPOSITORY,
            env={**self.environment, "SLURM_RESTART_COUNT": str(self.restarts), **environment},
            capture_output=True,
            text=True,
        )
        self.restarts += asked.exists()
        self.asked = asked.read_text() if asked.exists() else ""
        return asked.exists(), done.stdout + done.stderr

    def step(self, step: int) -> None:
        """The run has a complete checkpoint of a step, and has said where."""
        root = self.folder / "checkpoints"
        (root / f"step-{step:08d}").mkdir(parents=True)
        (root / f"step-{step:08d}" / "manifest.json").write_text("{}")
        (self.folder / "logs" / ".slurm-jobs" / "77" / "checkpoints").write_text(f"{root}\n")


def requeues(job: Job, code: int, limit: int = 100) -> int:
    count = 0
    while job.end(code)[0]:
        count += 1
        assert count < limit, "requeued without end"
    return count


@pytest.mark.parametrize(
    ("code", "times"), [(0, 0), (2, 0), (1, 3), (75, 3), (127, 3), (137, 3), (85, 5), (143, 5)]
)
def test_each_exit_code_is_tried_again_so_often(tmp_path, code, times):
    assert requeues(Job(tmp_path), code) == times


@pytest.mark.parametrize(("code", "times"), [(1, 3), (85, 5)])
def test_a_counter_that_cannot_be_written_bounds_the_requeues_too(tmp_path, code, times):
    (tmp_path / "logs").write_text("a file where the folder should be")
    assert requeues(Job(tmp_path), code) == times


def test_a_folder_that_every_node_has_to_itself_bounds_the_requeues_too(tmp_path):
    job = Job(tmp_path)
    for count in range(100):
        if not job.end(9, EVA02_AT_LOGS=str(tmp_path / f"node{count}"))[0]:
            break
    assert count == 3


def test_faults_are_forgotten_once_the_newest_checkpoint_moves_on(tmp_path):
    """A month with a fault every week, and steps in between, ends no job."""
    job = Job(tmp_path)
    for week in range(8):
        assert job.end(9)[0], f"given up in week {week}"
        job.step(100 * (week + 1))
    assert [job.end(9)[0] for _ in range(4)] == [True, True, True, False]


def test_a_task_of_an_array_is_requeued_by_its_own_name(tmp_path):
    job = Job(tmp_path, SLURM_ARRAY_JOB_ID="70", SLURM_ARRAY_TASK_ID="3")
    assert job.end(85)[0]
    assert job.asked == "requeue 70_3\n"


def test_a_job_that_is_over_leaves_nothing(tmp_path):
    for code in (0, 2, 9):
        requeues(Job(tmp_path), code)
        assert not list((tmp_path / "logs" / ".slurm-jobs").iterdir())


@pytest.mark.parametrize(("exclude", "words"), [("0", []), ("1", ["JobId=77 ExcNodeList=n0"])])
def test_a_command_that_a_node_lacks_is_its_fault(tmp_path, exclude, words):
    """slurmstepd's own word for it would be 2, the user's mistake."""
    job = Job(tmp_path, EVA02_AT_EXCLUDE=exclude)
    requeued, told = job.end('"${ON_NODE[@]}" /not/mounted/eva02-at fit')
    assert requeued and "exit code 127" in told, told
    assert job.asked.splitlines() == ["requeue 77", *(f"update {word}" for word in words)]


def test_what_a_task_says_and_returns_is_its_own(tmp_path):
    requeued, told = Job(tmp_path).end('"${ON_NODE[@]}" bash -c "echo words: $*; exit 2"')
    assert not requeued and "words:" in told
