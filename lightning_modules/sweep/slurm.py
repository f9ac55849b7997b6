"""A sweep as plain SLURM job arrays, through the packaged slurm/array.sbatch.

Each array has a file with one line a cell. A last job, after all arrays whatever became of them,
collects the results; where cells are missing, since their jobs were killed, it submits them again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from datamodules.files import write_whole
from lightning_modules.packaged import folder
from lightning_modules.sweep.cells import SweepFiles
from lightning_modules.sweep.plan import Cell

_DEFAULT_ARRAY_SIZE = 1001
_OPTIONS = "slurm.json"


@dataclass(frozen=True)
class SlurmOptions:
    """How a sweep is submitted.

    Attributes:
        throttle: Most cells that run at a time.
        sbatch: Words for sbatch, such as `--partition=gpu --gpus=1 --time=02:00:00`.
        rounds: How often cells whose jobs were killed are submitted, the first time included.
    """

    throttle: int = 16
    sbatch: tuple[str, ...] = ()
    rounds: int = 3

    def __post_init__(self) -> None:
        if self.throttle < 1 or self.rounds < 1:
            raise ValueError("throttle and rounds must be at least 1")

    @classmethod
    def load(cls, files: SweepFiles) -> SlurmOptions:
        """Read how a sweep was submitted."""
        raw = json.loads((files.directory / _OPTIONS).read_text())
        return cls(**{**raw, "sbatch": tuple(raw["sbatch"])})


def submit(
    files: SweepFiles, cells: Sequence[Cell], options: SlurmOptions, attempt: int = 1
) -> list[str]:
    """Submit cells as arrays, and the job that collects them.

    Arrays longer than the cluster allows are cut; one follows the other, so that the throttle
    holds for them together.

    Args:
        files: The sweep's.
        cells: What to run.
        options: How.
        attempt: 1, or more where the collecting job submits what is missing.

    Returns:
        The jobs' ids, the collecting one last.

    Raises:
        ValueError: sbatch refuses, with its words.
    """
    if re.search(r"\s", str(files.directory)):
        raise ValueError(
            f"{files.directory}: blanks in the path; slurm/array.sbatch cannot have any"
        )
    lines = [f"sweep cell {files.directory} {cell.key}" for cell in cells]
    name = f"{os.getpid()}-{attempt}"
    text = json.dumps(asdict(options), indent=1) + "\n"  # for the collecting job
    write_whole(files.directory / _OPTIONS, lambda path: path.write_text(text))
    work = _write_lines(files, f"cells-{name}.txt", lines)
    jobs: list[str] = []
    size = _max_array_size()
    for offset in range(0, len(lines), size):
        count = min(size, len(lines) - offset)
        words = [f"--array=0-{count - 1}%{options.throttle}"]
        words += [f"--dependency=afterany:{jobs[-1]}"] if jobs else []
        jobs.append(_sbatch(files, words + list(options.sbatch), work, offset))
    again = _write_lines(
        files, f"collect-{name}.txt", [f"sweep collect {files.directory} {attempt}"]
    )
    words = ["--array=0", f"--dependency=afterany:{jobs[-1]}", *options.sbatch]
    return [*jobs, _sbatch(files, words, again, 0)]


def _write_lines(files: SweepFiles, name: str, lines: list[str]) -> Path:
    path = files.directory / "jobs" / name
    write_whole(path, lambda temporary: temporary.write_text("\n".join(lines) + "\n"))
    return path


def _max_array_size() -> int:
    """Largest number of tasks in an array (their indices stay below it)."""
    told = _run(["scontrol", "show", "config"])
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", told, re.MULTILINE)
    return int(found[1]) if found else _DEFAULT_ARRAY_SIZE


def _sbatch(files: SweepFiles, words: list[str], work: Path, offset: int) -> str:
    scripts = folder("slurm")
    logs = files.directory / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "EVA02_AT_OFFSET": str(offset), "EVA02_AT_LOGS": str(logs)}
    environment["EVA02_AT_SLURM"] = str(scripts)
    beside = Path(sys.executable).with_name("eva02-at")
    if beside.exists():
        environment.setdefault("EVA02_AT", str(beside))
    told = _run(
        [
            "sbatch",
            "--parsable",
            f"--output={logs}/slurm-%A_%a.out",
            "--job-name=eva02-at-sweep",
            *words,
            str(scripts / "array.sbatch"),
            str(work),
        ],
        environment,
    )
    return told.strip().partition(";")[0]


def _run(words: list[str], environment: dict[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, check=False, timeout=120
        )
    except FileNotFoundError:
        raise ValueError(
            f"{words[0]} is not here: run on a machine that can submit jobs, or without --slurm"
        ) from None
    if done.returncode != 0:
        raise ValueError(f"{words[0]} refused: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout
