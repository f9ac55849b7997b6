"""What the launches of our Triton kernels share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

_PROGRAMS_PER_PROCESSOR = 4


def device_of(x: Tensor) -> AbstractContextManager:
    """Launch where `x` lies: Triton takes the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def norm_warps(block: int, *, backward: bool) -> int:
    """Warps for a row of `block` channels: a thread has 16 channels, in the backward 8."""
    return min(16, max(1, block // (256 if backward else 512)))


def summing_programs(most: int, device: torch.device) -> int:
    """Programs of a backward in which each keeps its share of the parameters' gradients.

    Args:
        most: Pieces of work.
        device: Where they run; Triton's interpreter counts as one processor.
    """
    if device.type != "cuda":
        return min(most, _PROGRAMS_PER_PROCESSOR)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return min(most, _PROGRAMS_PER_PROCESSOR * processors)
