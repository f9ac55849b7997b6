"""The answers of a search as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from datamodules.video.frames import read_frames
from datamodules.video.windows import Unreadable, Window, in_children
from lightning_modules.inference.search_index import Hit
from lightning_modules.pages import page

_FRAMES, _HEIGHT = 3, 120
_NOTHING_FITS = 0.5
NOTHING_FITS = "Nothing here fits well: random sentences find windows that stand out as much."

_STYLE = """
h1 { font-size: 15px; font-weight: 500; color: var(--soft); margin: 0 0 4px; }
h2 { font-size: 24px; font-weight: 650; margin: 20px 0 14px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(380px, 100%), 1fr));
  gap: 16px; }
.card { overflow: hidden; }
.strip { display: grid; grid-template-columns: repeat(3, 1fr); gap: 2px; background: var(--line); }
.strip figure { margin: 0; position: relative; aspect-ratio: 4 / 3; background: #000; }
.strip img { width: 100%; height: 100%; object-fit: contain; display: block; }
.strip figcaption { position: absolute; right: 4px; bottom: 4px; padding: 0 5px; border-radius: 4px;
  background: rgb(0 0 0 / 65%); color: #fff; font-size: 11px; font-variant-numeric: tabular-nums; }
.lost { padding: 24px; color: var(--soft); }
.text { padding: 10px 14px 12px; }
.name { font-weight: 600; color: inherit; text-decoration: none; overflow-wrap: anywhere; }
.name:hover { color: var(--mark); text-decoration: underline; }
.facts { display: flex; align-items: center; gap: 10px; color: var(--soft); font-size: 13px;
  font-variant-numeric: tabular-nums; }
.rank { color: var(--mark); font-weight: 650; }
.bar { flex: 1; height: 5px; border-radius: 3px; background: var(--line); }
.bar i { display: block; height: 100%; border-radius: 3px; background: var(--mark); }
.unsure { color: var(--bad); }
footer { margin-top: 28px; color: var(--soft); font-size: 13px; }
details { margin-top: 6px; }
"""


@dataclass(frozen=True)
class Answer:
    """A query and its hits, best first.

    Attributes:
        query: As it was asked.
        hits: Windows.
        sure: For each hit, the share of sentences that mean nothing here whose best window stands
            out less (`Background.surer_than`); empty where that is not known.
    """

    query: str
    hits: Sequence[Hit]
    sure: Sequence[float] = ()

    @property
    def fits(self) -> bool:
        """False where the best hit stands out no more than a random sentence's usually does."""
        return not self.sure or self.sure[0] > _NOTHING_FITS


def clock(seconds: float) -> str:
    """73.25 -> 1:13.3; 3673 -> 1:01:13.0."""
    tenths = round(10 * seconds)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    start = f"{hours}:{minutes:02}" if hours else f"{minutes}"
    return f"{start}:{rest // 10:02}.{rest % 10}"


def search_page(
    answers: Sequence[Answer], folder: Path, facts: str, problems: Sequence[str], num_workers: int
) -> str:
    """Render answers with three frames of each hit.

    Args:
        answers: Queries and hits.
        folder: Names are shown relative to it.
        facts: A line about the index.
        problems: What could not be read.
        num_workers: Decoding processes.
    """
    windows = list(dict.fromkeys(hit.window for answer in answers for hit in answer.hits))
    strips = _strips(windows, num_workers)
    body = "".join(_section(answer, folder, strips) for answer in answers)
    lost = ""
    if problems:
        items = "".join(f"<li>{html.escape(problem)}</li>" for problem in problems)
        lost = f"<details><summary>{len(problems)} unreadable</summary><ul>{items}</ul></details>"
    return page(
        "; ".join(answer.query for answer in answers),
        f"<h1>Search in {html.escape(str(folder))}</h1>{body}"
        f"<footer>{html.escape(facts)}{lost}</footer>",
        _STYLE,
    )


def _section(answer: Answer, folder: Path, strips: dict[Window, list[str] | str]) -> str:
    sure: list[float | None] = [*answer.sure] or [None] * len(answer.hits)
    cards = [
        _card(rank, hit, folder, strips[hit.window], share)
        for rank, (hit, share) in enumerate(zip(answer.hits, sure, strict=True), start=1)
    ]
    found = f'<div class="grid">{"".join(cards)}</div>' if cards else "<p>Nothing is indexed.</p>"
    warning = "" if answer.fits else f'<p class="unsure">{NOTHING_FITS}</p>'
    return f"<section><h2>“{html.escape(answer.query)}”</h2>{warning}{found}</section>"


def _card(rank: int, hit: Hit, folder: Path, strip: list[str] | str, sure: float | None) -> str:
    window = hit.window
    if isinstance(strip, str):
        pictures = f'<div class="lost">{html.escape(strip)}</div>'
    else:
        figures = [
            f'<figure><img alt="" src="data:image/jpeg;base64,{data}">'
            f"<figcaption>{clock(time_s)}</figcaption></figure>"
            for data, time_s in zip(strip, _times(window), strict=True)
        ]
        pictures = f'<div class="strip">{"".join(figures)}</div>'
    link = f"{window.video.resolve().as_uri()}#t={window.start_s:.2f},{window.end_s:.2f}"
    name = html.escape(str(window.video.relative_to(folder)))
    return (
        f'<article class="card">{pictures}<div class="text">'
        f'<a class="name" href="{html.escape(link)}">{name}</a>'
        f'<div class="facts"><span class="rank">{rank}</span>'
        f"<span>{clock(window.start_s)} – {clock(window.end_s)}</span>"
        f"{_sureness(sure)}<span>{hit.score:.3f}</span></div></div></article>"
    )


def _sureness(sure: float | None) -> str:
    if sure is None:
        return ""
    told = f"stands out more than the best window of {sure:.0%} of random sentences"
    return (
        f'<span class="bar" title="{told}"><i style="width:{100 * sure:.0f}%"></i></span>'
        f'<span title="{told}">{sure:.0%} sure</span>'
    )


def _times(window: Window) -> list[float]:
    span = window.end_s - window.start_s
    return [window.start_s + (k + 0.5) * span / _FRAMES for k in range(_FRAMES)]


def _strips(windows: Sequence[Window], num_workers: int) -> dict[Window, list[str] | str]:
    """JPEGs of each window in base64, or why there are none."""
    share = -(-len(windows) // max(1, num_workers))
    jobs = [list(windows[i : i + share]) for i in range(0, len(windows), share or 1)]
    found: dict[Window, list[str] | str] = {}
    for results in in_children(_jpegs, jobs, num_workers, lambda window: window.video):
        for window, result in results:
            found[window] = result.reason if isinstance(result, Unreadable) else result
    return found


def _jpegs(window: Window) -> list[str]:
    frames = read_frames(window.video, _times(window))
    return [base64.b64encode(_jpeg(frame)).decode() for frame in frames]


def picture_at(window: Window) -> bytes:
    """A JPEG of the frame that is on the screen where a window begins."""
    return _jpeg(next(read_frames(window.video, [window.start_s])))


def _jpeg(frame: np.ndarray) -> bytes:
    image = Image.fromarray(frame)
    # twice the height on the page, for fine screens; small videos are not enlarged
    image.thumbnail((10_000, 2 * _HEIGHT))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()
