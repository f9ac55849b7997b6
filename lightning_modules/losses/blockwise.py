"""Losses over all pairs of a batch without holding the (B, B) matrix of pairs.

A loss here is a sum over the rows of S = rows @ columns.T. It is computed block of rows by block of
rows: each block's similarities are formed, the loss is written on them in plain torch, and its
gradient with respect to the block is taken at once and folded into the gradients of the embeddings.
So a few (block, B) temporaries are alive at a time, nothing is computed twice, and on a CPU the
temporaries stay in the cache. Values and gradients are those of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Similarities in a block. On a CPU about a dozen temporaries of a block should fit the last-level
# cache; on a GPU a block should be large enough to fill the device.
_BLOCK_ELEMENTS = {"cpu": 2**17}
_BLOCK_ELEMENTS_ELSEWHERE = 2**24

# (similarity block, index of its first row, *vectors) -> scalar
BlockLoss = Callable[..., Tensor]


def blockwise_sum(block_loss: BlockLoss, rows: Tensor, columns: Tensor, *vectors: Tensor) -> Tensor:
    """Sum `block_loss` over blocks of rows of `rows @ columns.T`.

    Differentiable once in `rows`, `columns` and `vectors`; whatever else `block_loss` refers to is
    taken as a constant. Autocast is off inside: the sums are over millions of pairs.

    Args:
        block_loss: Called as `block_loss(similarity, first_row, *vectors)` with `similarity`
            (block, n_columns) and the block's place among `rows`; returns a scalar.
        rows: (n_rows, E) floating point.
        columns: (n_columns, E), of the same dtype.
        vectors: Further differentiable inputs, handed to each block as they are.

    Returns:
        The sum over blocks, a scalar of the dtype of `rows`; 0 without rows.
    """
    inputs = (rows, columns, *vectors)
    with_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _BlockwiseSum.apply(block_loss, with_gradient, *inputs)


class _BlockwiseSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block_loss: BlockLoss,
        with_gradient: bool,
        rows: Tensor,
        columns: Tensor,
        *vectors: Tensor,
    ) -> Tensor:
        gradients = [torch.zeros_like(tensor) for tensor in (rows, columns, *vectors)]
        total = add_blocks(block_loss, rows, columns, vectors, gradients if with_gradient else None)
        ctx.save_for_backward(*gradients)
        return total.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * upstream[0] for gradient in ctx.saved_tensors)


def checked_pairs(video: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Check that row b of both is one pair, and return them in at least fp32.

    Args:
        video: (B, E) floating point.
        text: (B, E) floating point.

    Raises:
        ValueError: The shapes differ or are not two-dimensional.
    """
    if video.ndim != 2 or video.shape != text.shape:
        raise ValueError(
            f"video has shape {tuple(video.shape)} and text {tuple(text.shape)}; both must be "
            "(B, E), row b of each being one pair"
        )
    dtype = torch.promote_types(torch.promote_types(video.dtype, text.dtype), torch.float32)
    return video.to(dtype), text.to(dtype)


def add_blocks(
    block_loss: BlockLoss,
    rows: Tensor,
    columns: Tensor,
    vectors: Sequence[Tensor],
    gradients: Sequence[Tensor] | None,
) -> Tensor:
    """The sum over blocks, float64, and its gradients added to `gradients`.

    Args:
        block_loss: As in `blockwise_sum`, as are `rows`, `columns` and `vectors`.
        gradients: Of rows, columns and vectors, in their shapes; None computes none.
    """
    total = rows.new_zeros((), dtype=torch.float64)
    elements = _BLOCK_ELEMENTS.get(rows.device.type, _BLOCK_ELEMENTS_ELSEWHERE)
    block = max(1, elements // max(1, len(columns)))
    with torch.autocast(rows.device.type, enabled=False):
        for start in range(0, len(rows), block):
            part = rows[start : start + block]
            leaves = [tensor.detach() for tensor in (part @ columns.T, *vectors)]
            with torch.set_grad_enabled(gradients is not None):
                for leaf in leaves:
                    leaf.requires_grad_(gradients is not None)
                loss = block_loss(leaves[0], start, *leaves[1:])
            total += loss.detach()
            if gradients is not None:
                on_similarity, *on_vectors = torch.autograd.grad(loss, leaves)
                gradients[0][start : start + block].addmm_(on_similarity, columns)
                gradients[1].addmm_(on_similarity.T, part)
                for gradient, share in zip(gradients[2:], on_vectors, strict=True):
                    gradient += share
    return total
