"""What a sweep asks of SLURM, told by programs that write down how they were called."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from sweep_runs import write_program

from lightning_modules.cli.main import main

SBATCH = """#!/usr/bin/env python3
import json, os, pathlib, sys
log = pathlib.Path(os.environ["CALLS"])
calls = json.loads(log.read_text()) if log.exists() else []
calls.append({"words": sys.argv[1:], "offset": os.environ["EVA02_AT_OFFSET"]})
log.write_text(json.dumps(calls))
print(f"{100 + len(calls)};cluster")
"""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "sbatch").write_text(SBATCH)
    (programs / "scontrol").write_text("#!/bin/sh\necho 'MaxArraySize            = 4'\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("CALLS", str(tmp_path / "calls.json"))
    monkeypatch.setenv("EVA02_AT", str(write_program(tmp_path)))
    for n in range(5):
        Path(f"{n}.pt").write_text(str(n))
    return tmp_path / "calls.json"


def submit(*words: str) -> int:
    start = ["sweep", "--checkpoints", "*.pt", "--benchmark", "mir", "--benchmark", "mcq"]
    return main([*start, "--output", "out", "--slurm", *words])


def test_long_arrays_are_cut_and_follow_each_other(calls: Path, capsys) -> None:
    assert submit("--throttle", "3", "--sbatch=--partition=gpu --gpus=1") == 0
    assert "submitted 101, 102, 103, 104" in capsys.readouterr().out
    made = json.loads(calls.read_text())
    arrays = [next(w for w in call["words"] if w.startswith("--array")) for call in made]
    assert arrays == ["--array=0-3%3", "--array=0-3%3", "--array=0-1%3", "--array=0"]
    after = [[w for w in call["words"] if w.startswith("--dependency")] for call in made]
    assert after == [[], *([f"--dependency=afterany:{job}"] for job in (101, 102, 103))]
    assert [call["offset"] for call in made] == ["0", "4", "8", "0"]
    assert all({"--partition=gpu", "--gpus=1"} <= set(call["words"]) for call in made)
    cells = Path(made[0]["words"][-1]).read_text().splitlines()
    assert len(cells) == 10 and all(len(line.split()) == 4 for line in cells)
    assert Path(made[3]["words"][-1]).read_text().split()[1] == "collect"


def test_what_was_killed_is_submitted_until_the_rounds_are_over(calls: Path) -> None:
    assert submit("--rounds", "2") == 0
    calls.unlink()
    assert main(["sweep", "collect", "out", "1"]) == 0
    assert len(json.loads(calls.read_text())) == 4  # nothing has a result
    calls.unlink()
    assert main(["sweep", "collect", "out", "2"]) == 0
    assert not calls.exists()
    assert Path("out/table.md").read_text().count("not run yet") == 10


def test_refusals_are_the_users_to_read(calls: Path, capsys, monkeypatch) -> None:
    sbatch = calls.parent / "bin" / "sbatch"
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition' >&2\nexit 1\n")
    assert submit() == 2
    assert "sbatch refused: sbatch: error: invalid partition" in capsys.readouterr().err
    monkeypatch.setenv("PATH", "/nowhere")
    assert submit() == 2
    assert "scontrol is not here" in capsys.readouterr().err


def test_blanks_in_the_path_are_refused(calls: Path, capsys) -> None:
    words = ["sweep", "--checkpoints", "0.pt", "--benchmark", "mir", "--slurm"]
    assert main([*words, "--output", "a b"]) == 2
    assert "blanks in the path" in capsys.readouterr().err
