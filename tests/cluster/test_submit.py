"""`eva02-at submit`: what it checks, what it prints, what it queues."""

import json
import subprocess
from pathlib import Path

import pytest

from lightning_modules.cli.submit import main
from lightning_modules.training.run.owner import RunOwnership


@pytest.fixture
def words(recipe, tmp_path):
    return ["--config", str(recipe), f"--run_dir={tmp_path}/run"]


def test_a_dry_run_prints_the_job_and_queues_nothing(words, capsys):
    job = ["--nodes=2", "--gpus-per-node=4", "--sbatch=--partition=gpu", "--dry-run"]
    assert main([*job, *words, "--model.optimizer.lr=0.1"]) == 0
    printed = capsys.readouterr().out
    assert "8 ranks, 1 pairs each" in printed
    assert "--nodes=2 --ntasks-per-node=4 --gpus-per-node=4" in printed
    assert "--partition=gpu slurm/train.sbatch --config" in printed
    assert "--model.optimizer.lr=0.1" in printed
    assert "#SBATCH --requeue" in printed


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (["--gpus-per-node=3"], "does not divide over 3 ranks"),
        (["--nodes=0"], "at least 1"),
        (["--time=tomorrow"], "HH:MM:SS"),
        (["--env=nowhere.sh"], "nowhere.sh does not exist"),
        (["--data.train=[nowhere/manifest.json]"], "shards build"),
        (["--model.init_checkpoint=nowhere.pt"], "nowhere.pt does not exist"),
        (["--checkpoints.keep_last=100000000"], "GiB free"),
        (["--model.optimizer.lrr=1"], "lrr"),
    ],
)
def test_a_job_that_could_not_run_is_refused(words, change, rule):
    with pytest.raises(ValueError, match=rule):
        main(["--gpus-per-node=2", "--dry-run", *words, *change])


def test_a_run_with_checkpoints_is_gone_on_with(words, tmp_path, capsys):
    (tmp_path / "run" / "checkpoints" / "step-00000400").mkdir(parents=True)
    gone = "--model.init_checkpoint=gone.pt"
    assert main(["--gpus-per-node=2", "--dry-run", *words, gone]) == 0
    assert "step-00000400" in capsys.readouterr().out


@pytest.mark.slurm
def test_a_job_is_queued(slurm, words, tmp_path, monkeypatch, capsys):
    """Submitted for real, with a stand-in for the training command."""
    command = tmp_path / "command"
    command.write_text("#!/bin/bash\necho words: $@\n")
    command.chmod(0o755)
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.setenv("EVA02_AT", str(command))
    job = ["--gpus-per-node=0", "--nodes=2", "--cpus-per-gpu=1", "--sbatch=--partition=high"]
    assert main([*job, *words]) == 0
    number = capsys.readouterr().out.split()[-1]
    assert slurm.wait_for(number, "COMPLETED", "FAILED") == "COMPLETED"
    log = (tmp_path / "run" / f"slurm-{number}.out").read_text()
    assert log.count("words: fit --trainer.num_nodes=2 --trainer.devices=1 --config") == 2


@pytest.mark.slurm
def test_a_second_job_for_a_run_is_refused_while_one_is_queued_or_works(
    slurm, words, tmp_path, monkeypatch, capsys
):
    """Pending, then running, then ended; and behind it, if that is what is asked for."""
    command = tmp_path / "command"
    command.write_text(f"#!/bin/bash\nuntil [[ -e {tmp_path}/end ]]; do sleep 0.2; done\n")
    command.chmod(0o755)
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.setenv("EVA02_AT", str(command))
    job = ["--gpus-per-node=0", "--cpus-per-gpu=1", *words]
    assert main(["--sbatch=--hold --partition=high", *job]) == 0
    number = capsys.readouterr().out.split()[-1]
    with pytest.raises(ValueError, match=rf"job {number} is queued .*PENDING.*scancel {number}"):
        main(job)
    slurm.run("scontrol", "release", number)
    slurm.wait_for(number, "RUNNING")
    with pytest.raises(ValueError, match=rf"job {number} .*RUNNING"):
        main(job)
    assert main([f"--sbatch=--hold --dependency=afterany:{number}", *job]) == 0
    slurm.run("scancel", capsys.readouterr().out.split()[-1])
    (tmp_path / "end").touch()
    slurm.wait_for(number, "COMPLETED")
    assert main(["--dry-run", *job]) == 0


def test_a_run_that_is_in_use_is_not_submitted(words, tmp_path):
    """By a process of this machine, without SLURM."""
    holder = subprocess.Popen(["sleep", "60"])
    try:
        ownership = RunOwnership(tmp_path / "run")
        ownership.acquire()
        path = tmp_path / "run" / ".owner" / "00000001"
        start = Path(f"/proc/{holder.pid}/stat").read_text().split()[21]
        owner = json.loads(path.read_text()[12:]) | {"pid": holder.pid, "started": start}
        path.write_text(f"{0:012d}\n{json.dumps(owner)}\n")
        with pytest.raises(ValueError, match=f"in use by process {holder.pid}"):
            main(["--gpus-per-node=2", "--dry-run", *words])
    finally:
        holder.kill()
        holder.wait()
    assert main(["--gpus-per-node=2", "--dry-run", *words]) == 0


def test_a_percent_sign_in_the_runs_name_is_not_sbatchs(recipe, tmp_path, capsys):
    words = ["--config", str(recipe), f"--run_dir={tmp_path}/run-%j"]
    assert main(["--gpus-per-node=2", "--dry-run", *words]) == 0
    assert f"--output={tmp_path}/run-%%j/slurm-%j.out" in capsys.readouterr().out


def test_without_sbatch_the_user_is_told(words, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="login node"):
        main(["--gpus-per-node=2", *words])
