"""The page of downloads names every file that a recipe looks for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "downloads.md").read_text()
RECIPES = sorted(p for p in (ROOT / "configs").glob("*/*.yaml") if p.parent.name != "demo")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_what_a_recipe_looks_for_is_on_the_page(recipe: Path) -> None:
    text = recipe.read_text()
    weights = re.findall(r"checkpoint: (checkpoints/\S+)", text)
    data = re.findall(r"\$\{data_dir\}/([\w-]+)", text)
    missing = [name for name in (*weights, *(f"data/{name}" for name in data)) if name not in PAGE]
    assert missing == []


def test_there_is_something_to_look_for() -> None:
    texts = "".join(path.read_text() for path in RECIPES)
    assert "checkpoint: checkpoints/" in texts and "${data_dir}/" in texts
    assert "`data/ek100_mir_test`" in PAGE and "ek100_test" not in PAGE
