"""Figures of several seeds as Markdown: means and paired differences, with 95 % intervals."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

Figures = Mapping[str, float]
BySeed = Mapping[int, Figures]

# Student's t at 97.5 %, of 1, 2, ... degrees of freedom.
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: Sequence[float]) -> str:
    """` ± ` half of the 95 % interval of the mean, by Student's t; nothing of a single seed."""
    if len(values) < 2:
        return ""
    half = T975[len(values) - 2] * statistics.stdev(values) / len(values) ** 0.5
    return f" ± {half:.1f}"


def means(cells: BySeed, columns: Mapping[str, str]) -> list[str]:
    """The mean of each column over the seeds, with its interval."""
    found = []
    for key in columns.values():
        values = [figures[key] for figures in cells.values()]
        found.append(f"{statistics.mean(values):.1f}{interval(values)}")
    return found


def differences(cells: BySeed, base: BySeed, columns: Mapping[str, str]) -> list[str]:
    """The mean of each column's difference to the base, of the seeds that both have."""
    found = []
    for key in columns.values():
        values = [cells[seed][key] - base[seed][key] for seed in cells if seed in base]
        found.append(f"{statistics.mean(values):+.1f}{interval(values)}")
    return found


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
