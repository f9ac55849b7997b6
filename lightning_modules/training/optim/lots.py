"""What optimisers over many tensors share: a closure's loss, and lots of alike parameters."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import Any

import torch
from torch import Tensor

_LOT_ELEMENTS = 2**26  # 256 MiB of float32 for each intermediate result


def loss_of(closure: Callable[[], Tensor] | None) -> Tensor | None:
    """What an optimiser's closure returns, computed with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def lots_of(
    groups: Iterable[dict[str, Any]], likeness: Callable[[dict[str, Any], Tensor], Hashable]
) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """Parameters that can be worked on at once; those without a gradient are in none.

    Under ZeRO every parameter may have a group of its own, most of them alike. A lot is bounded,
    because its intermediate results are all there at the same time.

    Args:
        groups: Of an optimiser.
        likeness: Equal for a group and its parameter, and another group and its, where both can
            go into one lot.

    Returns:
        Each lot with the group of its first parameter.
    """
    lots: list[tuple[dict[str, Any], list[Tensor]]] = []
    open_lots: dict[Hashable, tuple[int, list[Tensor]]] = {}
    for group in groups:
        for param in group["params"]:
            if param.grad is None:
                continue
            key = likeness(group, param)
            size, lot = open_lots.get(key, (_LOT_ELEMENTS, []))
            if size + param.numel() > _LOT_ELEMENTS:
                size, lot = 0, []
                lots.append((group, lot))
            lot.append(param)
            open_lots[key] = size + param.numel(), lot
    return lots
