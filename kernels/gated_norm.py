"""SwiGLU's gate and inner norm, LN(SiLU(gate) * value), keeping only its input for the backward.

Written as separate operations, autograd keeps SiLU's output and the product beside the input:
2 F numbers a token of 9 D + 5 F that a block of the B/16 model keeps (a quarter). Both are one
multiplication away, so the backward forms them again. The arithmetic is the same, operation for
operation, and so are the bits. On CPU the time is that of separate operations (the matrix products
are 95 % of the MLP); what is gained is memory, and with it the batch that fits without
recomputing whole blocks.

Shape legend: F hidden channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        gate, value = hidden.chunk(2, dim=-1)
        # LayerNorm runs in its parameters' precision: float32 under autocast, as PyTorch's own
        product = F.silu(gate).mul_(value).to(weight.dtype)
        out, mean, rstd = torch.native_layer_norm(product, weight.shape, weight, bias, eps)
        ctx.save_for_backward(hidden, weight, bias, mean, rstd)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, mean, rstd = ctx.saved_tensors
        gate, value = hidden.chunk(2, dim=-1)
        activated = F.silu(gate)
        product = (activated * value).to(weight.dtype)
        d_product, d_weight, d_bias = torch.ops.aten.native_layer_norm_backward(
            grad, product, weight.shape, mean, rstd, weight, bias, [True, True, True]
        )
        del product
        d_product = d_product.to(hidden.dtype)
        d_hidden = torch.empty_like(hidden)
        d_gate, d_value = d_hidden.chunk(2, dim=-1)
        torch.mul(d_product, activated, out=d_value)
        torch.ops.aten.silu_backward.grad_input(d_product.mul_(value), gate, grad_input=d_gate)
        return d_hidden, d_weight, d_bias, None


def gated_norm(hidden: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LN(SiLU(gate) * value).

    Args:
        hidden: (..., 2F), gate and value side by side.
        weight: (F,) of the LayerNorm.
        bias: (F,) of the LayerNorm.
        eps: Of the LayerNorm.

    Returns:
        (..., F) of the weight's dtype.
    """
    return _GatedNorm.apply(hidden, weight, bias, eps)
