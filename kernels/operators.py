"""What every fused operator of ours needs: its registration, and whether Triton can run it."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch


def fused_status(device_type: str) -> tuple[bool, str]:
    """Say whether the fused Triton kernels can run on a type of device, and why."""
    if importlib.util.find_spec("triton") is None:
        return False, "Triton is not installed; CUDA builds of PyTorch bring it"
    if device_type == "cuda":
        from kernels.trial import triton_problem  # which runs a kernel, and so imports this module

        problem = triton_problem(device_type)
        return problem is None, problem or "fused Triton kernels"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return True, "fused Triton kernels in Triton's interpreter (TRITON_INTERPRET=1): for tests"
    return False, f"Triton kernels run on CUDA only, not on {device_type}"


def wants_triton(backend: str, x: torch.Tensor) -> bool:
    """Say whether an operator beside the attention runs as Triton kernels.

    Args:
        backend: Of the attention in the same block, `kernels.attention.st_rope_attention`: the
            kernels run with "triton", and with "auto" and "xformers" on CUDA where they can.
        x: What it works on. The kernels compute in float32, so float64 never goes there.
    """
    fused = backend == "triton" or (
        backend in ("auto", "xformers") and x.is_cuda and fused_status("cuda")[0]
    )
    return fused and x.dtype != torch.float64


# For torch.compile the answer is a constant, found while tracing. This is all that
# torch.compiler.assume_constant_result does, but that imports the compiler: 3 s for every process.
fused_status._dynamo_marked_constant = True  # type: ignore[attr-defined]


def operator(name: str, schema: str) -> Callable[[Callable], Any]:
    """Register a function as the operator `eva02_at::name`, on CPU and CUDA, without autograd.

    As torch.library.custom_op does, but a call costs 1.4 microseconds instead of 14.
    """

    def register(function: Callable) -> Any:
        torch.library.define(f"eva02_at::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"eva02_at::{name}", ("cpu", "cuda"), function)
        return getattr(torch.ops.eva02_at, name).default

    return register
