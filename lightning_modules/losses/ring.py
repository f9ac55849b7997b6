"""Losses over all pairs of a global batch of which a rank holds one other's part at a time.

A gathered batch costs each rank (B_global, E) and its gradient. Where a pair's loss needs no other
pair, the columns can go round the ranks instead, and their gradient with them. Three ranks, texts
a, b, c:

    hop          rank 0     rank 1     rank 2
    0            a          b          c
    1            c          a          b
    2            b          c          a
    then home    a          b          c        each with what all ranks added to its gradient
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_modules.losses.blockwise import add_blocks
from lightning_modules.losses.gather import GlobalBatch

# (similarity block, index of its first row, rank whose columns these are, *vectors) -> scalar
RingLoss = Callable[..., Tensor]


def ring_sum(
    block_loss: RingLoss, batch: GlobalBatch, rows: Tensor, columns: Tensor, *vectors: Tensor
) -> Tensor:
    """Sum `block_loss` over this rank's rows against the columns of every rank.

    Differentiable once in `rows`, `columns` and `vectors`. The gradient of a rank's columns is the
    sum of what all ranks computed for them, as `gather_with_gradient`'s is. All ranks take part.

    Args:
        block_loss: Called as `block_loss(similarity, first_row, owner, *vectors)`; as in
            `blockwise_sum`, with the rank that the columns belong to.
        batch: How the batch lies over the ranks.
        rows: (B_local, E).
        columns: (B_local, E), of the same dtype.
        vectors: Further differentiable inputs.

    Returns:
        This rank's share of the sum, a scalar of the dtype of `rows`.
    """
    inputs = (rows, columns, *vectors)
    with_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return _RingSum.apply(block_loss, batch, with_gradient, *inputs)


class _RingSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        block_loss: RingLoss,
        batch: GlobalBatch,
        with_gradient: bool,
        rows: Tensor,
        columns: Tensor,
        *vectors: Tensor,
    ) -> Tensor:
        num_ranks, own = len(batch.sizes), len(columns)
        on_rows, *on_vectors = (torch.zeros_like(tensor) for tensor in (rows, *vectors))
        # the columns and their gradient, of the longest rank's number of rows
        travelling = rows.new_zeros(2, max(batch.sizes), rows.shape[1])
        travelling[0, :own] = columns
        total = rows.new_zeros((), dtype=torch.float64)
        for hop in range(num_ranks):
            owner = (batch.rank - hop) % num_ranks
            their, on_their = travelling[:, : batch.sizes[owner]]

            def of_owner(similarity: Tensor, start: int, *rest: Tensor, of: int = owner) -> Tensor:
                return block_loss(similarity, start, of, *rest)

            gradients = [on_rows, on_their, *on_vectors] if with_gradient else None
            total += add_blocks(of_owner, rows, their, vectors, gradients)
            if num_ranks > 1:
                travelling = _pass_on(travelling)
        ctx.save_for_backward(on_rows, travelling[1, :own], *on_vectors)
        return total.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *(gradient * upstream[0] for gradient in ctx.saved_tensors)


def _pass_on(tensor: Tensor) -> Tensor:
    """Send to the next rank, and return what the one before sent; of one shape on all ranks."""
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    received = torch.empty_like(tensor)
    exchange = [
        dist.P2POp(dist.isend, tensor, (rank + 1) % num_ranks),
        dist.P2POp(dist.irecv, received, (rank - 1) % num_ranks),
    ]
    for work in dist.batch_isend_irecv(exchange):
        work.wait()
    return received
