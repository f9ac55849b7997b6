"""A sweep as one self-contained HTML page: curves over training steps, the table, the problems."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_modules.pages import page
from lightning_modules.sweep.plan import Cell
from lightning_modules.sweep.table import MISSING, Entry, Figure, Table

_WIDTH, _HEIGHT = 400, 240
_LESS_IS_BETTER = ("mdr", MISSING)  # median rank
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 14, 12, 30
# Okabe and Ito's colours: told apart by colour-blind readers too.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a")

_STYLE = """
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(380px, 100%), 1fr));
  gap: 16px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 12px 12px 6px; }
figcaption { font-weight: 600; font-size: 14px; margin: 0 2px 6px; }
figcaption span { color: var(--soft); font-weight: 400; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg .grid { stroke: var(--line); }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0 0 12px; font-size: 13px; }
.legend i { display: inline-block; width: 18px; height: 3px; border-radius: 2px;
  vertical-align: middle; margin-right: 7px; }
.scroll { overflow-x: auto; }
/* shadows at the edges beyond which there is more: the covers scroll away with the table */
.scroll { background:
  linear-gradient(to right, var(--card) 30%, transparent) left / 48px 100% no-repeat local,
  linear-gradient(to left, var(--card) 30%, transparent) right / 48px 100% no-repeat local,
  linear-gradient(to right, rgb(0 0 0 / 18%), transparent) left / 14px 100% no-repeat scroll,
  linear-gradient(to left, rgb(0 0 0 / 18%), transparent) right / 14px 100% no-repeat scroll,
  var(--card); }
.scroll:focus-visible { outline: 2px solid var(--mark); }
table { border-collapse: collapse; width: 100%; font-size: 14px;
  font-variant-numeric: tabular-nums; overflow-wrap: normal; }
th, td { padding: 7px 12px; text-align: right; white-space: nowrap; }
th { font-weight: 600; border-bottom: 1px solid var(--line); vertical-align: bottom; }
th span, td span { display: block; font-weight: 400; font-size: 12px; color: var(--soft); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0;
  background: var(--card); max-width: 40vw; white-space: normal; min-width: 7em;
  overflow-wrap: anywhere; }
