"""Figures, intervals and the three forms of the table."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
from browser_page import check_page, needs_browser

from lightning_modules.evaluation.intervals import bootstrap
from lightning_modules.sweep.page import sweep_page, ticks
from lightning_modules.sweep.plan import Cell
from lightning_modules.sweep.table import (
    Entry,
    Figure,
    Table,
    column_names,
    csv_text,
    figures_of,
    markdown,
)


def test_nested_results_are_flattened_with_intervals_where_queries_are_known() -> None:
    v2t, t2v = [0.1, 0.4, 0.7, 0.2] * 10, [0.9, 0.3] * 15
    means = 100 * np.mean(v2t), 100 * np.mean(t2v)
    result = {
        "benchmark": "ek100_mir",
        "map": {"v2t": means[0], "t2v": means[1], "avg": sum(means) / 2},
        "inter": 93.5,
        "num_videos": 40,
        "flip": True,
        "per_query": {"map": {"v2t": v2t, "t2v": t2v}},
    }
    figures = figures_of(result)
    assert list(figures) == ["map.v2t", "map.t2v", "map.avg", "inter", "num_videos"]
    for name in ("map.v2t", "map.t2v", "map.avg"):
        figure = figures[name]
        assert figure.low is not None and figure.low < figure.value < figure.high
    assert figures["inter"] == Figure(93.5)
    # the mean of two independent means spreads less than either
    widths = {name: figures[name].high - figures[name].low for name in list(figures)[:3]}
    assert widths["map.avg"] < min(widths["map.v2t"], widths["map.t2v"])


def test_bootstrap_agrees_with_the_normal_interval() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.2, 2000)
    low, high = bootstrap([values.tolist()], float(values.mean()))
    half = 1.96 * values.std() / np.sqrt(len(values))
    # 1,000 resamples leave some 5 % of noise in the ends
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert bootstrap([values.tolist()], float(values.mean())) == (low, high)
    percent = bootstrap([values.tolist()], 100 * float(values.mean()))
    assert percent == pytest.approx((100 * low, 100 * high))


def test_queries_without_a_value_are_left_out() -> None:
    with_gaps = bootstrap([[0.2, float("nan"), 0.4, 0.6] * 20], 0.4)
    assert with_gaps == bootstrap([[0.2, 0.4, 0.6] * 20], 0.4)
    assert with_gaps == bootstrap([[0.2, None, 0.4, 0.6] * 20], 0.4)  # as evaluate's JSON has it
    assert np.isnan(bootstrap([[float("nan")]], 0.4)).all()


def test_columns_are_named_by_what_differs() -> None:
    words = [
        ("mir", "--data", "d", "--frames", "8"),
        ("mir", "--data", "d", "--frames", "16"),
        ("mcq", "--data", "d"),
    ]
    assert list(column_names(words).values()) == ["mir 8", "mir 16", "mcq"]


def table() -> Table:
    entries = []
    for run, step, value in [("a", 100, 10.0), ("a", 200, 30.0), ("<b>", 100, 20.0)]:
        cell = Cell(f"{run}{step}", f"/runs/{run}/{step}", run, step, "c", (), ("mir",))
        figures = {"map": Figure(value, value - 2, value + 2), "num_excluded.v2t": Figure(9)}
        figures["num_missing_clips"] = Figure(9552 if run == "a" else 0)
        entries.append(Entry(cell, "mir", figures))
    failed = Cell("x", "/runs/a/300", "a", 300, "c", (), ("mir",))
    entries.append(Entry(failed, "mir", problem="evaluate: a | b\nc"))
    return Table(entries, {"/runs/a/400": "state is missing"})


def test_markdown_names_what_has_no_figures() -> None:
    lines = markdown(table()).splitlines()
    assert lines[0] == "| run | step | mir<br>map | mir<br>num_missing_clips |"
    assert lines[2] == "| a | 100 | 10.00 [8.00, 12.00] | 9,552 |"
    assert lines[4] == "| <b> | 100 | 20.00 [18.00, 22.00] | 0 |"
    assert lines[5] == "| a | 300 | failed | failed |"
    assert "- /runs/a/400: state is missing" in lines
    assert any(line.startswith("- a @ 300, mir: evaluate") for line in lines)


def test_csv_holds_every_figure_and_problem() -> None:
    rows = list(csv.DictReader(io.StringIO(csv_text(table()))))
    assert len(rows) == 3 * 3 + 1 + 1
    assert rows[0]["metric"] == "map" and float(rows[0]["low"]) == 8.0
    assert rows[1]["metric"] == "num_excluded.v2t" and rows[1]["low"] == ""
    assert [row["problem"] for row in rows[9:]] == ["evaluate: a | b\nc", "state is missing"]


def test_page_has_a_curve_a_run_and_escapes_names() -> None:
    page = sweep_page(table(), "A & B")
    assert page.count("<polyline") == 2 and page.count("<circle") == 3
    assert "<b>," not in page and "&lt;b&gt;" in page and "A &amp; B" in page
    (line,) = (re.findall(r'<polyline points="([^"]+)"', page)[0],)
    (x0, y0), (x1, y1) = (map(float, point.split(",")) for point in line.split())
    assert x0 < x1 and y0 > y1  # a later step is further right, a better figure higher
    assert page.count('class="failed"') == 2
    assert page.count("<td>9,552</td>") == 2 and page.count('<td class="best">0</td>') == 1
    assert re.search(r'class="best">30\.00', page)
    assert not re.search(r"(src|href)=", page)


def test_a_small_median_rank_is_the_best() -> None:
    entries = [
        Entry(Cell(n, n, n, None, "c", (), ("tv",)), "tv", {"r1": Figure(v), "mdr": Figure(v)})
        for n, v in (("a", 3.0), ("b", 7.0))
    ]
    page = sweep_page(Table(entries, {}), "t")
    rows = re.findall(r"<tr><td>([ab])</td>(.*?)</tr>", page)
    best = {name: re.findall(r'<td class="best">([\d.]+)', cells) for name, cells in rows}
    assert best == {"a": ["3.00"], "b": ["7.00"]}
    assert rows[0][1].endswith('<td class="best">3.00</td>')


def test_a_best_that_several_share_is_not_marked() -> None:
    entries = [
        Entry(Cell(n, n, n, None, "c", (), ("mir",)), "mir", {"map": Figure(v), "r1": Figure(w)})
        for n, v, w in (("a", 5.0, 1.0), ("b", 5.0, 2.0), ("c", 4.0, 0.0))
    ]
    page = sweep_page(Table(entries, {}), "t")
    assert re.findall(r'class="best">([\d.]+)', page) == ["2.00"]
    assert 'class="best"' not in sweep_page(Table(entries[:1], {}), "t")


def test_each_benchmark_has_a_table_of_its_own_metrics() -> None:
    cells = [Cell(n, n, n, None, "c", (), ("x",)) for n in ("a", "b")]
    entries = [Entry(c, "mir", {"map": Figure(1.0)}) for c in cells]
    entries += [Entry(cells[0], "mcq", {"inter": Figure(2.0)})]
    page = sweep_page(Table(entries, {}), "t")
    assert re.findall(r'aria-label="(\w+)"', page) == ["mir", "mcq"]
    assert page.count("<tr><td>a</td>") == 2 and page.count("<tr><td>b</td>") == 1
    assert "prefers-color-scheme: dark" in page


def test_page_without_steps_has_no_curves() -> None:
    cell = Cell("k", "m.pt", "m.pt", None, "c", (), ("mir",))
    page = sweep_page(Table([Entry(cell, "mir", {"map": Figure(1.0)})], {}), "t")
    assert "<svg" not in page and "1.00" in page


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.2, 3.3), (5, 5), (-2, 40), (0, 0), (1e-4, 3)])
def test_ticks_are_few_round_and_span_the_range(low: float, high: float) -> None:
    positions = ticks(low, high)
    assert 2 <= len(positions) <= 8
    assert positions[0] <= low and positions[-1] >= high and positions == sorted(set(positions))


@needs_browser
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """With as many columns as three benchmarks have, long names, and what failed."""
    wide = table()
    for number, entry in enumerate(wide.entries):
        more = {f"metric_{k}.v2t": Figure(10.0 * number + k, None, None) for k in range(12)}
        if not entry.problem:
            entry.figures.update(more)
    (tmp_path / "sweep.html").write_text(sweep_page(wide, "Sweep of runs"), encoding="utf-8")
    check_page(tmp_path / "sweep.html")
