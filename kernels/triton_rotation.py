"""The fused ST-RoPE rotation as one Triton kernel, for GPUs (and Triton's interpreter).

Imported only when it runs: Triton is absent from CPU builds of PyTorch. Why a separate rotation
and not one inside a flash kernel: `docs/kernels.md`.

Shape legend: B clips, S = 1 + T*N tokens, H heads, D head dim; one row of a factor table is
(cos, sin, cos, sin, ...), D float32 numbers, laid out like the channel pairs it turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from kernels.launch import device_of

NUM_WARPS = 4
_VECTOR_BYTES = 16  # one 128-bit load of each thread


@triton.jit
def rotate_kernel(  # type: ignore[no-untyped-def]
    q_in,
    k_in,
    q_out,
    k_out,
    spatial,
    temporal,
    num_tokens,
    num_patches,
    in_stride_b,
    in_stride_s,
    in_stride_h,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    spatial_stride_b,
    sign,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    PAIR: tl.constexpr,
):
    """Rotate BLOCK_TOKENS tokens of HEADS heads of q, and of k where PAIR, of one clip.

    The factor of a token is formed once, in registers, and serves all its heads. In place where
    the outputs are the inputs: every element is read and written by the same thread.
    """
    clip = tl.program_id(1).to(tl.int64)  # a large batch has more than 2^31 elements
    first_head = tl.program_id(2) * HEADS
    tokens = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    channels = tl.arange(0, BLOCK_DIM)
    mask = (tokens < num_tokens)[:, None] & (channels < HEAD_DIM)[None, :]
    is_patch = (tokens > 0)[:, None]  # the CLS token passes through

    patches = tl.maximum(tokens - 1, 0)
    place = (patches % num_patches)[:, None] * HEAD_DIM + channels[None, :]
    time = (patches // num_patches)[:, None] * HEAD_DIM + channels[None, :]
    space = tl.load(spatial + clip * spatial_stride_b + place, mask=mask, other=0.0)
    when = tl.load(temporal + time, mask=mask, other=0.0)
    space_cos, space_sin = tl.split(tl.reshape(space, (BLOCK_TOKENS, BLOCK_DIM // 2, 2)))
    when_cos, when_sin = tl.split(tl.reshape(when, (BLOCK_TOKENS, BLOCK_DIM // 2, 2)))
    cos = space_cos * when_cos - space_sin * when_sin
    sin = (space_cos * when_sin + space_sin * when_cos) * sign

    source = clip * in_stride_b + tokens[:, None] * in_stride_s + channels[None, :]
    target = clip * out_stride_b + tokens[:, None] * out_stride_s + channels[None, :]
    for i in range(HEADS):
        head_in = source + (first_head + i) * in_stride_h
        head_out = target + (first_head + i) * out_stride_h
        q = tl.load(q_in + head_in, mask=mask, other=0.0)
        tl.store(q_out + head_out, _turn(q, cos, sin, is_patch), mask=mask)
        if PAIR:
            k = tl.load(k_in + head_in, mask=mask, other=0.0)
            tl.store(k_out + head_out, _turn(k, cos, sin, is_patch), mask=mask)


@triton.jit
def _turn(x, cos, sin, is_patch):
    """Multiply the pairs of x (tokens, D) by cos + i sin (tokens, D/2), in the factors' dtype."""
    pairs = tl.reshape(x.to(cos.dtype), (x.shape[0], x.shape[1] // 2, 2))
    even, odd = tl.split(pairs)
    turned = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    return tl.where(is_patch, tl.reshape(turned, x.shape).to(x.dtype), x)


def launch_sizes(head_dim: int, num_heads: int, element_bytes: int) -> dict[str, int]:
    """Return the kernel's compile-time sizes.

    A thread holds one 128-bit vector of q and one of k at a time: 8 tokens of 64 channels in
    float32, 16 in bf16, over 4 warps. Up to four heads share a program's factors; more would
    leave too few programs for small batches.
    """
    block_dim = triton.next_power_of_2(head_dim)
    elements = NUM_WARPS * 32 * _VECTOR_BYTES // element_bytes
    heads = next(h for h in (4, 3, 2, 1) if num_heads % h == 0)
    return {
        "HEADS": heads,
        "HEAD_DIM": head_dim,
        "BLOCK_TOKENS": max(1, elements // block_dim),
        "BLOCK_DIM": block_dim,
    }


def rotate_parts(
    parts: Sequence[Tensor],
    outs: Sequence[Tensor],
    factors: tuple[Tensor, Tensor],
    sign: float,
) -> None:
    """Rotate q and k, or k alone, into their outputs, which may be themselves.

    Args:
        parts: One or two (B, S, H, D) of the same strides, with unit stride in D.
        outs: As many, with strides of their own.
        factors: (cos, sin) pairs, spatial (N, P, 2) or (B, N, P, 2) and temporal (T, P, 2).
        sign: 1.0, or -1.0 for the inverse rotation.
    """
    q, k, q_out, k_out = parts[0], parts[-1], outs[0], outs[-1]
    assert q.stride() == k.stride() and q_out.stride() == k_out.stride()
    assert q.stride(3) == 1 and q_out.stride(3) == 1
    spatial, temporal = (f.contiguous() for f in factors)
    num_clips, num_tokens, num_heads, head_dim = q.shape
    sizes = launch_sizes(head_dim, num_heads, q.element_size())
    grid = (
        triton.cdiv(num_tokens, sizes["BLOCK_TOKENS"]),
        num_clips,
        num_heads // sizes["HEADS"],
    )
    with device_of(q):
        rotate_kernel[grid](
            q,
            k,
            q_out,
            k_out,
            spatial,
            temporal,
            num_tokens,
            spatial.shape[-3],
            *q.stride()[:3],
            *q_out.stride()[:3],
            spatial.stride(0) if spatial.dim() == 4 else 0,
            sign,
            **sizes,
            PAIR=len(parts) == 2,
            num_warps=NUM_WARPS,
        )
