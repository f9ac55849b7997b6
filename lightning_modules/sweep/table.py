"""The results of a sweep as rows, with confidence intervals, in Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_modules.evaluation.intervals import bootstrap
from lightning_modules.sweep.cells import SweepFiles
from lightning_modules.sweep.plan import Cell, Plan

PER_QUERY = "per_query"
MISSING = "num_missing_clips"


@dataclass(frozen=True)
class Figure:
    """A metric's value and, where queries' own values are known, its 95 % bootstrap interval."""

    value: float  # an int is a count
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if isinstance(self.value, int):
            return f"{self.value:,}"
        spread = "" if self.low is None else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.value:.2f}{spread}"


@dataclass
class Entry:
    """One cell of the table: its figures, or why there are none."""

    cell: Cell
    column: str
    figures: dict[str, Figure] = field(default_factory=dict)
    problem: str | None = None


@dataclass
class Table:
    """A sweep's results.

    Attributes:
        entries: One for each cell of the plan, in its order.
        damaged: Checkpoints that could not be used, and why.
    """

    entries: list[Entry]
    damaged: dict[str, str]

    @property
    def columns(self) -> list[tuple[str, str]]:
        """(benchmark, metric), in the order they were met; of counts only what is missing."""
        found = {
            (entry.column, metric): None
            for entry in self.entries
            for metric in entry.figures
            if metric == MISSING or not is_count(metric)
        }
        return sorted(found, key=lambda pair: [c for c, _ in found].index(pair[0]))

    @property
    def rows(self) -> list[tuple[Cell, dict[str, Entry]]]:
        """One for each checkpoint: (any cell of it, benchmark -> entry)."""
        rows: dict[str, tuple[Cell, dict[str, Entry]]] = {}
        for entry in self.entries:
            cell = entry.cell
            rows.setdefault(cell.checkpoint, (cell, {}))[1][entry.column] = entry
        return list(rows.values())

    @property
    def problems(self) -> dict[str, str]:
        """Everything that has no figures: name -> reason."""
        failed = {
            f"{entry.cell.name}, {entry.column}": entry.problem
            for entry in self.entries
            if entry.problem is not None
        }
        return {**self.damaged, **failed}


def is_count(metric: str) -> bool:
    """True for numbers of samples rather than figures of merit."""
    return any(part.startswith("num_") for part in metric.split("."))


def read_table(files: SweepFiles, plan: Plan) -> Table:
    """Collect what a sweep has so far."""
    columns = column_names([cell.benchmark for cell in plan.cells])
    entries = []
    for cell in plan.cells:
        entry = Entry(cell, columns[cell.benchmark])
        if (done := files.result(cell)) is not None:
            entry.figures = figures_of(done["result"])
        else:
            failure = files.failure(cell)
            entry.problem = "not run yet" if failure is None else failure["reason"]
        entries.append(entry)
    return Table(entries, plan.damaged)


def column_names(benchmarks: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Name benchmarks shortly: by their name, and by options only where those differ."""
    names: dict[tuple[str, ...], str] = {}
    for words in dict.fromkeys(benchmarks):
        alike = [other for other in dict.fromkeys(benchmarks) if other[0] == words[0]]
        common = set.intersection(*(set(other) for other in alike))
        own = [word for word in words if word not in common]
        names[words] = " ".join([words[0], *own])
    return names


def figures_of(result: Mapping[str, Any]) -> dict[str, Figure]:
    """Flatten evaluate's JSON to `metric.part` -> figure, with intervals where possible.

    Args:
        result: Numbers at any depth; `per_query` may hold, under the same names, lists of the
            queries' own values, whose mean is the metric.
    """
    queries = _leaves(result.get(PER_QUERY, {}), list)
    values = _leaves({k: v for k, v in result.items() if k != PER_QUERY}, (int, float))
    figures = {}
    for name, value in values.items():
        parts = [queries[name]] if name in queries else _parts_of_mean(name, queries)
        low, high = bootstrap(parts, float(value)) if parts else (None, None)
        figures[name] = Figure(value if is_count(name) else float(value), low, high)
    return figures


def _parts_of_mean(name: str, queries: Mapping[str, list[float]]) -> list[list[float]]:
    """`map.avg` is the mean of `map.v2t` and `map.t2v`."""
    stem, _, leaf = name.rpartition(".")
    if leaf != "avg":
        return []
    return [values for other, values in queries.items() if other.rpartition(".")[0] == stem]


def _leaves(content: Any, kind: type | tuple[type, ...], stem: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    if isinstance(content, Mapping):
        for name, value in content.items():
            found |= _leaves(value, kind, f"{stem}.{name}" if stem else str(name))
    elif isinstance(content, kind) and not isinstance(content, bool):
        found[stem] = content
    return found


def _rows_of_text(table: Table) -> Iterator[list[str]]:
    for cell, entries in table.rows:
        row = [cell.run, "" if cell.step is None else str(cell.step)]
        for column, metric in table.columns:
            entry = entries.get(column)
            figure = entry.figures.get(metric) if entry else None
            missing = "failed" if entry and entry.problem else ""
            row.append(missing if figure is None else str(figure))
        yield row


def markdown(table: Table) -> str:
    """The table, and below it what has no figures and why."""
    head = ["run", "step", *(f"{column}<br>{metric}" for column, metric in table.columns)]
    lines = [head, ["---"] * len(head), *_rows_of_text(table)]
    text = "".join("| " + " | ".join(_cell_text(x) for x in line) + " |\n" for line in lines)
    if table.problems:
        items = "".join(f"- {name}: {reason}\n" for name, reason in table.problems.items())
        text += f"\nWithout figures:\n\n{items}"
    return text


def _cell_text(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def csv_text(table: Table) -> str:
    """One line a figure, counts included; one a problem."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    names = ["run", "step", "checkpoint", "benchmark", "metric", "value", "low", "high", "problem"]
    writer.writerow(names)
    for entry in table.entries:
        cell = entry.cell
        start = [cell.run, cell.step, cell.checkpoint, entry.column]
        for metric, figure in entry.figures.items():
            writer.writerow([*start, metric, figure.value, figure.low, figure.high, ""])
        if entry.problem is not None:
            writer.writerow([*start, "", "", "", "", entry.problem])
    for path, reason in table.damaged.items():
        writer.writerow(["", "", path, "", "", "", "", "", reason])
    return buffer.getvalue()
