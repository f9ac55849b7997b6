"""Mean average precision over classes, as Charades defines it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.metrics.functional.ranking import descending_order, refuse_nan
from lightning_modules.metrics.functional.repeatable import row_cumsum


@dataclass(frozen=True)
class ClassAveragePrecision:
    """Charades mAP and what it leaves out.

    Attributes:
        map: Mean over the classes that have a positive, a fraction; NaN without any.
        per_class: (C,) float64 average precisions; NaN for a class without a positive.
        num_excluded_classes: Classes without a positive.
        num_unlabelled: Rows without any label; they count as the worst candidates of every class.
    """

    map: float
    per_class: Tensor
    num_excluded_classes: int
    num_unlabelled: int


def charades_map(scores: Tensor, targets: Tensor) -> ClassAveragePrecision:
    """Mean average precision over classes of multi-label videos.

    As Charades' evaluation does, the scores of videos without any label are set to -inf. For each
    class the videos are sorted by score (ties: the smaller index first), and average precision is
    the mean of the precision at the places of the positives.

    Args:
        scores: (N, C), N videos; no NaN.
        targets: (N, C) multi-hot, 0 or 1.

    Raises:
        ValueError: Shapes differ, a score is NaN, or a target is neither 0 nor 1.
    """
    if scores.ndim != 2 or scores.shape != targets.shape:
        raise ValueError(
            f"scores have shape {tuple(scores.shape)} and targets {tuple(targets.shape)}; both "
            "must be (videos, classes)"
        )
    refuse_nan(scores, "scores")
    if not ((targets == 0) | (targets == 1)).all():
        raise ValueError("targets must be multi-hot: 0 or 1")
    unlabelled = ~targets.bool().any(dim=1)
    scores = scores.masked_fill(unlabelled[:, None], -torch.inf)
    order = descending_order(scores.T.contiguous())
    hits = targets.T.gather(1, order).double()
    ranks = torch.arange(1, len(scores) + 1, dtype=torch.float64, device=scores.device)
    per_class = (hits * row_cumsum(hits) / ranks).sum(1) / hits.sum(1)
    counted = ~per_class.isnan()
    return ClassAveragePrecision(
        map=per_class[counted].mean().item(),
        per_class=per_class,
        num_excluded_classes=int((~counted).sum()),
        num_unlabelled=int(unlabelled.sum()),
    )
