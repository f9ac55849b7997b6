"""Wrong uses are answered in one line, with exit code 2, as the page of commands says."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from wrong_uses import BEGIN, END, USES, prepare, row, told

from lightning_modules.cli.main import main

PAGE = (Path(__file__).parents[2] / "docs" / "commands.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("wrong")
    prepare(made)
    return made


@pytest.mark.parametrize("use", USES)
def test_a_wrong_use_is_answered_as_the_page_says(folder: Path, use: str, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    code = main(shlex.split(use))
    error = capsys.readouterr().err
    assert code == 2 and "Traceback" not in error
    message = told(error).replace(f"{folder.resolve()}/", "")
    assert len(message) > 20 and "class '" not in message and "typing." not in message
    assert f"\n{row(use, message, code)} " in PAGE
    assert sorted(folder.rglob("*")) == before, "it began to write"


def test_the_page_has_no_other_rows():
    table = PAGE.split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    assert [line.split("`")[1] for line in table] == [f"eva02-at {use}" for use in USES]
