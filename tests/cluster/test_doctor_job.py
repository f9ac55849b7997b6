"""`eva02-at doctor` as the first step of a real two-node job."""

import json
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

pytestmark = [pytest.mark.slurm, pytest.mark.distributed]


def submit(slurm, folder: Path, limit: str) -> str:
    """train.sbatch on two nodes, with a stand-in for the training, not for the doctor."""
    folder.mkdir()
    command = folder / "command"
    program = f"{sys.executable} -m lightning_modules.cli.main"
    command.write_text(
        f"#!/bin/bash\n{limit}\n"
        f'if [[ $1 == doctor ]]; then exec {program} "$@" --quick; fi\n'
        "echo training with $SRUN_CPUS_PER_TASK core\n"
    )
    command.chmod(0o755)
    slurm.environment |= {
        "EVA02_AT": str(command),
        "EVA02_AT_DOCTOR": str(folder / "doctor.json"),
        "EVA02_AT_LOGS": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    return slurm.submit(
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=1",
        f"--chdir={REPOSITORY}",
        f"--output={folder}/log.txt",
        str(REPOSITORY / "slurm" / "train.sbatch"),
    )


def test_the_doctor_goes_first_and_a_job_that_would_not_run_ends(slurm, tmp_path):
    fit, unfit = tmp_path / "fit", tmp_path / "unfit"
    try:
        job = submit(slurm, fit, limit="")
        ended = slurm.wait_for(job, "COMPLETED", "FAILED", seconds=240)
        log = (fit / "log.txt").read_text()
        assert ended == "COMPLETED", log
        told = json.loads((fit / "doctor.json").read_text())
        said = {finding["name"]: finding["text"] for finding in told["findings"]}
        assert said["all-reduce"].endswith("by gloo, 2 ranks on 2 nodes"), said
        assert said["shared folder"] == f"all nodes see {fit}"
        assert log.count("eva02-at doctor on") == 1 and "nothing stands in the way" in log
        assert log.count("training with 1 core") == 2

        job = submit(slurm, unfit, limit="ulimit -n 512")
        assert slurm.wait_for(job, "COMPLETED", "FAILED", seconds=240) == "FAILED"
        log = (unfit / "log.txt").read_text()
        assert "mend: `ulimit -n 512`" in log and "training with" not in log
        assert log.count("eva02-at doctor on") == 1  # and is not tried again
    finally:
        slurm.environment.pop("EVA02_AT_DOCTOR", None)
