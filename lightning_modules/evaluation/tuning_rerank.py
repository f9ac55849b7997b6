"""K and W of a second look, chosen on clips that are not the test's."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from datamodules.files import write_atomically
from lightning_modules.evaluation.benchmarks.ek100_mir import (
    RetrievalAnnotations,
    scores_as_metrics,
)
from lightning_modules.evaluation.rerank import candidates
from lightning_modules.evaluation.saved import read_similarity
from lightning_modules.evaluation.tuning import refuse_test

_TOPS = (5, 10, 20, 50, 100, 200, 500, 1000)
_BLENDS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class TunedRerank:
    """What was chosen, and on what.

    Attributes:
        top: K; 0 where no second look gained.
        blend: W.
        split: Part of the data that it was chosen on.
        num_clips: Clips of it.
        objective: What was made large, in percent.
        value: Of the choice.
        before: Of the dual encoder alone.
        tried: K of the trials.
    """

    top: int
    blend: float
    split: str
    num_clips: int
    objective: str
    value: float
    before: float
    tried: list[int]

    def save(self, path: Path) -> None:
        """Write the choice as JSON."""
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")


def tune_rerank(
    similarity: Path,
    scores: Path,
    annotations: RetrievalAnnotations,
    split: str,
    *,
    objective: str = "mean",
) -> TunedRerank:
    """Try every K whose candidates were looked at, with every W.

    The smallest K that no larger one beats is taken: it costs least.

    Args:
        similarity: The dual encoder's matrix; rows of NaN are clips that were not held out.
        scores: What `evaluate --rerank-scores` wrote beside it.
        annotations: Of the split.
        split: Its name.
        objective: One of `OBJECTIVES`.

    Raises:
        ValueError: The split is the test's, a matrix is malformed, no clip was held out, or the
            scores are another matrix's.
    """
    refuse_test(split)
    shape = (len(annotations.clips), len(annotations.sentences))
    first, second = read_similarity(similarity, shape), read_similarity(scores, shape)
    present = ~first.isnan().all(dim=1) & ~second.isnan().all(dim=1)
    if not present.any():
        raise ValueError(f"no clip of {split} is in both {similarity} and {scores}")
    first = first.masked_fill(~present[:, None], torch.nan)  # who is a candidate depends on it
    chosen = {top: _looked_at(first, second, top) for top in _TOPS}
    looked_at = {top: masks for top, masks in chosen.items() if masks is not None}
    if not looked_at:
        raise ValueError(
            f"{scores} lacks candidates of the top {_TOPS[0]} of {similarity}: the one is not of "
            "the other, or of fewer; write both with `evaluate --split train`, the scores with "
            "--rerank ... --top K"
        )

    def value(by_clip: Tensor, by_text: Tensor) -> float:
        return objective_of(by_clip, by_text, annotations, present, objective)

    before = best = value(first, first)
    choice = (0, 0.0)
    for top, masks in looked_at.items():
        for blend in _BLENDS:
            gained = value(*(first + blend * second.where(mask, torch.zeros(())) for mask in masks))
            if gained > best:
                best, choice = gained, (top, blend)
    counted = int(present.sum())
    return TunedRerank(*choice, split, counted, objective, best, before, list(looked_at))


def objective_of(
    by_clip: Tensor,
    by_text: Tensor,
    annotations: RetrievalAnnotations,
    present: Tensor,
    objective: str,
) -> float:
    """What is made large, in percent: `v2t` of the first matrix, `t2v` of the second."""
    first, other = (annotations.score(matrix, present) for matrix in (by_clip, by_text))
    figures = scores_as_metrics(replace(first, t2v=other.t2v))
    parts = ("map", "ndcg") if objective == "mean" else (objective,)
    return sum(figures[name]["avg"] for name in parts) / len(parts)


def _looked_at(first: Tensor, second: Tensor, top: int) -> tuple[Tensor, Tensor] | None:
    """Candidates of a K, clips' and texts', where all of them have a score."""
    num_clips = int((~first.isnan().all(dim=1)).sum())
    if top > min(num_clips, first.shape[1]):
        return None
    masks = candidates(first, top)
    return masks if all(bool((second[mask] > 0).all()) for mask in masks) else None
