"""What fine-tuning has changed, in the report's own words: a loss is told like a gain."""

from __future__ import annotations

import math
from typing import Any

_FIGURES = {
    "mAP": ("zero_shot.map.avg", "fine_tuned.map.avg"),
    "nDCG": ("zero_shot.ndcg.avg", "fine_tuned.ndcg.avg"),
    "verbs": ("verb_accuracy.zero_shot", "verb_accuracy.fine_tuned"),
    "nouns": ("noun_accuracy.zero_shot", "noun_accuracy.fine_tuned"),
    "colours of nouns": ("noun_parts.colour.zero_shot", "noun_parts.colour.fine_tuned"),
    "objects of nouns": ("noun_parts.object.zero_shot", "noun_parts.object.fine_tuned"),
}
_SAME = 0.05  # percentage points, below what the report's one decimal shows


def changes(metrics: dict[str, Any]) -> list[str]:
    """Sentences on what fine-tuning gained, what it lost, and what order has to do with verbs.

    Args:
        metrics: What `metrics.json` holds; what it lacks is not told of.
    """
    gained: list[str] = []
    lost: list[str] = []
    for name, (before, after) in _FIGURES.items():
        old, new = _at(metrics, before), _at(metrics, after)
        if old is None or new is None or abs(new - old) < _SAME:
            continue
        (gained if new > old else lost).append(f"{name} {old:.1f} to {new:.1f} %")
    told = []
    if gained:
        told.append(f"Fine-tuning raised {_listed(gained)}.")
    if lost:
        told.append(f"It lowered {_listed(lost)}; docs/demo.md says what was tried about it.")
    plain = _at(metrics, "verb_accuracy.fine_tuned")
    shuffled = _at(metrics, "verb_accuracy.fine_tuned_shuffled_frames")
    if plain is not None and shuffled is not None:
        told.append(
            f"Verbs fall from {plain:.1f} to {shuffled:.1f} % when frames are shuffled; a model "
            "that reads nothing from their order falls by nothing."
        )
    return told


def _at(metrics: dict[str, Any], dotted: str) -> float | None:
    found: Any = metrics
    for key in dotted.split("."):
        found = (found or {}).get(key)
    return found if found is not None and math.isfinite(found) else None


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
