"""SwiGLU's gate and inner norm, LN(SiLU(gate) * value), keeping only its input for the backward.

Written as separate operations, autograd keeps SiLU's output and the product beside the input:
2 F numbers a token of 9 D + 5 F that a block of the B/16 model keeps (a quarter). Both are one
multiplication away, so the backward forms them again. As one pass over memory it is also faster:
on GPUs two Triton kernels, on CPUs C, elsewhere the separate operations, which round the product
to the input's type before its norm.

Where F is no multiple of 8, the hidden channels come padded with zeros to P, which is: rows that
do not begin at multiples of 16 bytes are read in narrow pieces, by matrix products above all.

Shape legend: F hidden channels, P >= F of them with padding, M tokens.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import c_gated_norm
from kernels.operators import operator, wants_triton


def _kernels(hidden: Tensor, weight: Tensor, fused: bool) -> ModuleType | None:
    """The module whose `forward` and `backward` run, or None for the separate operations.

    Both modules have the same two functions, on a contiguous `hidden` and `grad`:
    `forward(hidden, weight, bias, eps)` as `_forward` below, and
    `backward(grad, hidden, weight, mean, rstd)`, which returns the gradient of hidden (M, 2P) and
    parts of the gradients of weight and bias, (K, 2, F) float32, to be summed over K.
    """
    if fused:
        from kernels import triton_gated_norm

        return triton_gated_norm
    return c_gated_norm if c_gated_norm.can_run(hidden, weight) else None


@operator(
    "gated_norm",
    "(Tensor hidden, Tensor weight, Tensor bias, float eps, bool fused)"
    " -> (Tensor, Tensor, Tensor)",
)
def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, eps: float, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(M, 2P) -> (M, P) of the same dtype, and the mean and 1/std of each row, (M,)."""
    if (kernels := _kernels(hidden, weight, fused)) is not None:
        return kernels.forward(hidden, weight, bias, eps)
    gate, value = _branches(hidden, weight)
    precision = _precision(weight)
    product = F.silu(gate).mul_(value).to(precision)
    affine = (weight.to(precision), bias.to(precision))
    out, mean, rstd = torch.native_layer_norm(product, weight.shape, *affine, eps)
    out = F.pad(out.to(hidden.dtype), (0, hidden.shape[1] // 2 - len(weight)))
    return out, mean.flatten(), rstd.flatten()


def _branches(hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """Gate and value, (M, F) each, without the padding."""
    return [part[:, : len(weight)] for part in hidden.chunk(2, dim=1)]


@torch.library.register_fake("eva02_at::gated_norm")
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor, eps: float, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = hidden.shape[0]
    mean, rstd = (weight.new_empty(rows, dtype=_precision(weight)) for _ in range(2))
    return hidden.new_empty(rows, hidden.shape[1] // 2), mean, rstd


def _precision(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


@operator(
    "gated_norm_backward",
    "(Tensor grad, Tensor hidden, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, bool fused)"
    " -> (Tensor, Tensor, Tensor)",
)
def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of hidden (M, 2P), weight (F,) and bias (F,)."""
    grad = grad.contiguous()
    if (kernels := _kernels(hidden, weight, fused)) is not None:
        d_hidden, d_parameters = kernels.backward(grad, hidden, weight, mean, rstd)
        d_weight, d_bias = (part.sum(0).to(weight.dtype) for part in d_parameters.unbind(1))
        return d_hidden, d_weight, d_bias
    gate, value = _branches(hidden, weight)
    activated = F.silu(gate)
    precision = _precision(weight)
    product = (activated * value).to(precision)
    statistics = (mean.unsqueeze(-1), rstd.unsqueeze(-1))
    affine = (weight.to(precision), bias.to(precision))
    own_grad = grad[:, : len(weight)].to(precision)
    d_product, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
        own_grad,
        product,
        weight.shape,
        *statistics,
        *affine,
        [True, True, True],
    )
    del product
    d_product = d_product.to(hidden.dtype)
    d_hidden = torch.zeros_like(hidden)
    d_gate, d_value = _branches(d_hidden, weight)
    torch.mul(d_product, activated, out=d_value)
    torch.ops.aten.silu_backward.grad_input(d_product.mul_(value), gate, grad_input=d_gate)
    return d_hidden, d_weight.to(weight.dtype), d_bias.to(weight.dtype)


@torch.library.register_fake("eva02_at::gated_norm_backward")
def _(
    grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(weight), torch.empty_like(bias)


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, eps: float, fused: bool
    ) -> Tensor:
        out, mean, rstd = _forward(hidden, weight, bias, eps, fused)
        ctx.save_for_backward(hidden, weight, bias, mean, rstd)
        ctx.fused = fused
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(grad, *ctx.saved_tensors, ctx.fused), None, None


def gated_norm(
    hidden: Tensor, weight: Tensor, bias: Tensor, eps: float, *, backend: str = "auto"
) -> Tensor:
    """LN(SiLU(gate) * value).

    The norm is formed in float32, whatever the types, and leaves in the hidden channels' type,
    which the linear map behind it takes as it is.

    Args:
        hidden: (..., 2P), gate and value side by side, each F channels and, where P > F, zeros.
        weight: (F,) of the LayerNorm.
        bias: (F,) of the LayerNorm.
        eps: Of the LayerNorm.
        backend: Of the attention in the same block; `kernels.operators.wants_triton` has the rule.

    Returns:
        (..., P) of the dtype of `hidden`, zero beyond F.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])
    out = _GatedNorm.apply(rows.contiguous(), weight, bias, eps, wants_triton(backend, hidden))
    return out.view(*hidden.shape[:-1], -1)
