"""The rotation on the CPU as compiled C (rotation.c).

Beside the complex products of kernels/rotation.py, which run where it cannot be built, it is three
to five times as fast, and the same to one rounding; to the bit where a head fills whole vectors
(D = 64).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels import c_library

_DTYPES = (torch.float32, torch.bfloat16)


def _library() -> tuple[ctypes.CDLL | None, str]:
    return c_library.load("rotation.c")


def reason(dtype: torch.dtype) -> str:
    """Say how a CPU rotates a type, and why."""
    if dtype not in _DTYPES:
        return f"rotation by complex products, because rotation.c does not know {dtype}"
    library, how = _library()
    if library is None:
        return f"rotation by complex products, because {how}"
    return f"rotation in C, {how}"


def can_rotate(x: Tensor, spatial: Tensor) -> bool:
    """True where `rotate_parts` may be called: on the CPU, of a type it knows, and it was built."""
    return (
        x.device.type == "cpu"
        and x.dtype in _DTYPES
        and spatial.dtype == torch.float32
        and _library()[0] is not None
    )


def rotate_parts(
    parts: Sequence[Tensor],
    outs: Sequence[Tensor],
    factors: tuple[Tensor, Tensor],
    inverse: bool,
    num_turned: int,
) -> None:
    """Write the rotation of the first `num_turned` parts, and the others as they are; no autograd.

    Args:
        parts: R tensors (B, S, H, D), float32 or bfloat16, whose pairs can be viewed as complex
            numbers.
        outs: R tensors of the same kind, which may be the parts themselves.
        factors: Spatial, (N, P, 2) or (B, N, P, 2), and temporal, (T, P, 2), float32.
        inverse: Rotate by the negative angles.
        num_turned: How many parts to rotate.
    """
    library, _ = _library()
    assert library is not None, "can_rotate was not asked"
    spatial, temporal = (table.contiguous() for table in factors)
    num_clips, _, num_heads, head_dim = parts[0].shape
    size = parts[0].element_size()
    numbers = [
        spatial.data_ptr(),
        temporal.data_ptr(),
        spatial.stride(0) if spatial.dim() == 4 else 0,
        num_clips,
        temporal.shape[0],
        spatial.shape[-3],
        num_heads,
        head_dim // 2,
        size,
        -1 if inverse else 1,
        num_turned,
        len(parts),
    ]
    for x, out in zip(parts, outs, strict=True):
        numbers += x.data_ptr(), out.data_ptr()
        numbers += (size * step for tensor in (x, out) for step in tensor.stride()[:3])
    library.rotate((ctypes.c_int64 * len(numbers))(*numbers))  # the fields of `Rotation`
