"""The wheel, in an environment of its own and an empty folder: what it carries, that it runs."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from sweep_runs import results, write_checkpoint, write_program

ROOT = Path(__file__).parents[2]
SMALL_DEMO = (
    *("--clips", "24", "24", "12", "--trainer.max_epochs=3"),
    *("--data.init_args.global_batch_size=12", "--data.init_args.num_workers=0"),
)


@dataclass
class Installed:
    """The wheel and the environment that it is installed in."""

    wheel: Path
    bin: Path

    def run(self, folder: Path, *words: str, **environment: str) -> str:
        """`eva02-at WORDS` in a folder, without anything of the checkout on a path."""
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
        kept |= environment
        kept["PATH"] = f"{self.bin}:{kept['PATH']}"
        done = subprocess.run(
            ["eva02-at", *words], cwd=folder, env=kept, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Installed:
    """Build the wheel; install it beside the dependencies of this environment, not beside ours.

    A path file does not run the path files of the folder that it names, so that the editable
    installation there stays out of reach.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("*.whl")
    home = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    (site,) = home.glob("lib/*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(home / "bin" / "python")
    install = ["--python", python, "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run([*pip, *install], check=True)
    return Installed(wheel, home / "bin")


def test_the_wheel_carries_every_recipe_and_script(installed: Installed):
    held = set(zipfile.ZipFile(installed.wheel).namelist())
    for name in ("configs", "slurm"):
        for path in (ROOT / name).rglob("*"):
            if path.is_file():
                assert f"lightning_modules/{path.relative_to(ROOT)}" in held
    kinds = [f"lightning_modules/**/*.{kind}" for kind in ("j2", "yaml", "css", "js", "html")]
    for pattern in ("kernels/*.[ch]", "datamodules/assets/*", *kinds):
        found = [str(path.relative_to(ROOT)) for path in ROOT.glob(pattern)]
        assert found and set(found) <= held
    tops = {name.split("/")[0] for name in held if ".dist-info" not in name}
    assert tops == {"kernels", "datamodules", "lightning_modules"}


def test_recipes_and_submit_need_no_checkout(installed: Installed, recipe, tmp_path: Path):
    where = installed.run(tmp_path, "recipes", "show", "slurm/train.sbatch")
    assert "#SBATCH --requeue" in where
    installed.run(tmp_path, "recipes", "copy", "mir/eva02_at_base_sms", "mine.yaml")
    source = ROOT / "configs" / "mir" / "eva02_at_base_sms.yaml"
    assert (tmp_path / "mine.yaml").read_text() == source.read_text()
    printed = installed.run(
        *(tmp_path, "submit", "--dry-run", "--gpus-per-node=2", "--config", str(recipe)),
        *("--config", "strategy/zero2", "--run_dir=run"),
    )
    (script,) = installed.bin.parent.glob(
        "lib/*/site-packages/lightning_modules/slurm/train.sbatch"
    )
    assert f" {script} --config" in printed
    assert str(ROOT) not in printed


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel(installed: Installed, tmp_path: Path):
    installed.run(tmp_path, "demo", *SMALL_DEMO)
    metrics = json.loads((tmp_path / "runs" / "demo" / "metrics.json").read_text())
    assert 0 < metrics["fine_tuned"]["map"]["avg"] < 100
    assert (tmp_path / "runs" / "demo" / "report.html").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.slow
@pytest.mark.slurm
def test_jobs_run_from_the_wheel(installed: Installed, slurm, recipe, tmp_path: Path):
    words = ["--gpus-per-node=0", "--cpus-per-gpu=1", "--sbatch=--partition=high"]
    words += ["--config", str(recipe), "--config", "strategy/single", "--run_dir=run"]
    words += ["--trainer.accelerator=cpu"]
    job = installed.run(tmp_path, "submit", *words, **slurm.environment).split()[-1]
    state = slurm.wait_for(job, "COMPLETED", "FAILED", seconds=200)
    log = (tmp_path / "run" / f"slurm-{job}.out").read_text()
    assert state == "COMPLETED", log
    assert list((tmp_path / "run" / "checkpoints").glob("step-*")), log

    for step in (1, 2):
        write_checkpoint(tmp_path / "swept", step, "x" * step)
    program = str(write_program(tmp_path))
    words = ["--checkpoints", "swept", "--benchmark", "mir", "--output", "out", "--slurm"]
    told = installed.run(
        *(tmp_path, "sweep", *words, "--sbatch=--partition=high"),
        **{**slurm.environment, "EVA02_AT": program},
    )
    jobs = re.search(r"submitted ([\d, ]+)", told)
    assert jobs is not None, told
    assert slurm.wait_for(jobs[1].split(", ")[-1], "COMPLETED", "FAILED") == "COMPLETED"
    assert len(results(tmp_path / "out")) == 2
