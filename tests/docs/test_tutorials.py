"""The tutorials run as they are written, on small stand-ins for what they download."""

from __future__ import annotations

from pathlib import Path

import pytest
from docs_runner import Step, run, steps

TUTORIALS = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.md"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path: Path, tmp_path: Path) -> None:
    found = steps(path.read_text())
    assert sum(step.path is None for step in found) >= 3
    for step in found:
        run(step, tmp_path)


PAGE = """
<!-- prepare
echo made > input
-->
```python title="mine.py"
print(open("input").read())
```
<!-- not run: it needs a cluster -->
```console
$ false
```
<!-- run instead: echo short > long -->
```console
$ exit 3
```
```console
$ python \\
    mine.py
made
$ cat long
```
"""


def test_a_page_is_taken_apart(tmp_path: Path) -> None:
    found = steps(PAGE)
    assert [step.path for step in found] == [None, "mine.py", None, None, None]
    for step in found:
        run(step, tmp_path)
    assert (tmp_path / "long").read_text() == "short\n"


@pytest.mark.parametrize("step", [Step("false"), Step("echo one", expected="two\n")])
def test_what_goes_otherwise_is_seen(step: Step, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"\$ (false|echo one)"):
        run(step, tmp_path)


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path) -> None:
    """Every cell, in a kernel of its own; the page that the site shows is made of the result."""
    nbformat, client = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    book = nbformat.read(TUTORIALS[0].parent / "embeddings.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "committed without outputs"
    client.NotebookClient(
        book, timeout=200, resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    shown = [output for cell in book.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert any("torch.Size([12, 3])" in str(output) for output in shown)
