"""A batch's way to the GPU beside the computation, not in its line.

The host runs ahead of the device: while it asks for the next batch, the device still computes the
step before. Copies on the computation's own stream would wait for that step's end; on a stream of
their own, out of page-locked memory, they are done by then, and the computation waits for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

T = TypeVar("T")


class SideStream:
    """Copies batches to a CUDA device on a stream of its own, made at the first."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def __getstate__(self) -> dict[str, None]:
        return {"_stream": None}  # a copy of a module, or one in another process, makes its own

    def copy(self, device: torch.device, move: Callable[[], T]) -> T:
        """Return a batch on the device; what is computed with it from now on sees it whole.

        Args:
            device: Where to.
            move: Copies the batch there, without waiting (Lightning's own way).
        """
        if device.type != "cuda":
            return move()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        computing = torch.cuda.current_stream(device)
        with torch.cuda.stream(self._stream):
            moved = move()
        computing.wait_stream(self._stream)
        # the memory belongs to the copying stream: it may not be given away before the step is done
        apply_to_collection(moved, Tensor, lambda tensor: tensor.record_stream(computing))
        return moved
