"""One door to attention with ST-RoPE: `st_rope_attention`, whichever backend runs behind it.

Shape legend: B clips, S tokens (the CLS first), H heads, D head dim; q, k, v are (B, S, H, D).

| backend | rotation | attention |
|---|---|---|
| reference | the equation, in float32 | the equation, in float32 |
| sdpa | in place: in C on the CPU, else complex products | torch's scaled_dot_product_attention |
| xformers | fused where Triton runs, else as sdpa | xformers' best operator |
| triton | fused | torch's scaled_dot_product_attention |

torch's is FlashAttention 3 or 4 where one is installed (`kernels.flash`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import c_rotation, flash, xformers_door
from kernels.operators import fused_status
from kernels.rotation import rotate, split_rotated
from kernels.st_rope import StRopeTables, check_tables, rotate_reference

_log = logging.getLogger(__name__)

BACKENDS = ("reference", "sdpa", "xformers", "triton")


@dataclass(frozen=True)
class BackendStatus:
    """Whether a backend can run.

    Attributes:
        available: True if it can.
        reason: Why it can or cannot, for the log and for error messages.
    """

    available: bool
    reason: str


def available_backends(
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
) -> Mapping[str, BackendStatus]:
    """Say for each backend whether it can run, and why.

    Args:
        device: Device of q, k, v; by default the current CUDA device where there is one, else CPU.
        dtype: Type of q, k, v.
        head_dim: Channels of a head.

    Returns:
        Name -> status, for every name that `st_rope_attention` takes beside "auto".
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return {name: _status(name, torch.device(device), dtype, head_dim) for name in BACKENDS}


