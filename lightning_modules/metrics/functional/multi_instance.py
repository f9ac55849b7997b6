"""EK-100 multi-instance retrieval: mAP and nDCG exactly as the benchmark defines them.

Both directions are computed in blocks of queries, ranks in the precision of the similarities, sums
in fp64. Ties: the item with the smaller index ranks first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_modules.metrics.functional.class_relevance import ClassSets, relevance_block
from lightning_modules.metrics.functional.ranking import (
    descending_order,
    refuse_nan,
    row_blocks,
    sort_ascending_,
)
from lightning_modules.metrics.functional.repeatable import row_cumsum, sum_by_group


@dataclass(frozen=True)
class DirectionScores:
    """Means over the queries of one direction, as fractions.

    Attributes:
        map: Mean average precision; NaN where no query counts.
        ndcg: Mean nDCG; NaN where no query counts.
        num_queries: All queries.
        num_excluded_map: Queries without an item of relevance exactly 1: they have no average
            precision and are left out of its mean.
        num_excluded_ndcg: Queries without any item of positive relevance, left out of the nDCG.
        query_map: (num_queries,) float64 average precision of each query; NaN where left out.
        query_ndcg: (num_queries,) float64 nDCG of each query; NaN where left out.
    """

    map: float
    ndcg: float
    num_queries: int
    num_excluded_map: int
    num_excluded_ndcg: int
    query_map: Tensor = field(repr=False, compare=False)
    query_ndcg: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class MultiInstanceScores:
    """Scores of both directions.

    Attributes:
        v2t: Videos retrieve texts.
        t2v: Texts retrieve videos.
    """

    v2t: DirectionScores
    t2v: DirectionScores


def multi_instance_map(similarity: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Mean average precision of multi-instance retrieval with graded relevance.

    Items are sorted by similarity. p(k) is the sum of the *graded* relevance of the first k items,
    divided by k; average precision is the mean of p(k) over the places whose relevance is exactly
    1. (Not the textbook's: with binary relevance random similarities would give 0.4 % on EK-100
    instead of 5.7 %.) Queries without an item of relevance 1 are left out: see
    `multi_instance_scores` for their number.

    Args:
        similarity: (videos, texts), any floating point dtype; no NaN.
        relevance: (videos, texts) in [0, 1]. Give fp64 where thirds should not be rounded.

    Returns:
        `(v2t, t2v)`: fractions, 0-dim float64; NaN where every query is left out.

    Raises:
        ValueError: Shapes differ, a similarity is NaN, or a relevance lies outside [0, 1].

    Example:
        >>> import torch
        >>> from lightning_modules.metrics.functional import multi_instance_map
        >>> similarity = torch.tensor([[0.9, 0.2, 0.5], [0.3, 0.8, 0.1]])
        >>> relevance = torch.tensor([[0.5, 0.0, 1.0], [0.0, 1.0, 0.0]])
        >>> v2t, t2v = multi_instance_map(similarity, relevance)
        >>> round(v2t.item(), 4)  # (1.5 / 2 + 1 / 1) / 2
        0.875
    """
    scores = multi_instance_scores(similarity, relevance)
    return _as_tensors(scores.v2t.map, scores.t2v.map)


