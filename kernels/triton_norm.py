"""LayerNorm with the residual connection around it as two Triton kernels, for GPUs.

Imported only when it runs: Triton is absent from CPU builds of PyTorch.

Shape legend: M tokens, D channels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import device_of, norm_warps, summing_programs

_ROWS = 4  # tokens that a program has in flight at once


@triton.jit
def norm_kernel(  # type: ignore[no-untyped-def]
    x,
    branch,
    weight,
    bias,
    total,
    out,
    mean,
    rstd,
    num_rows,
    eps,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Some tokens: x + branch, where it adds, and the sum's LayerNorm, mean and 1/std."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK)
    mask = (rows < num_rows)[:, None] & (channels < D)[None, :]
    place = rows[:, None] * D + channels[None, :]  # a large batch has more than 2^31 elements
    value = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        value += tl.load(branch + place, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=mask)
        value = rounded.to(tl.float32)  # the norm is that of the sum as it is kept
    centre = tl.sum(value, axis=1) / D
    centred = tl.where(mask, value - centre[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)
    w = tl.load(weight + channels, mask=channels < D, other=0.0).to(tl.float32)
    b = tl.load(bias + channels, mask=channels < D, other=0.0).to(tl.float32)
    normed = centred * scale[:, None] * w[None, :] + b[None, :]
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=mask)
    tl.store(mean + rows, centre, mask=rows < num_rows)
    tl.store(rstd + rows, scale, mask=rows < num_rows)


@triton.jit
def norm_backward_kernel(  # type: ignore[no-untyped-def]
    grad,
    d_total,
    total,
    weight,
    mean,
    rstd,
    d_x,
    d_parameters,
    num_rows,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Every so many-th few tokens: their gradient, and their sum in the weight's and the bias's.

    The gradient is the norm's and, where it adds, what reached the sum past the norm. Which tokens
    a program adds up, and in which order, depends on the number of programs alone: no atomics,
    the same bits every time.
    """
    channels = tl.arange(0, BLOCK)
    own = channels < D
    w = tl.load(weight + channels, mask=own, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), tl.float32)
    d_bias = tl.zeros((BLOCK,), tl.float32)
    program = tl.program_id(0)
    stride = tl.num_programs(0) * ROWS
    for first in range(program * ROWS, num_rows, stride):
        rows = first + tl.arange(0, ROWS)
        mask = (rows < num_rows)[:, None] & own[None, :]
        place = rows.to(tl.int64)[:, None] * D + channels[None, :]
        d_out = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        value = tl.load(total + place, mask=mask, other=0.0).to(tl.float32)
        centre = tl.load(mean + rows, mask=rows < num_rows, other=0.0)
        scale = tl.load(rstd + rows, mask=rows < num_rows, other=0.0)
        normed = tl.where(mask, (value - centre[:, None]) * scale[:, None], 0.0)
        d_weight += tl.sum(d_out * normed, axis=0)
        d_bias += tl.sum(d_out, axis=0)
        d_normed = d_out * w[None, :]
        across = tl.sum(d_normed, axis=1) / D
        along = tl.sum(d_normed * normed, axis=1) / D
        d_value = (d_normed - across[:, None] - normed * along[:, None]) * scale[:, None]
        if ADDS:
            d_value += tl.load(d_total + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(d_x + place, d_value.to(d_x.dtype.element_ty), mask=mask)
    mine = d_parameters + program * 2 * D + channels
    tl.store(mine, d_weight, mask=own)
    tl.store(mine + D, d_bias, mask=own)


def launch_sizes(num_channels: int, *, backward: bool) -> tuple[dict[str, int], int]:
    """Return the kernels' compile-time sizes and the warps, whose threads have all of the rows.

    With more warps than that in the backward they would share the rows between them, so that each
    sum over rows passes through shared memory (3.3 times as slow on an H200).
    """
    block = triton.next_power_of_2(num_channels)
    sizes = {"D": num_channels, "BLOCK": block, "ROWS": _ROWS}
    return sizes, norm_warps(block, backward=backward)


def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The forward pass, as `kernels.norm` asks for it, on contiguous tensors."""
    total = x if branch is None else torch.empty_like(x)
    out = torch.empty_like(x)
    mean, rstd = (x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
    sizes, num_warps = launch_sizes(x.shape[1], backward=False)
    with device_of(x):
        norm_kernel[(triton.cdiv(len(x), _ROWS),)](
            x,
            x if branch is None else branch,
            weight,
            bias,
            total,
            out,
            mean,
            rstd,
            len(x),
            eps,
            **sizes,
            ADDS=branch is not None,
            num_warps=num_warps,
        )
    return total, out, mean, rstd


def backward(
    grad: Tensor,
    d_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor]:
    """The backward pass, as `kernels.norm` asks for it, on contiguous tensors.

    Returns:
        The gradient of the sum (M, D), and parts of the weight's and the bias's, (K, 2, D)
        float32, to be summed over K.
    """
    d_x = torch.empty_like(total)
    num_programs = summing_programs(triton.cdiv(len(total), _ROWS), total.device)
    d_parameters = weight.new_empty(num_programs, 2, len(weight), dtype=torch.float32)
    sizes, num_warps = launch_sizes(total.shape[1], backward=True)
    with device_of(total):
        norm_backward_kernel[(num_programs,)](
            grad,
            total if d_total is None else d_total,
            total,
            weight,
            mean,
            rstd,
            d_x,
            d_parameters,
            len(total),
            **sizes,
            ADDS=d_total is not None,
            num_warps=num_warps,
        )
    return d_x, d_parameters
