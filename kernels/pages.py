"""Generated tables inside hand-written Markdown pages."""

from __future__ import annotations

from pathlib import Path


def write_between(page: Path, name: str, content: str) -> None:
    """Replace what stands between `<!-- begin: name -->` and `<!-- end: name -->`.

    Raises:
        ValueError: if the page has no such markers.
    """
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    text = page.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise ValueError(f"{page} has no lines {begin!r} and {end!r} to write between")
    before, rest = text.split(begin, 1)
    after = rest.split(end, 1)[1]
    page.write_text(f"{before}{begin}\n{content}\n{end}{after}", encoding="utf-8")