def multi_instance_ndcg(similarity: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised discounted cumulative gain of multi-instance retrieval.

    For each query with k items of positive relevance: the sum of relevance / log2(rank + 1) over
    the first k places, divided by the same for the ideal order. Queries with k = 0 are left out.

    Args:
        similarity: (videos, texts), any floating point dtype; no NaN.
        relevance: (videos, texts) in [0, 1].

    Returns:
        `(v2t, t2v)`: fractions, 0-dim float64; NaN where every query is left out.

    Raises:
        ValueError: As `multi_instance_map`.
    """
    scores = multi_instance_scores(similarity, relevance)
    return _as_tensors(scores.v2t.ndcg, scores.t2v.ndcg)


def multi_instance_scores(similarity: Tensor, relevance: Tensor) -> MultiInstanceScores:
    """MAP and nDCG of both directions, and how many queries each leaves out.

    Args:
        similarity: (videos, texts), any floating point dtype; no NaN.
        relevance: (videos, texts) in [0, 1].

    Raises:
        ValueError: As `multi_instance_map`.
    """
    similarity, relevance = torch.as_tensor(similarity), torch.as_tensor(relevance)
    if similarity.shape != relevance.shape:
        raise ValueError(
            f"similarity has shape {tuple(similarity.shape)} and relevance "
            f"{tuple(relevance.shape)}; both must be (videos, texts)"
        )
    _check_similarity(similarity)
    return _scores(_matrix_blocks(similarity), _matrix_blocks(relevance), *similarity.shape)


def multi_instance_scores_from_classes(
    similarity: Tensor, video_classes: ClassSets, text_classes: ClassSets
) -> MultiInstanceScores:
    """The same with the relevance computed from classes, in fp64, block by block.

    Args:
        similarity: (videos, texts), any floating point dtype; no NaN.
        video_classes: Classes of the videos, see `class_sets`.
        text_classes: Classes of the texts.

    Raises:
        ValueError: Shapes do not match, or a similarity is NaN.
    """
    expected = (len(video_classes), len(text_classes))
    if tuple(similarity.shape) != expected:
        raise ValueError(
            f"similarity has shape {tuple(similarity.shape)}; with {expected[0]} videos (rows) and "
            f"{expected[1]} texts (columns) it must be {expected}"
        )
    _check_similarity(similarity)
    relevance = _class_blocks(video_classes, text_classes)
    return _scores(_matrix_blocks(similarity), relevance, *expected)


def multi_instance_scores_from_embeddings(
    video: Tensor, text: Tensor, video_classes: ClassSets, text_classes: ClassSets
) -> MultiInstanceScores:
    """The same from embeddings and classes: neither matrix is ever held, 100,000 x 100,000 is fine.

    Args:
        video: (n, E) embeddings; similarity is their dot product with the texts'.
        text: (m, E) embeddings.
        video_classes: Classes of the n videos, see `class_sets`.
        text_classes: Classes of the m texts.

    Raises:
        ValueError: Shapes do not match, there are no videos or texts, or an embedding is NaN.
    """
    if (
        video.ndim != 2
        or text.ndim != 2
        or video.shape[1] != text.shape[1]
        or (len(video), len(text)) != (len(video_classes), len(text_classes))
        or 0 in (len(video), len(text))
    ):
        raise ValueError(
            f"video embeddings {tuple(video.shape)} with {len(video_classes)} rows of classes and "
            f"text embeddings {tuple(text.shape)} with {len(text_classes)}; both must be (n, E) "
            "with one row of classes each, and there must be at least one of each"
        )
    relevance = _class_blocks(video_classes, text_classes)
    return _scores(
        (lambda rows: video[rows] @ text.T, lambda rows: text[rows] @ video.T),
        relevance,
        len(video),
        len(text),
    )


# Rows of a (queries, items) matrix, for videos as queries and for texts as queries.
Blocks = tuple[Callable[[slice], Tensor], Callable[[slice], Tensor]]


def _matrix_blocks(matrix: Tensor) -> Blocks:
    # Copying twice is the faster way to transpose some columns: torch's cache-blocked
    # transposition is for contiguous matrices only.
    return lambda rows: matrix[rows], lambda rows: matrix[:, rows].contiguous().T.contiguous()


def _class_blocks(video_classes: ClassSets, text_classes: ClassSets) -> Blocks:
    return (
        lambda rows: relevance_block(video_classes, text_classes, rows),
        lambda rows: relevance_block(text_classes, video_classes, rows),
    )


def _scores(
    similarity: Blocks, relevance: Blocks, num_videos: int, num_texts: int
) -> MultiInstanceScores:
    return MultiInstanceScores(
        score_direction(similarity[0], relevance[0], num_videos, num_texts),
        score_direction(similarity[1], relevance[1], num_texts, num_videos),
    )


def score_direction(
    similarity: Callable[[slice], Tensor],
    relevance: Callable[[slice], Tensor],
    num_queries: int,
    num_items: int,
) -> DirectionScores:
    """Means over all queries of one direction."""
    ranks = torch.arange(1, num_items + 1, dtype=torch.float64)
    precisions, gains = [], []
    for rows in row_blocks(num_queries, num_items):
        similar = similarity(rows)
        precision, gain = _score_queries(similar, relevance(rows), ranks.to(similar.device))
        precisions.append(precision)
        gains.append(gain)
    precision, gain = torch.cat(precisions), torch.cat(gains)
    has_precision, has_gain = ~precision.isnan(), ~gain.isnan()
    return DirectionScores(
        map=precision[has_precision].mean().item(),
        ndcg=gain[has_gain].mean().item(),
        num_queries=num_queries,
        num_excluded_map=num_queries - int(has_precision.sum()),
        num_excluded_ndcg=num_queries - int(has_gain.sum()),
        query_map=precision,
        query_ndcg=gain,
    )


def _score_queries(similarity: Tensor, relevance: Tensor, ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Average precision and nDCG of each query, (R,) float64; NaN for one that has none.

    After the sort only the relevant places are looked at: a tenth of all pairs in EK-100.
    """
    refuse_nan(similarity, "similarity")
    if not (relevance.min() >= 0 and relevance.max() <= 1):
        raise ValueError(
            f"relevance lies in [{relevance.min()}, {relevance.max()}]; it must lie in [0, 1]"
        )
    num_queries = len(similarity)
    ranked = relevance.gather(1, descending_order(similarity)).double()
    query, place = (ranked > 0).nonzero(as_tuple=True)
    gain, rank = ranked[query, place], ranks[place]
    num_relevant = query.bincount(minlength=num_queries)

    def sum_by_query(values: Tensor, chosen: Tensor) -> Tensor:
        return sum_by_group(values[chosen], query[chosen], num_queries)

    precision = row_cumsum(ranked)[query, place] / rank
    exact = gain == 1
    average_precision = sum_by_query(precision, exact) / query[exact].bincount(
        minlength=num_queries
    )
    discounted = sum_by_query(gain / (rank + 1).log2(), place < num_relevant[query])
    # Not a matrix product: BLAS rounds by where in memory its operands lie.
    best = sort_ascending_(relevance.clone()).double()
    ideal = best.mul_((1 / (ranks + 1).log2()).flip(0)).sum(1)
    return average_precision, discounted / ideal


def _check_similarity(similarity: Tensor) -> None:
    if similarity.ndim != 2 or similarity.numel() == 0 or not similarity.is_floating_point():
        raise ValueError(
            f"similarity has shape {tuple(similarity.shape)} and dtype {similarity.dtype}; it must "
            "be a floating point matrix (videos, texts) with at least one of each"
        )


def _as_tensors(*values: float) -> tuple[Tensor, Tensor]:
    first, second = torch.tensor(values, dtype=torch.float64)
    return first, second
