"""The rotation on the CPU as compiled C: rotation.c, built on first use.

The build takes a tenth of a second, so every process that rotates on a CPU does it, for the
processor it runs on, in a directory that is gone once the library is loaded: nothing can be stale,
half written or another machine's. Where there is no C compiler `reason` says so, and the rotation
runs as complex products (kernels/rotation.py): slower, and the same to one rounding, to the bit
where a head fills whole vectors (D = 64).
"""

from __future__ import annotations

import ctypes
import os
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("rotation.c")
# Compiled for OpenMP but not linked to one: its calls are bound to the library that PyTorch has
# loaded, and so to its pool of threads and torch.set_num_threads.
_COMPILE = "-std=gnu11 -O3 -march=native -ffp-contract=off -fPIC -fopenmp -c"
_BUILD_SECONDS = 60
_DTYPES = (torch.float32, torch.bfloat16)


@lru_cache(maxsize=1)
def _library() -> tuple[ctypes.CDLL | None, str]:
    """Compile and load rotation.c; the library, or None, and the reason."""
    compiler = os.environ.get("CC") or "gcc"
    with tempfile.TemporaryDirectory(prefix="eva02-at-") as directory:
        compiled, library = Path(directory, "rotation.o"), Path(directory, "rotation.so")
        try:
            for arguments in (
                (*_COMPILE.split(), str(_SOURCE), "-o", str(compiled)),
                ("-shared", str(compiled), "-o", str(library)),
            ):
                subprocess.run(
                    [*shlex.split(compiler), *arguments],
                    check=True,
                    capture_output=True,
                    text=True,
                    timeout=_BUILD_SECONDS,
                )
            return ctypes.CDLL(str(library)), f"rotation in C, built by {compiler}"
        except subprocess.CalledProcessError as error:
            problem = (error.stderr.strip().splitlines() or [str(error)])[-1]
        except (OSError, subprocess.TimeoutExpired) as error:
            problem = str(error)
    return None, (
        f"rotation by complex products, because rotation.c cannot be built ({problem}): install "
        "gcc, or set CC to a compiler that knows -fopenmp"
    )


def reason(dtype: torch.dtype) -> str:
    """Say how a CPU rotates a type, and why."""
    if dtype not in _DTYPES:
        return f"rotation by complex products, because rotation.c does not know {dtype}"
    return _library()[1]


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
