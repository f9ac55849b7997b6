"""Gathering a batch over ranks, uneven last batches included.

Every function here is a no-op where no process group of at least two ranks exists. Gradients follow
the convention of DDP, FSDP and DeepSpeed, which *average* gradients over ranks: see
`GlobalBatch.sum`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """Concatenate the ranks' tensors along dim 0, in the order of ranks, keeping gradients.

    Args:
        tensor: (B_local, ...), B_local may differ between ranks and may be 0; the other dimensions
            and the dtype may not.

    Returns:
        (B_global, ...). The gradient that a rank gets back for its own rows is the sum of what all
        ranks computed for them.
    """
    return GlobalBatch.of(tensor).gather(tensor)


@torch.no_grad()
def gather_no_gradient(tensor: Tensor, padding: float = -1) -> Tensor:
    """Concatenate the ranks' tensors along dim 0, in the order of ranks, without gradients.

    For class ids, whose rows are padded to the widest of each rank's own batch: dimensions beyond
    the first may differ between ranks, too.

    Args:
        tensor: (B_local, ...) of any dtype; the same number of dimensions on each rank.
        padding: Fills narrower ranks' rows up to the widest.

    Returns:
        (B_global, ...), the other dimensions as wide as on the rank where they are widest.
    """
    if world_size() == 1:
        return tensor
    shapes = _exchange(torch.tensor(tensor.shape, device=tensor.device))
    widths = shapes.amax(dim=0).tolist()[1:]
    widened = tensor.new_full((len(tensor), *widths), padding)
    widened[tuple(slice(size) for size in tensor.shape)] = tensor
    return _all_gather_rows(widened, shapes[:, 0].tolist())


@dataclass(frozen=True)
class GlobalBatch:
    """How the rows of a global batch lie over the ranks; a single rank's batch is one of its own.

    Attributes:
        sizes: B_local of each rank.
        rank: The place of this rank in `sizes`.
    """

    sizes: list[int]
    rank: int

    @classmethod
    def of(cls, tensor: Tensor, gather: bool = True) -> GlobalBatch:
        """Learn the other ranks' sizes; with `gather=False` the batch is this rank's alone."""
        if not gather or world_size() == 1:
            return cls([len(tensor)], 0)
        sizes = _exchange(torch.tensor([len(tensor)], device=tensor.device))
        return cls(sizes.flatten().tolist(), dist.get_rank())

    @property
    def first(self) -> int:
        """Place of this rank's first row in the global batch."""
        return sum(self.sizes[: self.rank])

    def __len__(self) -> int:
        return sum(self.sizes)

    def gather(self, tensor: Tensor) -> Tensor:
        """(B_local, ...) of each rank as (B_global, ...), keeping gradients."""
        return tensor if len(self.sizes) == 1 else _GatherRows.apply(tensor, self.sizes)

    def sum(self, share: Tensor) -> Tensor:
        """Sum the ranks' shares of a loss so that averaging gradients over ranks is right.

        Each rank computes the terms of its own rows; their sum over ranks is the loss of the
        global batch, and each rank returns that value. Its gradient is the number of ranks times
        the gradient of the rank's own share, because DDP, FSDP and DeepSpeed then divide by that
        number: what the optimiser sees equals the gradient of one process with the whole batch,
        however unevenly the batch is spread.
        """
        return share if len(self.sizes) == 1 else _SumOverRanks.apply(share)


def _exchange(row: Tensor) -> Tensor:
    """(n,) integers of each rank as (ranks, n)."""
    table = row.new_empty(world_size() * len(row))
    dist.all_gather_single(table, row)
    return table.view(world_size(), len(row))


def _all_gather_rows(tensor: Tensor, sizes: list[int]) -> Tensor:
    """Gather (sizes[rank], ...) tensors: padded to the longest, so that one collective does."""
    longest = max(sizes)
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    gathered = tensor.new_empty((len(sizes) * longest, *tensor.shape[1:]))
    dist.all_gather_single(gathered, padded)
    return torch.cat(
        [block[:size] for block, size in zip(gathered.split(longest), sizes, strict=True)]
    )


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        return _all_gather_rows(tensor, sizes)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        longest, own = max(ctx.sizes), ctx.sizes[dist.get_rank()]
        padded = gradient.new_zeros((len(ctx.sizes), longest, *gradient.shape[1:]))
        for block, share in zip(padded, gradient.split(ctx.sizes), strict=True):
            block[: len(share)] = share
        summed = torch.empty_like(padded[0])
        dist.reduce_scatter_single(summed, padded.flatten(0, 1))
        return summed[:own], None


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * world_size()
