"""Gathering a batch over ranks, uneven last batches included.

Every function here is a no-op where no process group of at least two ranks exists. Gradients follow
the convention of DDP, FSDP and DeepSpeed, which *average* gradients over ranks: see
`GlobalBatch.sum`.

`even` says that every rank's batch has this one's size, which the training stream guarantees.
Without it the sizes are exchanged first: one collective more, and the host waits for the device to
read them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_modules.collectives import all_gather, reduce_scatter, world_size


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
    shapes = _exchange(tuple(tensor.shape), tensor.device)
    return _all_gather_rows(_widen(tensor, _widest(shapes), padding), [size for size, *_ in shapes])


@torch.no_grad()
def gather_ids(
    parts: Sequence[Tensor], *, even: bool = False, same_widths: bool = False
) -> Callable[[], list[Tensor]]:
    """Begin to gather class ids, (B_local, V) each and padded with -1, in one collective.

    The ids are there before a step's first product, and are needed after its last.

    Args:
        parts: int64 tensors of the same number of rows.
        even: The number of rows is the same on every rank.
        same_widths: And so are the widths, in their order.

    Returns:
        A function that waits for the (B_global, V) tensors; each as wide as on the widest rank.
    """
    if world_size() == 1:
        return lambda: list(parts)
    widths = [part.shape[1] for part in parts]
    sizes = [len(parts[0])] * world_size()
    if not (even and same_widths):
        shapes = _exchange((len(parts[0]), *widths), parts[0].device)
        sizes, widths = [size for size, *_ in shapes], _widest(shapes)
    rows = torch.cat([_widen(p, [w], -1) for p, w in zip(parts, widths, strict=True)], dim=1)
    if len(set(sizes)) > 1:
        gathered, work = _all_gather_rows(rows, sizes), None
    else:
        gathered = rows.new_empty(len(sizes) * len(rows), rows.shape[1])
        work = all_gather(gathered, rows, async_op=True)

    def wait() -> list[Tensor]:
        if work is not None:
            work.wait()
        return list(gathered.split(widths, dim=1))

    return wait


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
    def of(cls, tensor: Tensor, gather: bool = True, even: bool = False) -> GlobalBatch:
        """Learn the other ranks' sizes; with `gather=False` the batch is this rank's alone."""
        if not gather or world_size() == 1:
            return cls([len(tensor)], 0)
        if even:
            return cls([len(tensor)] * world_size(), dist.get_rank())
        return cls([n for (n,) in _exchange((len(tensor),), tensor.device)], dist.get_rank())

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


def _exchange(row: tuple[int, ...], device: torch.device) -> list[list[int]]:
    """n integers of each rank as (ranks, n); waits for the device."""
    own = torch.tensor(row, device=device)
    table = own.new_empty(world_size() * len(row))
    all_gather(table, own)
    return table.view(world_size(), len(row)).tolist()


def _widest(shapes: list[list[int]]) -> list[int]:
    """The largest of each dimension but the first."""
    return [max(sizes) for sizes in zip(*shapes, strict=True)][1:]


def _widen(tensor: Tensor, widths: Sequence[int], padding: float) -> Tensor:
    """Pad the dimensions beyond the first up to `widths`."""
    if list(tensor.shape[1:]) == list(widths):
        return tensor
    widened = tensor.new_full((len(tensor), *widths), padding)
    widened[tuple(slice(size) for size in tensor.shape)] = tensor
    return widened


def _all_gather_rows(tensor: Tensor, sizes: list[int]) -> Tensor:
    """Gather (sizes[rank], ...) tensors: padded to the longest, so that one collective does."""
    longest = max(sizes)
    gathered = tensor.new_empty((len(sizes) * longest, *tensor.shape[1:]))
    if min(sizes) == longest:
        all_gather(gathered, tensor.contiguous())
        return gathered
    padded = tensor.new_zeros((longest, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    all_gather(gathered, padded)
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
        if min(ctx.sizes) == longest:
            summed = gradient.new_empty((own, *gradient.shape[1:]))
            reduce_scatter(summed, gradient.contiguous())
            return summed, None
        padded = gradient.new_zeros((len(ctx.sizes), longest, *gradient.shape[1:]))
        for block, share in zip(padded, gradient.split(ctx.sizes), strict=True):
            block[: len(share)] = share
        summed = torch.empty_like(padded[0])
        reduce_scatter(summed, padded.flatten(0, 1))
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
