"""LayerNorm, and the residual connection around it, in one pass over memory each way.

PyTorch's own LayerNorm of 768 channels takes three times as long on a GPU as reading and writing
them does (docs/gpu.md), and a residual block reads its stream twice more: to add a
branch's output before the norm, and to add the gradient that goes past the norm to the one that
comes through it. On GPUs two Triton kernels do all of it; elsewhere, and where torch.compile
fuses by itself, the separate operations of PyTorch.

Shape legend: D channels, M tokens.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.operators import operator, wants_triton

# Below, the host takes longer to launch the kernels than the device to run PyTorch's own: measured
# beside an H200, 1.0 ms against 0.55 ms for both passes of 25,000 tokens of 768 channels.
LEAST_ELEMENTS = 2**25


@operator(
    "norm",
    "(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
)
def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(M, D) -> its norm, and the mean and 1/std of each row, (M,)."""
    from kernels import triton_norm

    return triton_norm.forward(x, None, weight, bias, eps)[1:]


@operator(
    "add_norm",
    "(Tensor x, Tensor branch, Tensor weight, Tensor bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def _add_norm(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two (M, D) -> their sum, and what `_norm` says of it."""
    from kernels import triton_norm

    return triton_norm.forward(x, branch, weight, bias, eps)


@operator(
    "norm_backward",
    "(Tensor grad, Tensor? d_total, Tensor total, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of the sum (M, D), and of weight and bias, (2, D)."""
    from kernels import triton_norm

    d_x, d_parameters = triton_norm.backward(grad, d_total, total, weight, mean, rstd)
    return d_x, d_parameters.sum(0).to(weight.dtype)


@torch.library.register_fake("eva02_at::norm")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    return torch.empty_like(x), *(x.new_empty(len(x), dtype=torch.float32) for _ in range(2))


@torch.library.register_fake("eva02_at::add_norm")
def _(x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    statistics = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), torch.empty_like(x), *statistics


@torch.library.register_fake("eva02_at::norm_backward")
def _(
    grad: Tensor, d_total: Tensor | None, total: Tensor, weight: Tensor, *_: Any
) -> tuple[Tensor, ...]:
    return torch.empty_like(total), weight.new_empty(2, len(weight))


class _AddNorm(torch.autograd.Function):
    """Takes any shape: as views outside of it, the changes of shape would be nodes of autograd."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        total = _rows(x)
        if branch is None:
            out, mean, rstd = _norm(total, weight, bias, eps)
        else:
            total, out, mean, rstd = _add_norm(total, _rows(branch), weight, bias, eps)
        ctx.save_for_backward(total, weight, mean, rstd)
        ctx.adds = branch is not None
        ctx.set_materialize_grads(False)
        return x if branch is None else total.view(x.shape), out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, d_total: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if grad is None:
            return d_total, d_total if ctx.adds else None, None, None, None
        past = None if d_total is None else _rows(d_total)
        d_x, d_parameters = _backward(_rows(grad), past, *ctx.saved_tensors)
        d_x = d_x.view(grad.shape)
        return d_x, d_x if ctx.adds else None, *d_parameters.unbind(), None


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """LN(x), formed in float32, in the type of `x`; arguments as of `add_layer_norm`."""
    return add_layer_norm(x, None, weight, bias, eps, backend=backend)[1]


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """x + branch, and its LayerNorm.

    The first result is where the residual stream goes on: taken from here, its gradient joins the
    norm's in the pass that forms it.

    Args:
        x: (..., D).
        branch: (..., D) of the same type, to be added; None for nothing.
        weight: (D,) of the LayerNorm.
        bias: (D,) of the LayerNorm.
        eps: Of the LayerNorm.
        backend: Of the attention in the same block; `kernels.operators.wants_triton` has the rule.
            "auto" and "xformers" also ask for `LEAST_ELEMENTS`.

    Returns:
        The sum and its norm, (..., D) each, of the type of `x`. The norm is formed in float32.
    """
    if _is_worth_it(backend, x):
        return _AddNorm.apply(x, branch, weight, bias, eps)
    total = x if branch is None else x + branch
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def _is_worth_it(backend: str, x: Tensor) -> bool:
    """Say whether the kernels run: not where the compiler fuses, nor where launching is dearer."""
    if torch.compiler.is_compiling() or not wants_triton(backend, x):
        return False
    return backend == "triton" or x.numel() >= LEAST_ELEMENTS
