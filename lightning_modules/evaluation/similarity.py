"""What may be done to similarity matrices at test time; each is named in the result."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def dual_softmax(similarity: Tensor, scale: float) -> Tensor:
    """Sharpen a matrix by how well each side's best match fits the other side.

    log softmax over the texts + log softmax over the videos: the product of both conditional
    probabilities (arXiv 2109.04290 multiplies one of them with the similarities). It looks at all
    queries at once, so it is no longer plain retrieval: the result says so.

    Args:
        similarity: (videos, texts).
        scale: Inverse temperature, 1 for the similarities as they are; 100 is usual for cosines.

    Returns:
        (videos, texts) float64 log probabilities; only their order means anything.

    Raises:
        ValueError: The scale is not positive.
    """
    if not scale > 0:
        raise ValueError(f"dual softmax with scale {scale}; the scale must be positive")
    logits = similarity.double() * scale
    return logits.log_softmax(0) + logits.log_softmax(1)


def bank_normalise(similarity: Tensor, bank: Tensor, scale: float) -> Tensor:
    """Lower the clips that are near every text: querybank normalisation (arXiv 2112.12777).

        S'(v, q) = S(v, q) - 1/scale log mean_b exp(scale S(v, b))

    over a bank of training texts b: the paper's inverted softmax, as logarithm. A clip's shift is
    the same for all texts, so that only the retrieval of clips by texts changes. It looks at no
    other query of the test, unlike `dual_softmax`. The paper's dynamic form, which leaves queries
    alone whose first clip is no text's of the bank, is not done: it ranks each direction by a
    matrix of its own. `tune` takes no bank where it does not gain.

    Args:
        similarity: (clips, texts).
        bank: (clips, training texts), of the same clips.
        scale: Inverse temperature; the larger, the more the nearest text of the bank decides.

    Returns:
        (clips, texts) float64.

    Raises:
        ValueError: The scale is not positive, or the bank has other clips or no text.
    """
    if not scale > 0:
        raise ValueError(f"bank with scale {scale}; the scale must be positive")
    if bank.shape[0] != similarity.shape[0] or not bank.shape[1]:
        raise ValueError(
            f"the bank has shape {tuple(bank.shape)}; it must have the {similarity.shape[0]} clips "
            "of the similarities as rows, and a text at least"
        )
    logits = bank.double() * scale
    shift = (logits.logsumexp(1, keepdim=True) - math.log(bank.shape[1])) / scale
    return similarity.double() - shift


def ensemble(matrices: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
    """Weighted mean of similarity matrices.

    Args:
        matrices: Matrices of one shape.
        weights: One each, positive; equal by default.

    Returns:
        Their mean; a single matrix as it is.

    Raises:
        ValueError: Shapes differ, or the weights do not fit.
    """
    shapes = {tuple(matrix.shape) for matrix in matrices}
    if len(shapes) != 1:
        raise ValueError(f"similarity matrices of shapes {sorted(shapes)}; they must be alike")
    weights = [1.0] * len(matrices) if weights is None else list(weights)
    if len(weights) != len(matrices) or not all(weight > 0 for weight in weights):
        raise ValueError(
            f"weights {weights} for {len(matrices)} matrices; one positive weight each is needed"
        )
    if len(matrices) == 1:
        return matrices[0]
    # fp64: a mean of float32 matrices should tie where they all tie, and nowhere else
    total = torch.zeros(matrices[0].shape, dtype=torch.float64)
    for matrix, weight in zip(matrices, weights, strict=True):
        total += matrix.double() * (weight / sum(weights))
    return total
