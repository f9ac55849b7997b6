"""Describing what is in a set of shards."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.manifest import Manifest

_QUANTILES = {"min": 0, "p05": 5, "median": 50, "p95": 95, "max": 100}


def describe(manifest: Manifest) -> dict[str, Any]:
    """Count and measure a data set from its indexes, without opening a tar.

    Returns:
        `samples`, `shards`, `videos`, `texts`, `bytes`, `hours`; spreads of `clip_bytes` and
        `clip_seconds`; histograms `verb_classes` and `noun_classes`, most frequent first; and the
        manifest's `fingerprint`, `source` and `options`.
    """
    verbs: Counter[int] = Counter()
    nouns: Counter[int] = Counter()
    videos: set[str] = set()
    sizes, seconds, texts = [], [], 0
    for number in range(len(manifest.shards)):
        index = manifest.load_index(number)
        sizes.append(index.rows["video_bytes"])
        for row in range(len(index)):
            record = index.record(row)
            verbs.update(record.verb_classes)
            nouns.update(record.noun_classes)
            videos.add(record.video_id)
            seconds.append(record.end_s - record.start_s)
            texts += len(record.texts)
    return {
        "samples": manifest.num_samples,
        "shards": len(manifest.shards),
        "videos": len(videos),
        "texts": texts,
        "bytes": sum(shard.num_bytes for shard in manifest.shards),
        "hours": round(sum(seconds) / 3600, 3),
        "clip_bytes": _spread(np.concatenate(sizes)),
        "clip_seconds": _spread(np.array(seconds)),
        "verb_classes": dict(verbs.most_common()),
        "noun_classes": dict(nouns.most_common()),
        "fingerprint": manifest.fingerprint,
        "source": manifest.source,
        "options": manifest.options,
    }


def render(summary: dict[str, Any]) -> str:
    """Lay a summary out as text, the histograms cut to their ten most frequent classes."""
    lines = []
    for key, value in summary.items():
        if key.endswith("_classes"):
            most = ", ".join(f"{c} ({n})" for c, n in list(value.items())[:10])
            value = f"{len(value)}; most frequent {most}" if value else "none"
        elif isinstance(value, dict):
            value = ", ".join(f"{k} {json.dumps(v)}" for k, v in value.items())
        lines.append(f"{key:<13} {value}")
    return "\n".join(lines)


def _spread(values: NDArray[Any]) -> dict[str, float]:
    spread = {name: float(np.percentile(values, q)) for name, q in _QUANTILES.items()}
    return {name: round(v, 3) for name, v in {**spread, "mean": float(values.mean())}.items()}
