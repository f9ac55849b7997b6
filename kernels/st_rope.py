"""ST-RoPE: rotary positions of space and time, composed by adding their angles (eqs. 8-10).

Shape legend: B clips, S = 1 + T*N tokens (one CLS first), T frames, N = rows*columns patches a
frame, H heads, D head dim, P = D/2 channel pairs.

Pair i of a head is the channels (2i, 2i+1). For D = 64, patch (row r, column c) of frame t on a
G x G grid, the angle of pair i is, with p = position * reference_grid / G:

    i = 0..15    p_r * theta^(-i/16)       +  t * theta^(-i/32)
    i = 16..31   p_c * theta^(-(i-16)/16)  +  t * theta^(-i/32)

A sum of angles is a product of unit complex numbers, so the rotation of a token is the product of
one spatial factor (of its patch) and one temporal factor (of its frame). Only those two small
tables exist, never the (T*N, D) one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.operators import fused_status
from kernels.rotation import rotate

ROTATION_MODES = ("none", "rotary", "split")


class StRopeTables(NamedTuple):
    """The two factors of the rotation: unit complex numbers as (cos, sin) pairs.

    Attributes:
        spatial: (N, P, 2), or (B, N, P, 2) where each clip has kept other patches.
        temporal: (T, P, 2).
    """

    spatial: Tensor
    temporal: Tensor

    def select(self, patches: Tensor) -> StRopeTables:
        """Return the tables of the kept patches alone.

        Args:
            patches: (B, K) int64, the patches that each clip keeps in every one of its frames.
        """
        return StRopeTables(self.spatial[patches], self.temporal)

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return both tables in the precision to turn `dtype` in: float64's own, else float32."""
        precision = torch.float64 if dtype == torch.float64 else torch.float32
        return self.spatial.to(precision), self.temporal.to(precision)


def st_rope_tables(
    grid: tuple[int, int],
    frames: int,
    head_dim: int,
    *,
    mode: str = "rotary",
    theta: float = 1e4,
    reference_grid: int = 16,
    temporal_positions: Sequence[float] | None = None,
    temporal_stretch: float = 1.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float64,
) -> StRopeTables:
    """Build the spatial and temporal factors of the rotation.

    Tables are cached: they are small and equal for every block, so treat them as read-only. They
    are deliberately no buffers of a module, because `module.bfloat16()` would round them, and
    cosines formed from bf16 angles are off by up to 2.4e-2.

    Args:
        grid: Rows and columns of patches in a frame.
        frames: Number of frames T.
        head_dim: Channels of a head: a multiple of 4, and of 16 for `mode="split"`.
        mode: "rotary" rotates the whole head by time (the paper's ST-RoPE); "split" divides the
            head between time, height and width as 1/4 : 3/8 : 3/8 (CogVideoX's 3D-RoPE); "none"
            rotates by space only, as EVA-02 does.
        theta: Base of the frequencies.
        reference_grid: Grid of EVA-02's pretraining, to which spatial positions are rescaled.
        temporal_positions: T positions; 0..T-1 by default.
        temporal_stretch: s: the slowest temporal frequency becomes s times as slow, the fastest
            stays, those between follow (NTK-aware scaling: theta becomes theta * s^(P/(P-1)) of
            the P pairs that time turns). 1 for none.
        device: Where the tables lie.
        dtype: torch.float64, or torch.float32 where they will never meet float64 inputs.

    Returns:
        Tables of that dtype, rounded once from float64.

    Raises:
        ValueError: for an impossible size or an unknown mode.
    """
    if mode not in ROTATION_MODES:
        raise ValueError(f"mode is {mode!r}; it must be one of {', '.join(ROTATION_MODES)}")
    multiple = 16 if mode == "split" else 4
    if head_dim < multiple or head_dim % multiple:
        raise ValueError(
            f"head_dim is {head_dim}; mode {mode!r} needs a multiple of {multiple}. "
            "Choose another width or number of heads."
        )
    if min(*grid, frames) < 1:
        raise ValueError(f"grid {grid} and frames {frames} must be at least 1")
    positions = tuple(float(t) for t in (temporal_positions or range(frames)))
    if len(positions) != frames:
        raise ValueError(f"temporal_positions has {len(positions)} entries for {frames} frames")
    if not temporal_stretch > 0:
        raise ValueError(f"temporal_stretch is {temporal_stretch}; it must be positive")
    place = torch.device(device) if device is not None else torch.get_default_device()
    rows, columns = grid
    return _cached_tables(
        (rows, columns),
        positions,
        head_dim,
        mode,
        theta,
        reference_grid,
        temporal_stretch,
        place,
        dtype,
    )


