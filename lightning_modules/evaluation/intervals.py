"""Confidence intervals of means over queries. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

_RESAMPLES, _COVERAGE = 1000, 0.95


def bootstrap(parts: Sequence[Sequence[float]], value: float) -> tuple[float, float]:
    """Interval of a mean of means over queries, by resampling the queries.

    Each part (say, video-to-text and text-to-video) is resampled by itself. Queries without a
    value (NaN) are left out, as the metric does.

    Args:
        parts: The queries' own values; their unit may be fractions where `value` is in percent.
        value: The metric, for the unit.

    Returns:
        The ends of the central 95 % of 1,000 resampled means; the same for the same values.
    """
    generator = np.random.default_rng(0)
    means = np.zeros(_RESAMPLES)
    centre = 0.0
    for part in parts:
        known = np.asarray(part, np.float64)
        known = known[~np.isnan(known)]
        if not len(known):
            return math.nan, math.nan
        draws = (generator.integers(len(known), size=len(known)) for _ in range(_RESAMPLES))
        means += np.array([known[draw].mean() for draw in draws]) / len(parts)
        centre += known.mean() / len(parts)
    scale = 100.0 if abs(100 * centre - value) < abs(centre - value) else 1.0
    low, high = np.quantile(scale * means, [(1 - _COVERAGE) / 2, (1 + _COVERAGE) / 2])
    return float(low), float(high)
