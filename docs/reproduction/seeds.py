"""What the scripts beside it share: figures of several seeds as Markdown, and their options."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from kernels.pages import write_between

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


def script_parser(
    description: str | None, out: str, *, demos: bool = True
) -> argparse.ArgumentParser:
    """The options of every script: --demos, where it works on them, --out and --write."""
    parser = argparse.ArgumentParser(description=description)
    if demos:
        help = "of `eva02-at demo`"
        parser.add_argument("--demos", type=Path, nargs="+", required=True, help=help)
    parser.add_argument("--out", type=Path, default=Path(out), help="(%(default)s)")
    parser.add_argument("--write", type=Path, help="the page, with its markers")
    return parser


def show(tables: Mapping[str, str], page: Path | None) -> None:
    """Print tables by their marker's name and, if asked, write each into the page."""
    print("\n\n".join(tables.values()))
    if page is not None:
        for name, table in tables.items():
            write_between(page, name, table)