tbody tr + tr td { border-top: 1px solid var(--line); }
td.best { font-weight: 700; }
td.best::before { content: "★ "; color: var(--mark); }
td.failed { color: var(--bad); }
ul { margin: 0; padding: 12px 14px 12px 32px; }
li b { font-weight: 600; }
"""


@dataclass(frozen=True)
class Point:
    """A figure at a training step."""

    step: int
    figure: Figure


def sweep_page(table: Table, title: str) -> str:
    """Render a sweep.

    Args:
        table: Its results.
        title: Heads the page.
    """
    done = sum(bool(entry.figures) for entry in table.entries)
    facts = f"{done} of {len(table.entries)} cells have results"
    columns = list(dict.fromkeys(column for column, _ in table.columns))
    if table.problems:
        count = len(table.problems)
        facts += f"; {count} {'problem is' if count == 1 else 'problems are'} named below"
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="soft">{facts}. Intervals: 95 %, by bootstrap over queries. A star marks the '
        "best of a column, where one checkpoint alone has it.</p>",
        _charts(table),
        *(f"<h2>{html.escape(column)}</h2>{_table(table, column)}" for column in columns),
        _problems(table.problems),
    ]
    return page(title, "".join(parts), _STYLE)


def _charts(table: Table) -> str:
    """One chart a metric, one curve a run, wherever a run has figures at two steps."""
    runs = list(dict.fromkeys(cell.run for cell, _ in table.rows if cell.step is not None))
    colours = {run: _COLOURS[n % len(_COLOURS)] for n, run in enumerate(runs)}
    charts = []
    for column, metric in table.columns:
        if metric == MISSING:
            continue
        curves: dict[str, list[Point]] = {}
        for cell, entries in table.rows:
            figure = entries[column].figures.get(metric) if column in entries else None
            if figure is not None and cell.step is not None and math.isfinite(figure.value):
                curves.setdefault(cell.run, []).append(Point(cell.step, figure))
        if any(len(points) > 1 for points in curves.values()):
            caption = f"{html.escape(metric)} <span>{html.escape(column)}</span>"
            drawn = _chart(curves, colours, f"{metric} of {column} over training steps")
            charts.append(f"<figure><figcaption>{caption}</figcaption>{drawn}</figure>")
    if not charts:
        return ""
    keys = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(run)}</span>'
        for run, colour in colours.items()
    )
    return (
        f'<h2>Over training steps</h2><div class="legend">{keys}</div>'
        f'<div class="charts">{"".join(charts)}</div>'
    )


@dataclass(frozen=True)
class _Scale:
    """Steps and values to points of the drawing."""

    steps: tuple[int, int]
    values: tuple[float, float]

    def x(self, step: float) -> float:
        low, high = self.steps
        share = 0.5 if high == low else (step - low) / (high - low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.values
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)


def _chart(curves: Mapping[str, Sequence[Point]], colours: Mapping[str, str], title: str) -> str:
    steps = [p.step for points in curves.values() for p in points]
    values = [v for points in curves.values() for p in points for v in _extent(p.figure)]
    marks = ticks(min(values), max(values))
    scale = _Scale((min(steps), max(steps)), (marks[0], marks[-1]))
    parts = [_grid(marks, scale)]
    parts += [_curve(run, points, colours[run], scale) for run, points in curves.items()]
    frame = f'viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(title)}"'
    return f"<svg {frame}>{''.join(parts)}</svg>"


def _extent(figure: Figure) -> list[float]:
    ends = (figure.value, figure.low, figure.high)
    return [end for end in ends if end is not None and math.isfinite(end)]


def _grid(ticks: Sequence[float], scale: _Scale) -> str:
    lines = [
        f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{scale.y(tick):.1f}" '
        f'y2="{scale.y(tick):.1f}" class="grid"/>'
        f'<text x="{_LEFT - 7}" y="{scale.y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in ticks
    ]
    for place, step in zip(("start", "end"), scale.steps, strict=True):
        start = f'<text x="{scale.x(step):.1f}" y="{_HEIGHT - 10}"'
        lines.append(f'{start} text-anchor="{place}">{step:,}</text>')
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    lines.append(f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">step</text>')
    return "".join(lines)


def _curve(run: str, points: Sequence[Point], colour: str, scale: _Scale) -> str:
    centres = [(scale.x(p.step), scale.y(p.figure.value), p) for p in points]
    ends = [
        (scale.x(p.step), scale.y(p.figure.low), scale.y(p.figure.high))
        for p in points
        if p.figure.low is not None and p.figure.high is not None and len(_extent(p.figure)) == 3
    ]
    band = [f"{x:.1f},{high:.1f}" for x, _, high in ends]
    band += [f"{x:.1f},{low:.1f}" for x, low, _ in reversed(ends)]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in centres)
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}">'
        f"<title>{html.escape(f'{run}, step {p.step:,}: {p.figure}')}</title></circle>"
        for x, y, p in centres
    )
    return (
        f'<polygon points="{" ".join(band)}" fill="{colour}" opacity="0.14"/>'
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>{dots}'
    )


def ticks(low: float, high: float) -> list[float]:
    """Two to seven round numbers from at most `low` to at least `high`."""
    span = (high - low) or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(span / 4))
    size = next(unit * k for k in (1, 2, 5, 10) if span / (unit * k) <= 5)
    first, last = math.floor(low / size), math.ceil(high / size)
    last += first == last
    return [round(size * k, 10) for k in range(first, last + 1)]


def _table(table: Table, column: str) -> str:
    """One benchmark's metrics, a row a checkpoint."""
    metrics = [metric for name, metric in table.columns if name == column]
    rows = [(cell, entries) for cell, entries in table.rows if column in entries]
    best = {metric: _best(rows, column, metric) for metric in metrics}
    heads = "".join(
        f"<th>{html.escape(metric)}"
        + ("<span>less is better</span>" if _less(metric) else "")
        + "</th>"
        for metric in metrics
    )
    lines = []
    for cell, entries in rows:
        step = "" if cell.step is None else f"{cell.step:,}"
        shown = [_cell(entries[column], metric, best[metric]) for metric in metrics]
        name = html.escape(cell.run)
        lines.append(f"<tr><td>{name}</td><td>{step}</td>{''.join(shown)}</tr>")
    return (
        f'<div class="card scroll" tabindex="0" role="region" aria-label="{html.escape(column)}">'
        f"<table><thead><tr><th>run</th><th>step</th>{heads}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _cell(entry: Entry, metric: str, best: float | None) -> str:
    if metric not in entry.figures:
        return '<td class="failed">failed</td>' if entry.problem is not None else "<td></td>"
    figure = entry.figures[metric]
    kind = ' class="best"' if figure.value == best else ""
    ends = "" if figure.low is None else f"<span>{figure.low:.2f} – {figure.high:.2f}</span>"
    return f"<td{kind}>{Figure(figure.value)}{ends}</td>"


def _less(metric: str) -> bool:
    return metric.rsplit(".", 1)[-1] in _LESS_IS_BETTER


def _best(
    rows: Sequence[tuple[Cell, Mapping[str, Entry]]], column: str, metric: str
) -> float | None:
    """The best value, where one row alone has it and there is another to be better than."""
    values = [e[column].figures[metric].value for _, e in rows if metric in e[column].figures]
    if len(values) < 2:
        return None
    best = (min if _less(metric) else max)(values)
    return best if values.count(best) == 1 else None


def _problems(problems: Mapping[str, str]) -> str:
    if not problems:
        return ""
    items = "".join(
        f"<li><b>{html.escape(name)}</b>: {html.escape(reason)}</li>"
        for name, reason in problems.items()
    )
    return f'<h2>Without figures</h2><ul class="card">{items}</ul>'
