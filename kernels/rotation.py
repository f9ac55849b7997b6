"""The rotation as PyTorch operators, so that torch.compile, autocast and checkpointing see it.

`eva02_at::rotate_packed_` turns q and k inside a packed projection in place,
`eva02_at::pack_unrotated` is its backward, `eva02_at::rotate` turns q and k into new tensors.
Each runs as the fused Triton kernel, as the CPU's C, or as complex products (every device).

Shape legend: B clips, S = 1 + T*N tokens (CLS first), T frames, N patches a frame, H heads, D head
dim, P = D/2 channel pairs. Factors are (cos, sin) pairs: `spatial` (N, P, 2) or (B, N, P, 2),
`temporal` (T, P, 2); the factor of a token is the product of its patch's and its frame's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels import c_rotation
from kernels.operators import operator


def _rotate_parts(
    parts: Sequence[Tensor],
    outs: Sequence[Tensor],
    factors: tuple[Tensor, Tensor],
    *,
    inverse: bool,
    fused: bool,
    num_turned: int,
) -> None:
    """Rotate the first parts (B, S, H, D) into their outputs, copy the others; no autograd.

    An output may be its part itself; its channel pairs can be viewed as complex numbers. No way
    makes a temporary of q's size, except of parts that are laid out unlike any projection.
    """
    if fused:
        from kernels.triton_rotation import rotate_parts

        turned = parts[:num_turned]
        if len({x.stride() for x in turned}) > 1 or turned[0].stride(-1) != 1:
            turned = [x.contiguous() for x in turned]
        rotate_parts(turned, outs[:num_turned], factors, -1.0 if inverse else 1.0)
    else:
        parts = [x if _is_pairable(x) else _copy(x) for x in parts]
        if c_rotation.can_rotate(parts[0], factors[0]):
            c_rotation.rotate_parts(parts, outs, factors, inverse, num_turned)
            return
        for i in range(num_turned):
            _multiply_into(parts[i], outs[i], *factors, inverse)
    for i in range(num_turned, len(parts)):
        outs[i].copy_(parts[i])


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _multiply_into(
    x: Tensor, out: Tensor, spatial: Tensor, temporal: Tensor, inverse: bool
) -> None:
    """Rotate (B, S, H, D): a complex product a frame, whose factor, (N, P), stays in the cache."""
    space, time = torch.view_as_complex(spatial), torch.view_as_complex(temporal)
    if out is not x:
        out[:, 0].copy_(x[:, 0])
    source, target = (t[:, 1:].unflatten(1, (len(time), -1)) for t in (x, out))
    for t, turn in enumerate(time):
        factor = (space * turn).unsqueeze(-2)
        factor = factor.conj_physical_() if inverse else factor
        if x.dtype == spatial.dtype:
            torch.mul(_as_complex(source[:, t]), factor, out=_as_complex(target[:, t]))
        else:
            turned = _as_complex(source[:, t].to(spatial.dtype)).mul_(factor)
            target[:, t].copy_(torch.view_as_real(turned).flatten(-2))


def _as_complex(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _is_pairable(x: Tensor) -> bool:
    """True if the channel pairs of x (B, S, H, D) can be viewed as complex numbers."""
    clip, token, head, channel = x.stride()
    odd = clip % 2 or token % 2 or head % 2 or x.storage_offset() % 2
    return channel == 1 and not odd


@operator(
    "rotate_packed_", "(Tensor(a!) packed, Tensor spatial, Tensor temporal, bool fused) -> ()"
)
def rotate_packed_(packed: Tensor, spatial: Tensor, temporal: Tensor, fused: bool) -> None:
    """Rotate all but the last part of a packed (B, S, R, H, D) in place.

    The parts are q, k, v (R = 3), or k, v (R = 2): v is untouched.
    """
    turned = packed.unbind(2)[:-1]
    pairable = all(map(_is_pairable, turned))  # as whatever a linear map made
    parts = turned if pairable else tuple(map(_copy, turned))
    factors = (spatial, temporal)
    _rotate_parts(parts, parts, factors, inverse=False, fused=fused, num_turned=len(parts))
    if not pairable:
        for x, out in zip(parts, turned, strict=True):
            out.copy_(x)
    if not packed.is_inference():  # so that autograd notices where somebody still needs it
        torch.autograd.graph.increment_version(packed)


@torch.library.register_fake("eva02_at::rotate_packed_")
def _(packed: Tensor, spatial: Tensor, temporal: Tensor, fused: bool) -> None:
    return None


@operator(
    "pack_unrotated", "(Tensor[] grads, Tensor spatial, Tensor temporal, bool fused) -> Tensor"
)
def pack_unrotated(grads: list[Tensor], spatial: Tensor, temporal: Tensor, fused: bool) -> Tensor:
    """Pack the gradients of the parts into (B, S, R, H, D), all but v's rotated back.

    The packing has to be done without a rotation too: turning the numbers on their way costs
    no memory and no pass of its own.
    """
    packed = _empty_packed(grads)
    factors, num_turned = (spatial, temporal), len(grads) - 1
    _rotate_parts(
        grads, packed.unbind(2), factors, inverse=True, fused=fused, num_turned=num_turned
    )
    return packed


@torch.library.register_fake("eva02_at::pack_unrotated")
def _(grads: list[Tensor], spatial: Tensor, temporal: Tensor, fused: bool) -> Tensor:
    return _empty_packed(grads)


def _empty_packed(parts: Sequence[Tensor]) -> Tensor:
    num_clips, num_tokens, num_heads, head_dim = parts[0].shape
    return parts[0].new_empty(num_clips, num_tokens, len(parts), num_heads, head_dim)


@operator(
    "rotate",
    "(Tensor q, Tensor k, Tensor spatial, Tensor temporal, bool inverse, bool fused)"
    " -> (Tensor, Tensor)",
)
def rotate(
    q: Tensor, k: Tensor, spatial: Tensor, temporal: Tensor, inverse: bool, fused: bool
) -> tuple[Tensor, Tensor]:
    """Rotate q and k (B, S, H, D) into new tensors; differentiable."""
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    factors = (spatial, temporal)
    _rotate_parts((q, k), (q_out, k_out), factors, inverse=inverse, fused=fused, num_turned=2)
    return q_out, k_out


@torch.library.register_fake("eva02_at::rotate")
def _(
    q: Tensor, k: Tensor, spatial: Tensor, temporal: Tensor, inverse: bool, fused: bool
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _rotate_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, _, spatial, temporal, ctx.inverse, ctx.fused = inputs
    ctx.save_for_backward(spatial, temporal)


def _rotate_backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk = rotate(dq, dk, *ctx.saved_tensors, not ctx.inverse, ctx.fused)
    return dq, dk, None, None, None, None


torch.library.register_autograd("eva02_at::rotate", _rotate_backward, setup_context=_rotate_setup)


class _SplitRotated(torch.autograd.Function):
    """(B, S, R*H*D) -> R parts, all but v rotated inside the projection's own memory.

    Safe because the projection is this function's to consume: the linear map that made it keeps
    its input and weight for the backward, not its output.
    """

    @staticmethod
    def forward(
        ctx: Any,
        projected: Tensor,
        num_parts: int,
        num_heads: int,
        spatial: Tensor,
        temporal: Tensor,
        fused: bool,
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(spatial, temporal)
        ctx.fused = fused
        packed = projected.unflatten(-1, (num_parts, num_heads, -1))
        rotate_packed_(packed, spatial, temporal, fused)
        return packed.unbind(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        packed = pack_unrotated(list(grads), *ctx.saved_tensors, ctx.fused)
        return packed.flatten(2), None, None, None, None, None


def split_rotated(
    projected: Tensor,
    num_parts: int,
    num_heads: int,
    spatial: Tensor,
    temporal: Tensor,
    *,
    fused: bool,
) -> tuple[Tensor, ...]:
    """Split a packed projection and rotate all of it but v, without a copy.

    Args:
        projected: (B, S, R*H*D), overwritten: nothing else may read it afterwards.
        num_parts: R: 3 for q, k, v; 2 for k, v.
        num_heads: H.
        spatial: (N, P, 2) or (B, N, P, 2).
        temporal: (T, P, 2).
        fused: Use the Triton kernel.

    Returns:
        R views (B, S, H, D) of `projected`.
    """
    return _SplitRotated.apply(projected, num_parts, num_heads, spatial, temporal, fused)
