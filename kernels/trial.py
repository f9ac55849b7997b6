"""A tiny run of what every step will rely on, once a process, before the first step relies on it.

A package that is installed may still not run: Triton compiles its launcher with the machine's C
compiler and Python's headers, which slim containers lack; a FlashAttention package may be built for
another PyTorch. Found out here, it costs speed and a line in the log; in the first step, the job.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _disable_current_modes

from kernels.st_rope import rotate_reference, st_rope_tables

TOLERANCE = 3e-2  # of bf16: the result and the probabilities are rounded


@lru_cache
def triton_problem(device_type: str) -> str | None:
    """Rotate a few tokens with the fused kernel; None, or why it cannot run here.

    Args:
        device_type: "cuda", or "cpu" for Triton's interpreter.
    """
    if device_type == "cuda" and not torch.cuda.is_available():
        return None  # fake CUDA tensors: there is no device to try it on
    # not `except ImportError`: compilers and drivers raise whatever they like
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            return _rotation_problem(device_type)
    except Exception as error:
        return f"Triton cannot run a kernel here: {_last_line(error)}"


def _rotation_problem(device_type: str) -> str | None:
    from kernels.triton_rotation import rotate_parts

    tables = st_rope_tables((2, 2), 2, 64, device=device_type, dtype=torch.float32)
    q = torch.linspace(-1, 1, 9 * 2 * 64, device=device_type).view(1, 9, 2, 64)
    out = torch.empty_like(q)
    rotate_parts([q], [out], tables.factors(q.dtype), 1.0)
    worst = (out - rotate_reference(q, tables)).abs().max().item()
    if not worst < 1e-5:
        return f"Triton's rotation is wrong here, by {worst:.1e}"
    return None


def flash_problem(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Run torch's flash attention forward and backward; None, or why it is not to be used."""
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
            generator = torch.Generator().manual_seed(0)
            shape = (4, 1, 2, 130, head_dim)
            numbers = torch.randn(shape, generator=generator, device="cpu")
            q, k, v, weight = numbers.to(device, dtype)
            results = [
                _value_and_gradients((q, k, v), weight, backend)
                for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH)
            ]
    except Exception as error:
        return _last_line(error)
    worst = max((a - b).abs().max().item() for a, b in zip(*results, strict=True))
    return None if worst < TOLERANCE else f"it is off by {worst:.1e}"


def _value_and_gradients(
    inputs: tuple[Tensor, ...], weight: Tensor, backend: SDPBackend
) -> list[Tensor]:
    q, k, v = leaves = [x.clone().requires_grad_() for x in inputs]
    with sdpa_kernel(backend):
        out = F.scaled_dot_product_attention(q, k, v)
    return [out.detach(), *torch.autograd.grad(out, leaves, weight)]


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
