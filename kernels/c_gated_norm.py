"""SwiGLU's gate and inner norm on the CPU as compiled C (gated_norm.c)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from kernels import c_library

_DTYPES = (torch.float32, torch.bfloat16)
_MAX_CHANNELS = 65_536  # five rows of them on a thread's stack, which is often no more than 2 MiB


def _library() -> ctypes.CDLL | None:
    return c_library.load("gated_norm.c")[0]


def can_run(hidden: Tensor, weight: Tensor) -> bool:
    """True where the functions below may be called: on the CPU, of types it knows, and built."""
    return (
        hidden.device.type == "cpu"
        and hidden.dtype in _DTYPES
        and weight.dtype in _DTYPES
        and hidden.shape[1] // 2 <= _MAX_CHANNELS
        and _library() is not None
    )


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass, as `kernels.gated_norm` asks for it."""
    library = _library()
    assert library is not None, "can_run was not asked"
    weight_f32, bias_f32 = weight.float(), bias.float()
    num_rows, num_padded = len(hidden), hidden.shape[1] // 2
    out = hidden.new_empty(num_rows, num_padded)
    mean, rstd = (torch.empty(num_rows, dtype=torch.float32) for _ in range(2))
    library.gated_norm(
        _address(hidden),
        _integer(hidden.element_size()),
        _address(weight_f32),
        _address(bias_f32),
        _address(out),
        _integer(out.element_size()),
        _address(mean),
        _address(rstd),
        _integer(num_rows),
        _integer(len(weight)),
        _integer(num_padded),
        ctypes.c_double(eps),
    )
    return out, mean, rstd


def backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The backward pass, as `kernels.gated_norm` asks for it."""
    library = _library()
    assert library is not None, "can_run was not asked"
    weight_f32, d_hidden = weight.float(), torch.empty_like(hidden)
    num_threads = torch.get_num_threads()
    d_parameters = torch.zeros(num_threads, 2, len(weight), dtype=torch.float32)
    library.gated_norm_backward(
        _address(grad),
        _integer(grad.element_size()),
        _address(hidden),
        _integer(hidden.element_size()),
        _address(weight_f32),
        _address(mean),
        _address(rstd),
        _address(d_hidden),
        _address(d_parameters),
        _integer(num_threads),
        _integer(len(hidden)),
        _integer(len(weight)),
        _integer(hidden.shape[1] // 2),
    )
    return d_hidden, d_parameters


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


_integer = ctypes.c_int64