def _status(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> BackendStatus:
    """One backend's: asking for one imports nothing of another's."""
    if backend == "reference":
        return BackendStatus(True, "the equations in plain PyTorch, float32, every device")
    if backend == "xformers":
        return BackendStatus(*xformers_door.status(device, dtype, head_dim))
    library = f"torch {torch.__version__} scaled_dot_product_attention"
    newer = flash.choice(device, dtype)
    library += f" by {newer}" if newer else ""
    if backend == "triton":
        fused, reason = fused_status(device.type)
        return BackendStatus(fused, f"{reason}; {library}" if fused else reason)
    unfused = c_rotation.reason(dtype) if device.type == "cpu" else "rotation by complex products"
    return BackendStatus(True, f"{library}; {unfused}")


def resolve_backend(
    backend: str, device: torch.device | str, dtype: torch.dtype, head_dim: int = 64
) -> str:
    """Return the name of the backend that runs; the first time, log it with its reason.

    Args:
        backend: A name, or "auto": the fused rotation on CUDA where Triton can run, else SDPA.
        device: Device of q, k, v.
        dtype: Type of q, k, v.
        head_dim: Channels of a head.

    Raises:
        ValueError: if the name is unknown, or the named backend cannot run here.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _resolve(backend, torch.device(device), dtype, head_dim, deterministic)


# Cached: it is asked in every block of every step. The deterministic mode is part of the key
# because xformers' dispatcher reads it.
@lru_cache(maxsize=64)
def _resolve(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, deterministic: bool
) -> str:
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"attention backend {backend!r}; one of: auto, {', '.join(BACKENDS)}")
    name = backend
    unfused = None  # why "auto" leaves a GPU without the fused kernels
    if backend == "auto":
        fused, reason = fused_status(device.type)
        unfused = reason if device.type == "cuda" and not fused else None
        name = "triton" if device.type == "cuda" and fused else "sdpa"
    status = _status(name, device, dtype, head_dim)
    if not status.available:
        raise ValueError(
            f"attention backend {name!r} cannot run on {device} with {dtype}: "
            f"{status.reason}. Use backend 'auto' or 'sdpa'."
        )
    if name in ("sdpa", "triton"):
        flash.activate(device, dtype, head_dim)
    asked = " (auto)" if backend == "auto" else ""
    _log.info("attention on %s, %s: %s%s: %s", device, dtype, name, asked, status.reason)
    if unfused:
        _log.warning("no fused kernels on %s: %s. Slower operations run.", device, unfused)
    return name


def _plan(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[str, bool]:
    """What runs: the backend, and whether q and k turn fused."""
    name = resolve_backend(backend, device, dtype, head_dim)
    fused = name == "triton" or (name == "xformers" and fused_status(device.type)[0])
    return name, fused


# For torch.compile the plan is a constant, decided while tracing. This is all that
# torch.compiler.assume_constant_result does, but that imports the compiler: 3 s for every process.
_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]


def st_rope_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: StRopeTables | None,
    *,
    backend: str = "auto",
    causal: bool = False,
) -> Tensor:
    """Softmax attention with q and k rotated by their positions in space and time.

    The scale is D^-0.5. The inputs are left untouched: `st_rope_attention_packed` saves a copy of
    q and k where they come out of one projection.

    Args:
        q: (B, S, H, D); any strides.
        k: As q.
        v: As q; never rotated.
        tables: Of `st_rope_tables`, or None for attention without rotation.
        backend: "auto", "reference", "sdpa", "xformers" or "triton".
        causal: Token i sees tokens 0..i only (the text tower).

    Returns:
        (B, S, H, D) of v's dtype.

    Raises:
        ValueError: for a backend that cannot run here, or tables of another clip.
    """
    name, fused = _plan(backend, q.device, q.dtype, q.shape[-1])
    if tables is not None:
        for x in (q, k):
            check_tables(x.shape[1], x.shape[-1], tables)
        if name == "reference":
            precise = torch.promote_types(q.dtype, torch.float32)
            q, k = (rotate_reference(x.to(precise), tables) for x in (q, k))
        else:
            q, k = rotate(q, k, *tables.factors(q.dtype), False, fused)
    return _attend(q, k, v, name, causal)


def st_rope_attention_packed(
    projected: Tensor,
    num_heads: int,
    tables: StRopeTables | None,
    *,
    backend: str = "auto",
    causal: bool = False,
) -> Tensor:
    """Attention on a packed projection, rotated in its own memory.

    Args:
        projected: (B, S, 3*H*D), q, k and v side by side. Overwritten: nothing else may read it
            afterwards (a linear map does not keep its output for the backward).
        num_heads: H.
        tables: As for `st_rope_attention`.
        backend: As for `st_rope_attention`.
        causal: As for `st_rope_attention`.

    Returns:
        (B, S, H, D).

    Raises:
        ValueError: for a backend that cannot run here, or tables of another clip.
    """
    head_dim = projected.shape[-1] // (3 * num_heads)
    name, fused = _plan(backend, projected.device, projected.dtype, head_dim)
    if tables is None or name == "reference":
        q, k, v = projected.unflatten(-1, (3, num_heads, head_dim)).unbind(2)
        return st_rope_attention(q, k, v, tables, backend=backend, causal=causal)
    check_tables(projected.shape[1], head_dim, tables)
    factors = tables.factors(projected.dtype)
    q, k, v = split_rotated(projected, 3, num_heads, *factors, fused=fused)
    return _attend(q, k, v, name, causal)


def st_rope_attention_pooled(
    q: Tensor,
    projected: Tensor,
    index: Tensor,
    tables: StRopeTables | None,
    *,
    backend: str = "auto",
    causal: bool = False,
) -> Tensor:
    """Attention of one query a sample: all that the last block of a tower is asked for.

    One query a sample is a matrix-vector product, bound by reading k and v once: SDPA does it
    whatever the backend, and the backend decides on the rotation.

    Args:
        q: (B, 1, H, D), the query of token `index`. Not rotated: with tables it is the CLS.
        projected: (B, S, 2*H*D), k and v side by side. Overwritten, as in
            `st_rope_attention_packed`.
        index: (B,) int64.
        tables: As for `st_rope_attention`.
        backend: As for `st_rope_attention`.
        causal: The query sees tokens 0..index only.

    Returns:
        (B, 1, H, D).
    """
    num_heads, head_dim = q.shape[2:]
    name, fused = _plan(backend, q.device, q.dtype, head_dim)
    if tables is None or name == "reference":
        k, v = projected.unflatten(-1, (2, num_heads, head_dim)).unbind(2)
        if tables is not None:
            k = rotate_reference(k, tables)
    else:
        check_tables(projected.shape[1], head_dim, tables)
        k, v = split_rotated(projected, 2, num_heads, *tables.factors(q.dtype), fused=fused)
    seen = None
    if causal:
        seen = torch.arange(k.shape[1], device=q.device) <= index[:, None, None, None]
    q_BHSD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, attn_mask=seen).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, backend: str, causal: bool) -> Tensor:
    if backend == "reference":
        return _reference(q, k, v, causal)
    if backend == "xformers":
        return xformers_door.attention(q, k, v, causal)
    q_BHSD, k_BHSD, v_BHSD = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q_BHSD, k_BHSD, v_BHSD, is_causal=causal)
    return out.transpose(1, 2)


def _reference(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """The equation, in at least float32: every backend is tested against it."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_BHSD, k_BHSD, v_BHSD = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    scores_BHSS = q_BHSD @ k_BHSD.mT / math.sqrt(q.shape[-1])
    if causal:
        future = torch.ones_like(scores_BHSS, dtype=torch.bool).triu(1)
        scores_BHSS = scores_BHSS.masked_fill(future, -torch.inf)
    return (scores_BHSS.softmax(dim=-1) @ v_BHSD).transpose(1, 2).to(v.dtype)
