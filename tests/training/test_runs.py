"""The table of runs, over folders in every state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_modules.cli.main import main
from lightning_modules.training.run.checkpoint_store import Manifest, checkpoint_name
from lightning_modules.training.run.owner import RunOwnership
from lightning_modules.training.runs import ENDED, read_run

CONFIG = """
trainer: {max_epochs: 3}
checkpoints: {monitor: val/map_avg, mode: max}
"""


def make_run(folder: Path, *steps: tuple[int, int, float], config: str = CONFIG) -> Path:
    """A run with a checkpoint for each (step, epoch, metric)."""
    (folder / "logs").mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    rows = "step,train/loss,speed/clips_per_s\n" + "".join(
        f"{step},0.5,{100 + step if step % 2 == 0 else ''}\n" for step in range(1, 8)
    )
    (folder / "logs" / "metrics.csv").write_text(rows)
    for step, epoch, value in steps:
        place = folder / "checkpoints" / checkpoint_name(step)
        place.mkdir(parents=True)
        Manifest(step, epoch, 1, "plain", {"val/map_avg": value}).write(place)
    return folder


def end(run: Path, step: int) -> Path:
    """As a run leaves its folder that came to its end."""
    ended = {"step": step, "max_steps": -1, "max_epochs": 3}
    (run / ENDED).write_text(json.dumps(ended))
    return run


def die_in(folder: Path) -> None:
    """A process takes the run and goes without a word."""
    program = (
        "import os, sys\n"
        "from lightning_modules.training.run.owner import RunOwnership\n"
        "RunOwnership(sys.argv[1]).acquire()\nos._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(folder)], check=False, timeout=60)


def test_every_state_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    end(make_run(tmp_path / "a" / "done", (4, 1, 30.0), (12, 2, 20.0)), step=12)
    make_run(tmp_path / "b", (4, 1, float("nan")), (8, 2, 25.0))
    make_run(tmp_path / "c")
    make_run(tmp_path / "d", (8, 2, 1.0))
    die_in(tmp_path / "d")
    ownership = RunOwnership(make_run(tmp_path / "e", (8, 2, 1.0)))
    program = (
        "import sys\nfrom lightning_modules.training.run.owner import RunOwnership\n"
        "RunOwnership(sys.argv[1]).acquire()\nprint('mine', flush=True)\nsys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(ownership.run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "mine\n"
        assert main(["runs", str(tmp_path)]) == 0
        table = capsys.readouterr().out.splitlines()
        assert main(["runs", str(tmp_path), "--json"]) == 0
        told = {Path(r["path"]).name: r for r in json.loads(capsys.readouterr().out)}
        process.communicate("")
    assert {name: run["state"] for name, run in told.items()} == {
        "done": "finished",
        "b": "stopped",
        "c": "no checkpoint",
        "d": "died",
        "e": "running",
    }
    assert told["done"]["best"] == 30.0 and told["b"]["best"] == 25.0 and told["c"]["best"] is None
    assert told["done"]["step"] == 12 and told["b"]["step"] == 8 and told["c"]["step"] == 7
    assert told["b"]["clips_per_s"] == 106.0
    assert f"process {process.pid} of" in told["e"]["owner"]
    assert table[0].split()[:3] == ["run", "state", "step"] and table[1].startswith("a/done  ")
    assert "val/map_avg 30.00" in table[1] and "3 epochs" in table[1]


def test_damaged_parts_of_a_run_are_passed_over(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", (4, 1, 30.0), (8, 2, 35.0))
    (run / "checkpoints" / checkpoint_name(8) / "manifest.json").write_text("{")
    (run / "config.yaml").write_bytes(b"\xff: [")
    (run / "logs" / "metrics.csv").unlink()
    state = read_run(run)
    assert (state.step, state.state, state.best) == (4, "stopped", None)


def test_a_run_that_has_been_extended_is_not_finished(tmp_path: Path) -> None:
    run = end(make_run(tmp_path / "r", (8, 2, 1.0)), step=8)
    assert read_run(run).state == "finished"
    (run / "config.yaml").write_text(CONFIG.replace("max_epochs: 3", "max_epochs: 4"))
    assert read_run(run).state == "stopped"
    end(run, step=4)  # of an earlier end: the newest checkpoint is further
    (run / "config.yaml").write_text(CONFIG)
    assert read_run(run).state == "stopped"


def test_a_long_log_is_read_from_its_end(tmp_path: Path) -> None:
    run = make_run(tmp_path / "r", (4, 1, 1.0))
    lines = "".join(f"{step},0.5,{step}\n" for step in range(50_000))
    (run / "logs" / "metrics.csv").write_text("step,train/loss,speed/clips_per_s\n" + lines)
    assert (read_run(run).step, read_run(run).clips_per_s) == (49_999, 49_999.0)


def test_no_run_is_a_users_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", str(tmp_path)]) == 2
    assert "no run in" in capsys.readouterr().err
