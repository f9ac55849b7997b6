"""How far attention and the norms are from float64: `python -m kernels.numerics`.

    python -m kernels.numerics --write docs/kernels.md   # into the page, between its markers

Without a GPU the Triton backend runs in Triton's interpreter, which rounds bf16 its own way.
Figures of a GPU are the device's: run it there and keep the device's name beside them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import c_gated_norm
from kernels.attention import BACKENDS, available_backends, st_rope_attention_packed
from kernels.gated_norm import gated_norm
from kernels.norm import add_layer_norm
from kernels.operators import fused_status
from kernels.pages import write_between
from kernels.st_rope import StRopeTables, rotate_reference, st_rope_tables

GRID, FRAMES, NUM_HEADS, HEAD_DIM = (14, 14), 4, 2, 64  # 785 tokens, the B/16 model's at 4 frames
GATED_TOKENS, GATED_CHANNELS = 98, 2048  # the B/16 model's
NORM_TOKENS, NORM_WIDTH = 98, 768
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def distance(got: Tensor, exact: Tensor) -> float:
    """Relative RMS distance: |got - exact| / |exact|."""
    return ((got.double() - exact).norm() / exact.norm()).item()


def run(packed: Tensor, weights: Tensor, tables: StRopeTables, backend: str) -> tuple[Tensor, ...]:
    """Attention of a packed projection, and the gradient that `weights` sends back to it."""
    leaf = packed.clone().requires_grad_()
    out = st_rope_attention_packed(leaf * 1, NUM_HEADS, tables, backend=backend)
    out.backward(weights)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def measure(device: str) -> list[tuple[str, str, float, float]]:
    """Rows of (backend, type, distance of the output, distance of the gradient).

    The inputs are those of the type itself, so that only the arithmetic is measured.
    """
    tables = st_rope_tables(GRID, FRAMES, HEAD_DIM, device=device)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1 + FRAMES * GRID[0] * GRID[1], 3 * NUM_HEADS * HEAD_DIM)
    packed = torch.randn(shape, generator=generator).to(device)
    weights = torch.randn(*shape[:2], NUM_HEADS, HEAD_DIM, generator=generator).to(device)
    rows: list[tuple[str, str, float, float]] = []
    for dtype in DTYPES:
        inputs = packed.to(dtype), weights.to(dtype)
        exact = run(inputs[0].double(), inputs[1].double(), tables, "reference")
        out, grad = (distance(x.to(dtype), x) for x in exact)
        rows.append(("(rounding the exact result)", _name(dtype), out, grad))
        for backend in BACKENDS:
            if available_backends(device, dtype, HEAD_DIM)[backend].available:
                got = run(*inputs, tables, backend)
                out, grad = (distance(x, y) for x, y in zip(got, exact, strict=True))
                rows.append((backend, _name(dtype), out, grad))
    return rows


def rotation_in_low_precision(device: str) -> tuple[float, float]:
    """Distance of a bf16 rotation whose angles are float32 (ours), and whose angles are bf16."""
    tables = st_rope_tables(GRID, FRAMES, HEAD_DIM, device=device)
    tokens = 1 + FRAMES * GRID[0] * GRID[1]
    q = torch.randn(1, tokens, 1, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    q = q.to(device, torch.bfloat16)
    exact = rotate_reference(q.double(), tables)
    rounded = StRopeTables(*(t.bfloat16().double() for t in tables))
    low = rotate_reference(q.double(), rounded).bfloat16()
    return distance(rotate_reference(q, tables), exact), distance(low, exact)


def measure_gated_norm(device: str) -> list[tuple[str, str, float, float]]:
    """Rows of (form, type, distance of the output, distance of the gradient of the hidden)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((GATED_TOKENS, 2 * GATED_CHANNELS), (GATED_CHANNELS,), (GATED_CHANNELS,))
    inputs = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    forms: dict[str, Callable[..., Tensor]] = {"separate operations": _separate_gated_norm}
    if c_gated_norm.can_run(inputs[0], inputs[1]):
        forms["C"] = partial(gated_norm, eps=1e-6, backend="sdpa")
    if fused_status(device)[0]:
        forms["Triton"] = partial(gated_norm, eps=1e-6, backend="triton")
    return _distances(inputs, forms, _separate_gated_norm)


