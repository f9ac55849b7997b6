"""`eva02-at sweep --slurm` on a real two-node cluster: a job killed, a checkpoint damaged."""

import csv
import time
from pathlib import Path

import pytest
from sweep_runs import results, write_checkpoint, write_program

from lightning_modules.cli.main import main
from lightning_modules.sweep.plan import Plan

pytestmark = pytest.mark.slurm


def wait_until(true, what: str, seconds: float = 180.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def task_of(slurm, sweep: Path, step: int, benchmark: str) -> str:
    """The array task of a cell, as 12_3: its line in the array's list."""
    cells = Plan.load(sweep).cells
    key = next(c.key for c in cells if c.step == step and c.benchmark[0] == benchmark)
    (listed,) = (sweep / "jobs").glob("cells-*.txt")
    lines = listed.read_text().splitlines()
    job = slurm.run("squeue", "-h", "-t", "R", "-n", "eva02-at-sweep", "-o", "%F").split()[0]
    return f"{job}_{next(n for n, line in enumerate(lines) if key in line)}"


@pytest.fixture
def started(slurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Six checkpoints, the fourth damaged so that only reading it shows; two benchmarks."""
    monkeypatch.chdir(tmp_path)
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("EVA02_AT", str(write_program(tmp_path)))
    for step in range(1, 7):
        write_checkpoint(Path("run"), step, "damaged" if step == 4 else "x" * step)
    words = ["--checkpoints", "run", "--benchmark", "mir --hang-at xx", "--benchmark", "mcq"]
    words += ["--output", "out", "--slurm", "--throttle", "2", "--sbatch=--partition=low"]
    assert main(["sweep", *words]) == 0
    return tmp_path / "out"


def test_killed_and_damaged_cells_leave_the_table_whole(slurm, started: Path) -> None:
    """Six checkpoints on two benchmarks; the cancelled task is submitted again by itself."""
    wait_until(lambda: list((started / "weights").glob("*.hung")), "the cell did not begin")
    assert slurm.run("scancel", task_of(slurm, started, 2, "mir")) == ""
    logs = "\n".join(path.name for path in (started / "logs").iterdir())
    wait_until(lambda: len(results(started)) == 10, f"cells are missing; logs: {logs}")
    wait_until(
        lambda: not slurm.run("squeue", "-h", "-n", "eva02-at-sweep"), "the sweep did not end"
    )
    # a task that was cancelled is not requeued by SLURM: the collecting job submitted it
    collected = [p.read_text() for p in (started / "jobs").glob("collect-*-2.txt")]
    assert len(collected) == 1, "nothing was submitted again"
    table = (started / "table.md").read_text()
    assert table.count("\n| run | ") == 6 and table.count("failed") == 2 * 3  # figures a benchmark
    for benchmark in ("mir", "mcq"):
        assert f"- run @ 4, {benchmark}" in table
    assert "cannot be read" in table
    with (started / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({(row["step"], row["benchmark"]) for row in rows if row["value"]}) == 10
    conversions = (started / "weights" / "conversions.txt").read_text().splitlines()
    whole = [line for line in conversions if "step-00000004" not in line]
    assert len(whole) == 5  # each checkpoint once, for both benchmarks