@lru_cache(maxsize=64)
def _cached_tables(
    grid: tuple[int, int],
    positions: tuple[float, ...],
    head_dim: int,
    mode: str,
    theta: float,
    reference_grid: int,
    temporal_stretch: float,
    device: torch.device,
    dtype: torch.dtype,
) -> StRopeTables:
    # Outside inference mode, so that a table first built under it can serve training later.
    with torch.inference_mode(False), torch.no_grad():
        spatial, temporal = (
            torch.stack((angle.cos(), angle.sin()), dim=-1).to(device, dtype)
            for angle in _angles(
                grid, positions, head_dim, mode, theta, reference_grid, temporal_stretch
            )
        )
        return StRopeTables(spatial, temporal)


def _frequencies(pairs: int, theta: float, stretch: float = 1.0) -> Tensor:
    """theta^(-i/pairs), i = 0..pairs-1, in float64 on the CPU; the last divided by the stretch."""
    if stretch != 1.0:  # of time, which turns 2 pairs at least
        theta *= stretch ** (pairs / (pairs - 1))
    return theta ** (-torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)


def _angles(
    grid: tuple[int, int],
    positions: tuple[float, ...],
    head_dim: int,
    mode: str,
    theta: float,
    reference_grid: int,
    temporal_stretch: float,
) -> tuple[Tensor, Tensor]:
    """Angles of the spatial (N, P) and the temporal (T, P) factors, float64 on the CPU."""
    pairs = head_dim // 2
    time_pairs = pairs // 4 if mode == "split" else 0
    axis_pairs = (pairs - time_pairs) // 2
    axis_frequencies = _frequencies(axis_pairs, theta)
    height, width = (
        torch.arange(size, dtype=torch.float64, device="cpu")[:, None]
        * (reference_grid / size)
        * axis_frequencies
        for size in grid
    )
    rows, columns = grid
    spatial = torch.zeros(rows, columns, pairs, dtype=torch.float64, device="cpu")
    spatial[..., time_pairs : time_pairs + axis_pairs] = height[:, None]
    spatial[..., time_pairs + axis_pairs :] = width[None, :]
    temporal = torch.zeros(len(positions), pairs, dtype=torch.float64, device="cpu")
    time = torch.tensor(positions, dtype=torch.float64, device="cpu")[:, None]
    if mode == "rotary":
        temporal[:] = time * _frequencies(pairs, theta, temporal_stretch)
    elif mode == "split":
        temporal[:, :time_pairs] = time * _frequencies(time_pairs, theta, temporal_stretch)
    return spatial.flatten(0, 1), temporal


def check_tables(tokens: int, head_dim: int, tables: StRopeTables) -> None:
    """Raise ValueError where (S, D) of q and k do not belong to the tables."""
    num_frames, pairs, _ = tables.temporal.shape
    num_patches = tables.spatial.shape[-3]
    if tokens != 1 + num_frames * num_patches or head_dim != 2 * pairs:
        raise ValueError(
            f"q and k have {tokens} tokens of head dim {head_dim}; the tables are for "
            f"1 + {num_frames}*{num_patches} tokens of head dim {2 * pairs}. Build them with "
            "st_rope_tables(grid, frames, head_dim) of this clip."
        )


def rotate_reference(x: Tensor, tables: StRopeTables) -> Tensor:
    """Rotate (B, S, H, D) as the equations read, in at least float32; CLS passes through.

    (x_even, x_odd) -> (x_even cos - x_odd sin, x_even sin + x_odd cos)

    Materialises the whole (T*N, P) rotation, as no other path does: for tests and for reading.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    space, time = (torch.view_as_complex(table.to(dtype)) for table in tables)
    factor = (time[:, None, :] * space[..., None, :, :]).flatten(-3, -2)  # (T*N, P)
    cos, sin = factor.real.unsqueeze(-2), factor.imag.unsqueeze(-2)  # one for all heads
    cls, patches = x[:, :1], x[:, 1:]
    even, odd = patches[..., 0::2], patches[..., 1::2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return torch.cat((cls, turned.to(x.dtype)), dim=1)


def apply_st_rope(q: Tensor, k: Tensor, tables: StRopeTables) -> tuple[Tensor, Tensor]:
    """Rotate q and k into new tensors; differentiable.

    The fused Triton kernel on CUDA, complex products elsewhere.

    Args:
        q: (B, S, H, D) with S = 1 + T*N, the CLS token first (it is not rotated); any strides.
        k: As q.
        tables: Of `st_rope_tables`. Computed in float32, or float64 for float64 inputs.

    Returns:
        Rotated q and k of the inputs' dtype, contiguous.

    Raises:
        ValueError: if the tokens or head dim do not belong to the tables.
    """
    for x in (q, k):
        check_tables(x.shape[1], x.shape[-1], tables)
    fused = q.is_cuda and fused_status("cuda")[0]
    return rotate(q, k, *tables.factors(q.dtype), False, fused)
