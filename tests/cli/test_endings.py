"""Exit codes by what failed: 2 ends a job for good, 75 is worth another try, 1 is a bug of ours."""

from __future__ import annotations

import errno
import os
import sys
import types

import pytest

from datamodules.stream.retry import StorageUnavailable
from lightning_modules.cli import endings
from lightning_modules.cli.main import COMMANDS, main


@pytest.fixture
def command(monkeypatch):
    """Run `fit` with a stand-in that raises, as our own module would."""

    def run(error: Exception, *words: str) -> int:
        module = types.ModuleType("lightning_modules.cli.stand_in")
        module.error = error
        exec("def main(argv):\n    raise error\n", module.__dict__)
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(COMMANDS, "fit", (module.__name__, ""))
        return main(["fit", *words])

    return run


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a margin of -1"), 2),
        (FileNotFoundError("no such recipe"), 2),
        (PermissionError(errno.EACCES, "denied"), 2),
        (KeyError("x"), 1),
        (RuntimeError("x"), 1),
        (OSError("writing step-00000004 failed on rank 1: OSError: disk on fire"), 75),
        (StorageUnavailable("a.tar: no answer"), 75),
        (endings.MachineFault("no driver"), 75),
        *((OSError(number, "x"), 75) for number in (errno.ENOSPC, errno.EROFS, errno.EDQUOT)),
        *((OSError(number, "x"), 75) for number in (errno.EIO, errno.ESTALE, errno.EMFILE)),
        (OSError(errno.EADDRINUSE, "x"), 75),
    ],
    ids=repr,
)
def test_the_exit_code_is_that_of_what_failed(command, capsys, error, code):
    assert command(error, "--config=x.yaml") == code
    told = capsys.readouterr().err
    assert ("Traceback" in told) == (code == 1)
    if code == 75:
        assert told.startswith("eva02-at: fault on ") and len(told.splitlines()) == 1


def test_a_mistake_that_a_fault_brought_about_is_the_fault(command):
    """`no manifest at ...` is what our reader makes of any error of the file system."""
    for number, code in ((errno.EIO, 75), (errno.ESTALE, 75), (errno.ENOENT, 2)):
        error = ValueError("no manifest at /data/manifest.json")
        error.__cause__ = OSError(number, os.strerror(number))
        assert command(error, "--config=x.yaml") == code


@pytest.mark.parametrize("has_checkpoints", [False, True])
@pytest.mark.parametrize("named_in", ["words", "recipe"])
def test_a_recipe_that_is_missing_was_there_once_where_the_run_has_checkpoints(
    tmp_path, capsys, monkeypatch, has_checkpoints, named_in
):
    """Not mounted on this node: to be tried again, on another one."""
    monkeypatch.setenv("EVA02_AT_JOB", str(tmp_path))
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    run_dir = tmp_path / "run"
    if has_checkpoints:
        (run_dir / "checkpoints" / "step-00000004").mkdir(parents=True)
    recipe, other = tmp_path / "recipe.yaml", tmp_path / "other.yaml"
    other.write_text(f"run_dir: {run_dir}\n")
    words = [f"--run_dir={run_dir}"] if named_in == "words" else ["--config", str(other)]
    assert main(["fit", *words, "--config", str(recipe)]) == (75 if has_checkpoints else 2)
    told = capsys.readouterr().err
    assert "Traceback" not in told and "recipe.yaml" in told
    nodes = tmp_path / "bad-nodes"
    assert nodes.exists() == has_checkpoints
    if has_checkpoints:
        assert nodes.read_text() == "n7\n"
        assert told.startswith("eva02-at: fault on n7: ")


@pytest.mark.parametrize(("line", "speaks"), [("trainr: {}", False), (None, True)])
def test_a_mistake_is_told_by_rank_0_and_a_missing_path_by_each(
    tmp_path, monkeypatch, capsys, line, speaks
):
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_PROCID", "1")
    if line is not None:
        (tmp_path / "recipe.yaml").write_text(line)
    assert main(["fit", "--config", str(tmp_path / "recipe.yaml")]) == 2
    assert ("eva02-at: error" in capsys.readouterr().err) == speaks


@pytest.mark.parametrize(
    ("given", "asked", "build", "code", "told"),
    [
        ("0,1", "auto", "12.8", 75, "no usable CUDA driver on this node"),
        ("0,1", "gpu", "12.8", 75, "SLURM_JOB_GPUS=0,1"),
        ("", "gpu", "12.8", 2, "finds no GPU here"),
        ("0,1", "auto", None, 2, "built without CUDA"),
        ("", "gpu", None, 2, "built without CUDA"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "test"])
def test_gpus_that_do_not_work_are_not_replaced_by_the_cpu(
    tmp_path, monkeypatch, capsys, given, asked, build, code, told, verb
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", build)
    monkeypatch.setenv("EVA02_AT_JOB", str(tmp_path))
    monkeypatch.setenv("SLURM_JOB_GPUS", given)
    words = ["--config=demo/pretrain", "--data_dir=data", f"--trainer.accelerator={asked}"]
    assert main([verb, *words, f"--run_dir={tmp_path / 'run'}"]) == code
    said = capsys.readouterr().err.splitlines()[-1]
    assert told in said
    assert (tmp_path / "bad-nodes").exists() == (code == 75)
    assert not (tmp_path / "run").exists()


def test_more_processes_than_cores_could_run_are_refused(tmp_path, capsys):
    words = ["--config=demo/pretrain", "--trainer.accelerator=cpu", "--trainer.devices=6400"]
    assert main(["fit", *words, f"--run_dir={tmp_path / 'run'}"]) == 2
    assert "6400 processes on" in capsys.readouterr().err
