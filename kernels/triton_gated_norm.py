"""SwiGLU's gate and inner norm as two Triton kernels, for GPUs (and Triton's interpreter).

Imported only when it runs: Triton is absent from CPU builds of PyTorch.

Shape legend: M tokens, F hidden channels, padded with zeros to P; a row of `hidden` is P gates and
P values.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import device_of, norm_warps, summing_programs


@triton.jit
def gated_norm_kernel(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    out,
    mean,
    rstd,
    eps,
    F: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token: LN(SiLU(gate) * value), its mean and its 1/std."""
    row = tl.program_id(0).to(tl.int64)  # a large batch has more than 2^31 elements
    channels = tl.arange(0, BLOCK)
    mask, own = channels < P, channels < F
    gate = tl.load(hidden + row * 2 * P + channels, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(hidden + row * 2 * P + P + channels, mask=mask, other=0.0).to(tl.float32)
    product = gate * tl.sigmoid(gate) * value
    centre = tl.sum(product, axis=0) / F
    centred = tl.where(own, product - centre, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=0) / F + eps)
    w = tl.load(weight + channels, mask=own, other=0.0).to(tl.float32)
    b = tl.load(bias + channels, mask=own, other=0.0).to(tl.float32)
    normed = centred * scale * w + b
    tl.store(out + row * P + channels, normed.to(out.dtype.element_ty), mask=mask)
    tl.store(mean + row, centre)
    tl.store(rstd + row, scale)


@triton.jit
def gated_norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    hidden,
    weight,
    mean,
    rstd,
    d_hidden,
    d_parameters,
    num_rows,
    F: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Every so many-th token: its gradient, and their sum in the weight's and the bias's.

    Which tokens a program adds up, and in which order, depends on the number of programs alone:
    no atomics, the same bits every time.
    """
    channels = tl.arange(0, BLOCK)
    mask, own = channels < P, channels < F
    w = tl.load(weight + channels, mask=own, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    d_bias = tl.zeros((BLOCK,), tl.float32)
    first = tl.program_id(0)
    for step in range(0, num_rows - first, tl.num_programs(0)):
        row = first.to(tl.int64) + step
        place = row * P + channels
        gate_place = row * 2 * P + channels
        gate = tl.load(hidden + gate_place, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(hidden + gate_place + P, mask=mask, other=0.0).to(tl.float32)
        d_out = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(rstd + row)
        open = tl.sigmoid(gate)
        normed = (gate * open * value - tl.load(mean + row)) * scale
        d_weight += d_out * normed
        d_bias += d_out
        d_normed = d_out * w
        sum = tl.sum(d_normed, axis=0) / F
        along = tl.sum(d_normed * normed, axis=0) / F
        d_product = (d_normed - sum - normed * along) * scale
        d_gate = d_product * value * open * (1.0 + gate * (1.0 - open))
        d_value = d_product * gate * open
        tl.store(d_hidden + gate_place, d_gate.to(d_hidden.dtype.element_ty), mask=mask)
        tl.store(d_hidden + gate_place + P, d_value.to(d_hidden.dtype.element_ty), mask=mask)
    mine = d_parameters + first * 2 * F + channels
    tl.store(mine, d_weight, mask=own)
    tl.store(mine + F, d_bias, mask=own)


def launch_sizes(
    num_channels: int, num_padded: int, *, backward: bool
) -> tuple[dict[str, int], int]:
    """Return the kernels' compile-time sizes and the warps.

    Half as many channels a thread in the backward, which keeps eight numbers of each.
    """
    block = triton.next_power_of_2(num_padded)
    sizes = {"F": num_channels, "P": num_padded, "BLOCK": block}
    return sizes, norm_warps(block, backward=backward)


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass, as `kernels.gated_norm` asks for it."""
    num_rows, num_padded = len(hidden), hidden.shape[1] // 2
    out = hidden.new_empty(num_rows, num_padded)
    mean, rstd = (weight.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    sizes, num_warps = launch_sizes(len(weight), num_padded, backward=False)
    with device_of(hidden):
        gated_norm_kernel[(num_rows,)](
            hidden, weight, bias, out, mean, rstd, eps, **sizes, num_warps=num_warps
        )
    return out, mean, rstd


def backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """The backward pass, as `kernels.gated_norm` asks for it."""
    num_rows, num_channels = len(hidden), len(weight)
    d_hidden = torch.empty_like(hidden)
    num_programs = summing_programs(num_rows, hidden.device)
    d_parameters = weight.new_empty(num_programs, 2, num_channels, dtype=torch.float32)
    sizes, num_warps = launch_sizes(num_channels, hidden.shape[1] // 2, backward=True)
    with device_of(hidden):
        gated_norm_backward_kernel[(num_programs,)](
            grad,
            hidden,
            weight,
            mean,
            rstd,
            d_hidden,
            d_parameters,
            num_rows,
            **sizes,
            num_warps=num_warps,
        )
    return d_hidden, d_parameters