def measure_norm(device: str) -> list[tuple[str, str, float, float]]:
    """Rows as of `measure_gated_norm`: a sum with its norm, and the gradient of the sum."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((NORM_TOKENS, NORM_WIDTH), (NORM_WIDTH,), (NORM_WIDTH,))
    inputs = [torch.randn(shape, generator=generator).to(device) for shape in shapes]
    forms = {"separate operations": _residual_norm("sdpa")}
    if fused_status(device)[0]:
        forms["Triton"] = _residual_norm("triton")
    return _distances(inputs, forms, _residual_norm("sdpa"))


def _residual_norm(backend: str) -> Callable[..., Tensor]:
    """x + x, which rounds nothing, beside its norm."""

    def form(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.cat(add_layer_norm(x, x, weight, bias, 1e-6, backend=backend), dim=-1)

    return form


def _distances(
    inputs: Sequence[Tensor],
    forms: Mapping[str, Callable[..., Tensor]],
    reference: Callable[..., Tensor],
) -> list[tuple[str, str, float, float]]:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        rounded = [x.to(dtype) for x in inputs]
        exact = _value_and_gradient(reference, [x.double() for x in rounded])
        forms_and_rounding = {
            "(rounding the exact result)": tuple(x.to(dtype) for x in exact),
            **{name: _value_and_gradient(form, rounded) for name, form in forms.items()},
        }
        for name, got in forms_and_rounding.items():
            out, grad = (distance(x, y) for x, y in zip(got, exact, strict=True))
            rows.append((name, _name(dtype), out, grad))
    return rows


def _separate_gated_norm(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    gate, value = hidden.chunk(2, dim=-1)
    return F.layer_norm(F.silu(gate) * value, weight.shape, weight, bias, 1e-6)


def _value_and_gradient(
    form: Callable[..., Tensor], inputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    hidden = inputs[0].clone().requires_grad_()
    out = form(hidden, *inputs[1:])
    weights = torch.linspace(-1, 1, out.shape[-1], dtype=torch.float64).to(out)
    (gradient,) = torch.autograd.grad(out, hidden, weights.expand_as(out))
    return out.detach(), gradient


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def table(device: str) -> str:
    """The rows as Markdown."""
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    ours, low = rotation_in_low_precision(device)
    gated = measure_gated_norm(device)
    lines = [
        f"PyTorch {torch.__version__.split('+')[0]} on {where}, {1 + FRAMES * 196} tokens, "
        f"{NUM_HEADS} heads of {HEAD_DIM}; relative RMS distance from float64 on the same inputs; "
        "written by `python -m kernels.numerics --write docs/kernels.md`.",
        "",
        "| backend | type | output | gradient of q, k, v |",
        "|---|---|---|---|",
    ]
    lines += [f"| {b} | {t} | {out:.1e} | {grad:.1e} |" for b, t, out, grad in measure(device)]
    lines += [
        "",
        f"The rotation alone in bf16: {ours:.1e} with float32 factors (every backend), {low:.1e} "
        "had the factors been kept in bf16.",
        "",
        f"SwiGLU's gate and norm, {GATED_TOKENS} tokens of {GATED_CHANNELS} hidden channels:",
        "",
        "| form | type | output | gradient of the hidden channels |",
        "|---|---|---|---|",
    ]
    lines += [f"| {f} | {t} | {out:.1e} | {grad:.1e} |" for f, t, out, grad in gated]
    lines += [
        "",
        f"The residual connection and its norm, {NORM_TOKENS} tokens of {NORM_WIDTH} channels:",
        "",
        "| form | type | sum and norm | gradient of the sum |",
        "|---|---|---|---|",
    ]
    lines += [f"| {f} | {t} | {out:.1e} | {grad:.1e} |" for f, t, out, grad in measure_norm(device)]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table and, if asked, write it into a page."""
    parser = argparse.ArgumentParser(prog="python -m kernels.numerics")
    parser.add_argument("--write", type=Path, help="a Markdown page with the two markers")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton
    content = table(device)
    print(content)
    if args.write:
        write_between(args.write, "kernels.numerics", content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
