"""Curves over training steps: read from the run's CSV, drawn as SVG."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup, escape

from lightning_modules.sweep.page import ticks

_WIDTH, _HEIGHT = 320, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 10, 8, 34


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        style: Class of the line in the page's style sheet.
        steps: Optimizer steps, rising.
        values: One a step, finite.
        dots: Marks each point, for curves of few.
    """

    style: str
    steps: Sequence[int]
    values: Sequence[float]
    dots: bool = False


def read_series(path: Path | None, column: str) -> tuple[list[int], list[float]]:
    """Steps and values of a column of a run's `metrics.csv`; empty and non-finite cells left out.

    Args:
        path: The CSV; each row has a `step`. None where nothing was logged.
        column: Its name. Both lists are empty where the file has no such column.

    Raises:
        OSError: The file cannot be read.
    """
    steps: list[int] = []
    values: list[float] = []
    if path is None:
        return steps, values
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            step, value = _number(row.get("step")), _number(row.get(column))
            if math.isfinite(step) and math.isfinite(value):
                steps.append(int(step))
                values.append(value)
    return steps, values


def _number(cell: str | None) -> float:
    try:
        return float(cell or "nan")
    except ValueError:  # a row cut off by a kill
        return math.nan


def smooth(values: Sequence[float]) -> tuple[list[float], int]:
    """Centred running mean over a twentieth of the values, and the window's length (odd).

    At the ends the window keeps what lies inside, so the curve neither lags nor stops short.
    """
    window = 2 * (len(values) // 40) + 1
    ones = np.ones(window)
    total = np.convolve(values, ones, "same")
    return (total / np.convolve(np.ones(len(values)), ones, "same")).tolist(), window


def line_chart(curves: Sequence[Curve], label: str) -> Markup:
    """Draw curves over steps.

    Args:
        curves: At least one, each with at least one point.
        label: What a screen reader says in the picture's place.
    """
    steps = [step for curve in curves for step in curve.steps]
    values = [value for curve in curves for value in curve.values]
    y_ticks = ticks(min(values), max(values))
    low, high = min(steps), max(steps)
    x_ticks = [tick for tick in ticks(low, high) if low <= tick <= high]

    def x(step: float) -> float:
        share = 0.5 if high == low else (step - low) / (high - low)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
        f'<text x="{_LEFT - 7}" y="{y(t) + 4:.1f}" text-anchor="end">{t:g}</text>'
        for t in y_ticks
    ]
    floor = _HEIGHT - _BOTTOM
    parts += [
        f'<line class="tick" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{floor}" y2="{floor + 4}"/>'
        f'<text x="{x(t):.1f}" y="{floor + 16}" text-anchor="middle">{t:,g}</text>'
        for t in x_ticks
    ]
    parts.append(
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 3}" text-anchor="middle">'
        "optimizer step</text>"
    )
    for curve in curves:
        points = [(x(s), y(v)) for s, v in zip(curve.steps, curve.values, strict=True)]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="{curve.style}" points="{line}"/>')
        if curve.dots or len(points) == 1:
            parts += [
                f'<circle class="{curve.style}" cx="{a:.1f}" cy="{b:.1f}" r="3"/>'
                for a, b in points
            ]
    return Markup(
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )
