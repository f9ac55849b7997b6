"""The dispatcher: exit codes and messages, as a user at a shell meets them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_modules.cli.main import COMMANDS, main


def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lightning_modules.cli.main", *words],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=120,
    )


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {command}" in listed for command in COMMANDS)


def test_no_command_is_a_users_mistake(capsys: pytest.CaptureFixture[str]):
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().out


def test_unknown_command_names_the_valid_ones(capsys: pytest.CaptureFixture[str]):
    assert main(["trian"]) == 2
    error = capsys.readouterr().err
    assert "'trian'" in error and "fit" in error and "Traceback" not in error


def test_every_command_has_its_module():
    for module, _ in COMMANDS.values():
        path = Path(__file__).parents[2].joinpath(*module.split("."))
        assert path.with_suffix(".py").exists() or (path / "__init__.py").exists(), module


def test_missing_file_is_a_users_mistake_without_a_traceback(tmp_path: Path):
    result = run("fit", "--config", str(tmp_path / "absent.yaml"))
    assert result.returncode == 2
    assert "absent.yaml" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setitem(COMMANDS, "fit", ("lightning_modules.cli.absent_module", ""))
    assert main(["fit"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_the_unrelated_kernels_distribution_is_refused(tmp_path: Path):
    info = tmp_path / "kernels-0.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9.0\n")
    result = run("--version", PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert "kernels" in result.stderr and "pip uninstall" in result.stderr
