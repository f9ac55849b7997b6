"""Similarity matrices that were saved: read, averaged, scored. A row of NaN is a clip missing."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.evaluation.benchmarks.ek100_mir import (
    RetrievalAnnotations,
    refuse_undefined,
    scores_as_metrics,
)
from lightning_modules.evaluation.missing import MAX_MISSING, Coverage
from lightning_modules.evaluation.similarity import bank_normalise, dual_softmax, ensemble

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SavedScore:
    """What a saved prediction is worth.

    Attributes:
        similarity: The matrix, or the mean of several.
        coverage: How many of the benchmark's clips it knows.
        metrics: As `evaluate` has them.
    """

    similarity: Tensor
    coverage: Coverage
    metrics: dict[str, Any]


def score_saved(
    paths: Sequence[Path],
    annotations: RetrievalAnnotations,
    *,
    weights: Sequence[float] | None = None,
    scale: float | None = None,
    bank: Sequence[Path] = (),
    bank_scale: float | None = None,
    max_missing: float = MAX_MISSING,
) -> SavedScore:
    """Score the (weighted) mean of saved matrices; a clip that one of them misses is missing.

    Args:
        paths: The files.
        annotations: Clips (rows) and sentences (columns).
        weights: Of the matrices; equal by default.
        scale: Of the dual softmax to score instead.
        bank: The same models' matrices of the clips and a bank of texts, to normalise by.
        bank_scale: Its scale.
        max_missing: Greatest share of clips that may be missing.

    Raises:
        ValueError: A matrix is missing, malformed or of the wrong shape, a similarity is NaN, or
            too many clips are missing.
    """
    expected = (len(annotations.clips), len(annotations.sentences))
    similarity = ensemble([read_similarity(path, expected) for path in paths], weights)
    of_bank = None
    if bank:
        if len(bank) != len(paths) or bank_scale is None or scale is not None:
            raise ValueError(
                f"{len(bank)} banks for {len(paths)} matrices, scale {bank_scale}: a bank of each "
                "matrix's model is needed, and the scale that `tune --bank` chose; and no dual "
                "softmax"
            )
        banks = [read_similarity(path, (expected[0], None)) for path in bank]
        of_bank = ensemble(banks, weights)
        # a clip that the bank lacks is missing
        similarity = similarity.masked_fill(of_bank.isnan().any(1, keepdim=True), torch.nan)
    present = ~similarity.isnan().all(dim=1)
    coverage = Coverage.of(present)
    first = int(present.logical_not().nonzero().flatten()[0]) if coverage.missing else 0
    coverage.check(
        max_missing,
        f"Rows of NaN (such as {first}, of clip {annotations.clips[first].narration_id!r}) are "
        "clips that the evaluation lacked; evaluate the whole, or raise --max-missing.",
    )
    blank = ~similarity.any(dim=1)
    if blank.any() and not blank.all():
        log.warning(
            "%d rows are nothing but zeros (the first: %d) and are ranked as such; if these clips "
            "are missing, make them NaN",
            int(blank.sum()),
            int(blank.nonzero()[0]),
        )
    scored = similarity
    if scale is not None:
        scored = torch.full_like(similarity, torch.nan, dtype=torch.float64)
        scored[present] = dual_softmax(similarity[present], scale)
    if of_bank is not None and bank_scale is not None:
        scored = torch.full_like(similarity, torch.nan, dtype=torch.float64)
        scored[present] = bank_normalise(similarity[present], of_bank[present], bank_scale)
    scores = annotations.score(scored, present)
    refuse_undefined(scores)
    metrics = scores_as_metrics(scores)
    metrics["num_missing_clips"] = coverage.missing
    if scale is not None:
        metrics["dual_softmax"] = scale
        metrics["transductive"] = True  # it looks at the other queries of the test
    if of_bank is not None:
        metrics["bank"] = {"scale": bank_scale, "num_texts": of_bank.shape[1]}
    return SavedScore(similarity, coverage, metrics)


def read_similarity(path: Path, expected: tuple[int, int | None]) -> Tensor:
    """Read a .npy matrix without running code it may carry.

    Args:
        path: The file.
        expected: (clips, sentences) that it must have; None for any number of sentences.

    Raises:
        ValueError: No such file, not a .npy file, or another shape or type than expected.
    """
    if not path.is_file():
        raise ValueError(f"similarity file {path} does not exist; give the path of an existing one")
    try:
        matrix = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is no plain .npy array ({error}); write it with numpy.save"
        ) from None
    if not isinstance(matrix, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays (.npz); give a single .npy array")
    if expected[1] is None and matrix.ndim == 2:
        expected = expected[0], matrix.shape[1]
    if matrix.shape != expected:
        raise ValueError(
            f"{path} has shape {matrix.shape}; it must be {expected}: {expected[0]} clips (rows) "
            f"and {expected[1]} sentences (columns)"
        )
    if matrix.dtype.kind != "f" or matrix.dtype.itemsize > 8:
        raise ValueError(
            f"{path} has dtype {matrix.dtype}; it must be float32 (or float16, float64)"
        )
    return torch.from_numpy(np.ascontiguousarray(matrix, matrix.dtype.newbyteorder("=")))
