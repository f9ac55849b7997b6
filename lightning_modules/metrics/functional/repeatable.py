"""Sums that `trainer.deterministic=true` allows on a GPU, where PyTorch has none that it trusts."""

from __future__ import annotations

import torch
from torch import Tensor


def sum_by_group(values: Tensor, group: Tensor, num_groups: int) -> Tensor:
    """Sum values (n,) by their group (n,) -> (num_groups,).

    `bincount` with weights does the same, and raises on a GPU in deterministic mode.
    """
    return values.new_zeros(num_groups).index_add_(0, group, values)


def row_cumsum(x: Tensor) -> Tensor:
    """Running sums along dim 1; in deterministic mode a GPU's are computed on the CPU."""
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        return x.cpu().cumsum(1).to(x.device)
    return x.cumsum(1)
