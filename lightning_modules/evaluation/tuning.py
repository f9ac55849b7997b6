"""Weights and scales for test time, chosen on clips that are not the test's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from datamodules.files import write_atomically
from lightning_modules.evaluation.benchmarks.ek100_mir import (
    RetrievalAnnotations,
    score_classes,
    scores_as_metrics,
)
from lightning_modules.evaluation.saved import read_similarity
from lightning_modules.evaluation.similarity import bank_normalise, dual_softmax, ensemble

T = TypeVar("T")
OBJECTIVES = ("mean", "map", "ndcg")
# Of one matrix beside the others; coordinates are tried in turn until none gains.
_WEIGHTS = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_SCALES = (5.0, 10.0, 20.0, 50.0, 100.0, 200.0)
_MOST_ROUNDS = 4


@dataclass(frozen=True)
class Tuned:
    """What was chosen, and on what.

    Attributes:
        weights: One a matrix, 0 for one that does not help.
        dual_softmax: Its scale; None for plain retrieval.
        split: Part of the data that it was chosen on.
        num_clips: Clips of it.
        objective: What was made large: `map`, `ndcg` or their `mean`, in percent.
        value: Of the choice.
        before: Of each matrix alone.
        bank_scale: Of the normalisation by a bank of texts; None for none.
        bank_gain: What it gained, on the half of the sentences that was not the bank.
    """

    weights: list[float]
    dual_softmax: float | None
    split: str
    num_clips: int
    objective: str
    value: float
    before: list[float]
    bank_scale: float | None = None
    bank_gain: float = 0.0

    def save(self, path: Path) -> None:
        """Write the choice as JSON."""
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> Tuned:
        """Read a choice.

        Raises:
            ValueError: The file is none.
        """
        try:
            return Tuned(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(f"{path} is no choice that `eva02-at tune` wrote: {error}") from None


def tune(
    paths: Sequence[Path],
    annotations: RetrievalAnnotations,
    split: str,
    *,
    objective: str = "mean",
    transductive: bool = False,
    bank: bool = False,
) -> Tuned:
    """Choose weights of matrices, and where allowed the scale of a dual softmax.

    Args:
        paths: Matrices of the split's clips and sentences; rows of NaN are clips that were not
            held out. A clip counts where every matrix knows it.
        annotations: Of the split.
        split: Its name.
        objective: One of `OBJECTIVES`.
        transductive: Also try dual softmax, which looks at all queries of the test.
        bank: Also try `bank_normalise`: every second sentence is the bank, the others the queries,
            as at the test the bank's sentences are none of the queries.

    Raises:
        ValueError: Both are asked for, the split is the test's, a matrix is malformed, or no clip
            is known to all.
    """
    refuse_test(split)
    if transductive and bank:
        raise ValueError("--transductive and --bank exclude each other: dual softmax has both")
    shape = (len(annotations.clips), len(annotations.sentences))
    matrices = [read_similarity(path, shape) for path in paths]
    present = torch.stack([~matrix.isnan().all(dim=1) for matrix in matrices]).all(dim=0)
    if not present.any():
        raise ValueError(f"no clip of {split} is in all of {', '.join(map(str, paths))}")

    clips, sentences = annotations.classes

    def value(similarity: Tensor, columns: slice = slice(None)) -> float:
        queries = sentences[list(range(len(sentences)))[columns]]
        figures = scores_as_metrics(score_classes(similarity, clips, queries, present))
        parts = ("map", "ndcg") if objective == "mean" else (objective,)
        return sum(figures[name]["avg"] for name in parts) / len(parts)

    before = [value(matrix) for matrix in matrices]
    weights, best = _weights(matrices, value)
    scale = None
    if transductive:
        mixed = _mix(matrices, weights)
        for candidate in _SCALES:
            sharpened = torch.full_like(mixed, torch.nan, dtype=torch.float64)
            sharpened[present] = dual_softmax(mixed[present], candidate)
            if (gained := value(sharpened)) > best:
                scale, best = candidate, gained
    chosen: tuple[float, float | None] = 0.0, None
    if bank:
        mixed = _mix(matrices, weights).double()
        texts, queries = mixed[:, ::2], mixed[:, 1::2]
        plain = value(queries, slice(1, None, 2))
        for candidate in _SCALES:
            gain = value(bank_normalise(queries, texts, candidate), slice(1, None, 2)) - plain
            if gain > chosen[0]:
                chosen = gain, candidate
    num_clips = int(present.sum())
    return Tuned(weights, scale, split, num_clips, objective, best, before, chosen[1], chosen[0])


def refuse_test(split: str) -> None:
    """Refuse to choose on the test split.

    Raises:
        ValueError: It is that.
    """
    if split == "test":
        raise ValueError(
            "tuning on the test split makes its figure worthless; predict on training clips that "
            "were held out (`evaluate --split train --prediction`), and tune on those"
        )


def _weights(
    matrices: Sequence[Tensor], value: Callable[[Tensor], float]
) -> tuple[list[float], float]:
    """Coordinate ascent from equal weights, and from each matrix alone."""
    equal = [1.0] * len(matrices)
    if len(matrices) == 1:
        return equal, value(matrices[0])
    alone = [[float(i == j) for j in range(len(matrices))] for i in range(len(matrices))]
    scored = [(value(_mix(matrices, start)), start) for start in (equal, *alone)]
    best, weights = max(scored, key=lambda pair: pair[0])
    for _ in range(_MOST_ROUNDS):
        improved = False
        for trial in _neighbours(weights):
            if (gained := value(_mix(matrices, trial))) > best:
                best, weights, improved = gained, trial, True
        if not improved:
            break
    return weights, best


def _neighbours(weights: list[float]) -> Iterator[list[float]]:
    for place in range(len(weights)):
        for weight in _WEIGHTS:
            trial = [*weights[:place], weight, *weights[place + 1 :]]
            if weight != weights[place] and any(trial):
                yield trial


def _mix(matrices: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return ensemble(*without_zeros(matrices, weights))


def without_zeros(items: Sequence[T], weights: Sequence[float]) -> tuple[list[T], list[float]]:
    """The items that count, and their weights.

    Raises:
        ValueError: There are not as many weights as items.
    """
    if len(items) != len(weights):
        raise ValueError(f"{len(weights)} weights for {len(items)} matrices; one each is needed")
    used = [(item, weight) for item, weight in zip(items, weights, strict=True) if weight]
    return [item for item, _ in used], [weight for _, weight in used]
