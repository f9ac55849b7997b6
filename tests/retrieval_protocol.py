"""EK-100 multi-instance retrieval once more, query by query in plain numpy: the yardstick."""

from __future__ import annotations

import numpy as np


def relevance_of_sets(videos: list[tuple[int, set]], texts: list[tuple[int, set]]) -> np.ndarray:
    """c = 1/2 [verb equal] + 1/2 IoU(nouns) from (verb, noun set) of each item."""
    rows = []
    for verb, nouns in videos:
        rows.append(
            [
                0.5 * (verb == other_verb)
                + 0.5 * (len(nouns & others) / len(nouns | others) if nouns | others else 0.0)
                for other_verb, others in texts
            ]
        )
    return np.array(rows, dtype=np.float64)


def average_precision(similarity: np.ndarray, relevance: np.ndarray) -> float | None:
    order = sorted(range(len(similarity)), key=lambda item: (-similarity[item], item))
    cumulated, precisions = 0.0, []
    for rank, item in enumerate(order, start=1):
        cumulated += float(relevance[item])
        if relevance[item] == 1:
            precisions.append(cumulated / rank)
    return sum(precisions) / len(precisions) if precisions else None


def ndcg(similarity: np.ndarray, relevance: np.ndarray) -> float | None:
    order = sorted(range(len(similarity)), key=lambda item: (-similarity[item], item))
    k = int((relevance > 0).sum())
    if k == 0:
        return None
    gain = sum(float(relevance[item]) / np.log2(r + 1) for r, item in enumerate(order[:k], 1))
    ideal = sum(c / np.log2(r + 1) for r, c in enumerate(sorted(map(float, relevance))[::-1], 1))
    return gain / ideal


def protocol(similarity: np.ndarray, relevance: np.ndarray) -> dict[str, tuple[float, float]]:
    """Means of both directions, (v2t, t2v), as fractions."""
    result = {}
    for name, score in (("map", average_precision), ("ndcg", ndcg)):
        means = []
        for S, C in ((similarity, relevance), (similarity.T, relevance.T)):
            values = [score(s, c) for s, c in zip(S, C, strict=True)]
            means.append(float(np.mean([value for value in values if value is not None])))
        result[name] = (means[0], means[1])
    return result
