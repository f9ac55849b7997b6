"""The dispatcher: exit codes and messages, as a user at a shell meets them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from lightning_modules.cli.main import COMMANDS, main
from lightning_modules.packaged import folder, recipe_names, with_recipe_paths


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


@pytest.mark.parametrize("shadows", [True, False], ids=["shadowing", "beside"])
def test_the_unrelated_kernels_distribution_is_refused_where_it_shadows(
    tmp_path: Path, shadows: bool
):
    info = tmp_path / "kernels-0.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9.0\n")
    if shadows:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("raise SystemExit('was run')\n")
    root = Path(__file__).parents[2]
    start = "import sys; from lightning_modules.cli.main import main; sys.exit(main(['--version']))"
    result = subprocess.run(
        [sys.executable, "-P", "-c", start],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{root}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == (2 if shadows else 0), result.stderr
    if shadows:
        assert str(tmp_path) in result.stderr and "--force-reinstall" in result.stderr


def recipe_words() -> list[tuple[list[str], list[str]]]:
    """Words as typed, and what becomes of them."""
    known = str(folder("configs") / "mir" / "eva02_at_base_sms.yaml")
    return [
        (["--config", "mir/eva02_at_base_sms"], ["--config", known]),
        (["--config=configs/mir/eva02_at_base_sms.yaml"], [f"--config={known}"]),
        (["-c", "./configs/mir/eva02_at_base_sms.yaml"], ["-c", known]),
        (
            ["--config", "own.yaml", "--run_dir=--config"],
            ["--config", "own.yaml", "--run_dir=--config"],
        ),
        (["--config={a: 1}", "--model.config=x"], ["--config={a: 1}", "--model.config=x"]),
        (["--config", "--help"], ["--config", "--help"]),
    ]


@pytest.mark.parametrize(("typed", "meant"), recipe_words())
def test_a_recipe_is_found_by_file_then_by_name(tmp_path: Path, monkeypatch, typed, meant):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").touch()
    assert with_recipe_paths(typed) == meant


def test_a_file_goes_before_a_packaged_recipe(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = Path("configs/mir/eva02_at_base_sms.yaml")
    own.parent.mkdir(parents=True)
    own.touch()
    assert with_recipe_paths(["--config", str(own)]) == ["--config", str(own)]


def test_an_unknown_recipe_names_the_nearest(capsys: pytest.CaptureFixture[str]):
    assert main(["fit", "--config", "mir/eva02_base_sms"]) == 2
    assert "mir/eva02_at_base_sms" in capsys.readouterr().err


def test_recipes_are_listed_shown_and_never_overwritten(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name in (*recipe_names(), "slurm/env.sh"):
        assert f"{name} " in listed
    assert main(["recipes", "copy", "strategy/zero2"]) == 0
    assert main(["recipes", "copy", "strategy/zero2"]) == 2
    assert "zero2.yaml is there already" in capsys.readouterr().err
    assert main(["recipes", "show", "strategy/zero2"]) == 0
    assert capsys.readouterr().out == Path("zero2.yaml").read_text()


def test_a_checkout_that_is_not_installed_has_a_version(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    assert main(["--version"]) == 0
    assert f"not installed, run from {Path(__file__).parents[2]}" in capsys.readouterr().out
