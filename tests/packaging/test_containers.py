"""The container files, read by their linters; none is built here."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[2]
DEFINITION = ROOT / ".ci" / "eva02-at.def"
SHELL = [
    *ROOT.glob("slurm/*"),
    *(p for p in ROOT.glob(".ci/*") if p.is_file() and p.suffix in ("", ".sh")),
]


def tool(name: str) -> str:
    """Beside this Python, else anywhere; hadolint's wheel is for x86-64 alone."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed here")


def run(*words: str, given: str | None = None) -> tuple[int, str]:
    done = subprocess.run(words, input=given, capture_output=True, text=True, cwd=ROOT)
    return done.returncode, done.stdout + done.stderr


def sections(text: str) -> dict[str, str]:
    """An Apptainer definition's sections; the header is `""`."""
    parts = re.split(r"^%(\w+)\n", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def test_hadolint_has_nothing_to_say() -> None:
    code, told = run(tool("hadolint"), "--failure-threshold", "style", "Dockerfile")
    assert code == 0, told
    code, told = run(tool("hadolint"), "-", given="FROM ubuntu\nRUN cd /x && sudo ls\n")
    assert code != 0 and "DL3006" in told  # it does look


def test_neither_image_runs_as_root_and_both_are_the_same_base() -> None:
    docker = (ROOT / "Dockerfile").read_text()
    bases = set(re.findall(r"^FROM (\S+)", docker, re.MULTILINE))
    assert len(bases) == 1 and re.fullmatch(r"nvidia/cuda:[\w.-]+", *bases)
    users = re.findall(r"^USER (\S+)", docker, re.MULTILINE)
    assert users and users[-1] not in ("root", "0")
    parts = sections(DEFINITION.read_text())
    assert f"From: {next(iter(bases))}" in parts[""]
    assert {"files", "post", "environment", "runscript", "test"} <= set(parts)
    copied = [line.split()[0] for line in parts["files"].splitlines() if line.strip()]
    assert copied and all((ROOT / name).exists() for name in copied)
    kept = {
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"
    }
    assert set(copied) == kept


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shell_scripts_are_clean(path: Path) -> None:
    words = [tool("shellcheck"), "--shell=bash", "--external-sources", "--severity=warning"]
    words.append("--exclude=SC2034")  # variables of a file that others source
    code, told = run(*words, str(path))
    assert code == 0, told


@pytest.mark.parametrize("name", ["post", "environment", "runscript", "test"])
def test_the_definitions_shell_is_clean(name: str) -> None:
    part = sections(DEFINITION.read_text())[name]
    code, told = run(tool("shellcheck"), "--shell=sh", "-", given=part)
    assert code == 0, told


def test_conda_takes_a_python_that_is_supported() -> None:
    content = yaml.safe_load((ROOT / ".ci" / "environment.yml").read_text())
    python = next(d for d in content["dependencies"] if str(d).startswith("python="))
    told = re.search(r'requires-python = "(.+)"', (ROOT / "pyproject.toml").read_text())
    assert told is not None and python.removeprefix("python=") in SpecifierSet(told[1])
