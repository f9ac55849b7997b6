"""Puts the parts of the report together."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from lightning_modules.demo.report.charts import Curve, line_chart, read_series, smooth
from lightning_modules.demo.report.gallery import gallery
from lightning_modules.demo.report.matrices import colour_scale, matrix_picture
from lightning_modules.demo.report.results import DemoResults
from lightning_modules.demo.report.words import changes
from lightning_modules.pages import base_style

_MODELS = {"random": "random", "zero_shot": "zero-shot", "fine_tuned": "fine-tuned"}
_ACCURACIES = {
    "chance": ("chance", "random"),
    "zero_shot": ("zero-shot", "zero_shot"),
    "fine_tuned": ("fine-tuned", "fine_tuned"),
    "fine_tuned_shuffled_frames": ("fine-tuned, shuffled", "shuffled"),
}
_STAGES = {
    "videos": "render videos",
    "shards": "write shards",
    "pretrain": "pretrain",
    "zero_shot": "evaluate zero-shot",
    "fine_tune": "fine-tune",
    "evaluate": "evaluate",
}


@dataclass(frozen=True)
class Bar:
    """A bar with its label and number.

    Attributes:
        label: On its left.
        text: The number with its unit.
        share: Length in percent of the whole.
        style: Class of the bar in the page's style sheet.
        note: Small print after the number.
    """

    label: str
    text: str
    share: float
    style: str
    note: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart with its caption; `svg` is empty where the log has nothing to draw."""

    title: str
    svg: Markup
    note: str


def write_report(results: DemoResults, path: Path) -> None:
    """Write the report as one HTML file that loads nothing from elsewhere.

    Args:
        results: What to show.
        path: The file; its folder is made if it is missing.

    Raises:
        OSError: A log cannot be read or the file cannot be written.
    """
    metrics = results.metrics
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": number, "value": value, "duration": duration}
    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    page = environment.from_string(source).render(
        base_style=Markup(base_style()),  # its quotes are no text
        metrics=metrics,
        models=_MODELS,
        get=_get,
        changes=changes(metrics),
        ratio=_ratio(metrics, "map", "fine_tuned"),
        scores={name: _score_bars(metrics, name) for name in ("map", "ndcg")},
        accuracies={kind: _accuracy_bars(metrics, f"{kind}_accuracy") for kind in ("verb", "noun")},
        unseen={kind: _unseen_bars(metrics, f"{kind}_accuracy") for kind in ("verb", "noun")},
        charts=_charts(results),
        matrices=_matrices(results),
        colours=colour_scale(),
        gallery=gallery(results),
        stages=_stage_bars(metrics),
        configs=results.configs,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def number(figure: float | None, digits: int = 1) -> str:
    """A number with fixed decimals; a dash for one that is missing or not finite."""
    if figure is None or not math.isfinite(figure):
        return "–"
    return f"{figure:,.{digits}f}".replace("-", "−")


def value(given: Any) -> str:
    """Anything from the metrics as text: numbers with separators and four digits."""
    if isinstance(given, bool) or not isinstance(given, int | float):
        return "–" if given is None else str(given)
    if not math.isfinite(given):
        return "–"
    return f"{given:,}" if isinstance(given, int) else f"{given:,.4g}"


def duration(seconds: float | None) -> str:
    """`9.3 s`, `48 s`, `3 min 05 s`."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _get(metrics: dict[str, Any], *keys: str) -> float | None:
    """A number deep in the metrics, None where it or a section above it is missing."""
    found: Any = metrics
    for key in keys:
        found = (found or {}).get(key)
    return found


def _bar(label: str, percent: float | None, style: str, note: str = "") -> Bar:
    text = number(percent)
    share = 0.0 if text == "–" or percent is None else min(max(percent, 0.0), 100.0)
    return Bar(label, text if text == "–" else f"{text} %", share, style, note)


def _ratio(metrics: dict[str, Any], name: str, model: str) -> str:
    """`4.2× random`; empty where either is missing."""
    ours, random = _get(metrics, model, name, "avg"), _get(metrics, "random", name, "avg")
    if ours is None or not random or not math.isfinite(ours / random):
        return ""
    return f"{ours / random:.1f}× random"


def _score_bars(metrics: dict[str, Any], name: str) -> list[Bar]:
    return [
        _bar(
            label,
            _get(metrics, model, name, "avg"),
            model,
            "" if model == "random" else _ratio(metrics, name, model),
        )
        for model, label in _MODELS.items()
    ]


def _accuracy_bars(metrics: dict[str, Any], name: str) -> list[Bar]:
    return [
        _bar(label, _get(metrics, name, key), style) for key, (label, style) in _ACCURACIES.items()
    ]


def _unseen_bars(metrics: dict[str, Any], name: str) -> list[Bar]:
    return [
        _bar("chance", _get(metrics, name, "chance"), "random"),
        _bar("unseen pairs", _get(metrics, "unseen_pairs", name), "unseen"),
        _bar("all test clips", _get(metrics, name, "fine_tuned"), "fine_tuned"),
    ]


def _stage_bars(metrics: dict[str, Any]) -> list[Bar]:
    stages = {k: s for k, s in (metrics.get("seconds") or {}).items() if k != "total"}
    speeds = metrics.get("clips_per_second") or {}
    longest = max((s for s in stages.values() if s is not None and math.isfinite(s)), default=0.0)
    return [
        Bar(
            _STAGES.get(stage, stage.replace("_", " ")),
            duration(s),
            0.0 if duration(s) == "–" or s is None else 100 * s / (longest or 1.0),
            "stage",
            f"{number(speeds[stage])} clips/s" if stage in speeds else "",
        )
        for stage, s in stages.items()
    ]


def _charts(results: DemoResults) -> list[Chart]:
    charts = [
        _loss_chart(results.pretrain_log, "Pretraining loss"),
        _loss_chart(results.fine_tune_log, "Fine-tuning loss"),
    ]
    validation = read_series(results.fine_tune_log, "val/map_avg")
    if validation[0]:
        curve = Curve("smooth", *validation, dots=True)
        title = "Validation mAP while fine-tuning"
        last = f"Average of both directions in percent; {validation[1][-1]:.1f} at the end."
        charts.append(Chart(title, line_chart([curve], title), last))
    return charts


def _loss_chart(log: Path | None, title: str) -> Chart:
    steps, values = read_series(log, "train/loss")
    if not steps:
        return Chart(title, Markup(""), "The log has no values.")
    smoothed, window = smooth(values)
    svg = line_chart([Curve("raw", steps, values), Curve("smooth", steps, smoothed)], title)
    ends = f"{smoothed[0]:.3g} at first, {smoothed[-1]:.3g} at last"
    return Chart(title, svg, f"Each step, and the mean over {window} logged steps: {ends}.")


def _matrices(results: DemoResults) -> list[dict[str, Any]]:
    finite = results.similarity[np.isfinite(results.similarity)]
    # a few outliers would take the contrast of all others
    low, high = np.percentile(finite, (1, 99)).tolist() if finite.size else (0.0, 1.0)
    return [
        {
            "title": title,
            "low": low,
            "high": high,
            "svg": matrix_picture(
                matrix, results.narrations, results.sentences, (low, high), f"{title} matrix"
            ),
        }
        for title, matrix, low, high in (
            ("Relevance", results.relevance, 0.0, 1.0),
            ("Similarity", results.similarity, low, high),
        )
    ]
