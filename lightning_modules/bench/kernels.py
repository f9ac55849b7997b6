"""`eva02-at bench kernels`: rotation, attention, norm and block against the field's formulation."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import st_rope_attention, st_rope_attention_packed
from kernels.norm import add_layer_norm
from kernels.rotation import rotate_packed_
from kernels.st_rope import StRopeTables, st_rope_tables
from lightning_modules.bench import baselines
from lightning_modules.bench.timing import (
    Row,
    add_clock_argument,
    add_output_argument,
    chosen_clock,
    compare,
    device_name,
    report,
)
from lightning_modules.models.layers import Block, BlockConfig, init_layers

GRID = (14, 14)  # of the B/16 model: 196 patches a frame
WIDTH, NUM_HEADS, HEAD_DIM, MLP_HIDDEN = 768, 12, 64, 2048
# "bf16-mixed" is the recipes' way: float32 parameters and residual stream under autocast
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bf16-mixed": torch.float32}


def main(argv: list[str]) -> int:
    """Run the bench.

    Args:
        argv: --frames N ... (1 + 196 N tokens), --dtype NAME ..., --batch B, --rounds R,
            --only NAME ..., --cpu-time, --json FILE.
    """
    parser = argparse.ArgumentParser(prog="eva02-at bench kernels", description=__doc__)
    parser.add_argument("--frames", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=_PARTS, default=list(_PARTS))
    add_clock_argument(parser)
    add_output_argument(parser)
    args = parser.parse_args(argv)
    options = {"rounds": args.rounds, "clock": chosen_clock(args), "memory": "tensors"}
    rows: list[Row] = []
    for frames in args.frames:
        for name in args.dtype:
            tables = st_rope_tables(
                GRID, frames, HEAD_DIM, dtype=torch.float32, device=device_name()
            )
            mixed = name == "bf16-mixed"
            for part in args.only:
                if mixed and part != "block":
                    continue  # a projection's output is bf16 there: the same as "bfloat16"
                with torch.autocast(device_name(), torch.bfloat16, enabled=mixed):
                    rows += _PARTS[part](args.batch, tables, DTYPES[name], options)
    report(rows, args.json)
    return 0


def _title(what: str, batch: int, tables: StRopeTables, dtype: torch.dtype) -> str:
    tokens = 1 + tables.temporal.shape[0] * tables.spatial.shape[0]
    mixed = torch.is_autocast_enabled(device_name())
    name = "bf16-mixed" if mixed else str(dtype).removeprefix("torch.")
    return f"{what}, {batch} x {tokens} tokens, {name}"


def _packed(batch: int, tables: StRopeTables, dtype: torch.dtype) -> Tensor:
    tokens = 1 + tables.temporal.shape[0] * tables.spatial.shape[0]
    generator = torch.Generator().manual_seed(0)
    shape = (batch, tokens, 3 * WIDTH)
    return torch.randn(shape, generator=generator).to(device_name(), dtype)


def _rotation(batch: int, tables: StRopeTables, dtype: torch.dtype, options: dict) -> list[Row]:
    """The rotation of q and k alone, forward; a copy of q and k is the yardstick of its bytes."""
    qkv = _packed(batch, tables, dtype).unflatten(-1, (3, NUM_HEADS, HEAD_DIM))
    q, k = (x.transpose(1, 2) for x in qkv.unbind(2)[:2])
    sin, cos = baselines.materialised_tables(tables, dtype)
    factors = tables.factors(dtype)
    target = torch.empty_like(qkv[:, :, :2])
    cases: dict[str, Callable[[], object]] = {
        "timm-style": lambda: [baselines.rotate_tokens(x, sin, cos) for x in (q, k)],
        "in place": lambda: rotate_packed_(qkv, *factors, qkv.is_cuda),
        "copy of q and k": lambda: target.copy_(qkv[:, :, :2]),
    }
    return compare(_title("rotation", batch, tables, dtype), cases, **options)


def _attention_cases(
    batch: int, tables: StRopeTables, dtype: torch.dtype
) -> dict[str, Callable[[], object]]:
    """Packed projection in, attention out, forward and backward."""
    packed = _packed(batch, tables, dtype)
    shape = (*packed.shape[:2], NUM_HEADS, HEAD_DIM)
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(packed)
    sin_cos = baselines.materialised_tables(tables, dtype)

    def run(attend: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def case() -> Tensor:
            leaf = packed.detach().requires_grad_()
            # `* 1` stands for the projection: the rotation may overwrite what a linear map made
            attend(leaf * 1).backward(gradient)
            assert leaf.grad is not None
            return leaf.grad

        return case

    def field(explicit: bool) -> Callable[[Tensor], Tensor]:
        def attend(projected: Tensor) -> Tensor:
            heads = projected.unflatten(-1, (3, NUM_HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
            q, k, v = heads.unbind(0)
            q, k = (baselines.rotate_tokens(x, *sin_cos) for x in (q, k))
            return baselines.attend(q, k, v, explicit=explicit).transpose(1, 2)

        return attend

    def unpacked(projected: Tensor) -> Tensor:
        q, k, v = projected.unflatten(-1, (3, NUM_HEADS, HEAD_DIM)).unbind(2)
        return st_rope_attention(q, k, v, tables)

    return {
        "timm-style, softmax": run(field(explicit=True)),
        "timm-style, SDPA": run(field(explicit=False)),
        "rotated copies, SDPA": run(unpacked),
        "in place": run(lambda x: st_rope_attention_packed(x, NUM_HEADS, tables)),
        "no rotation": run(lambda x: st_rope_attention_packed(x, NUM_HEADS, None)),
    }


def _attention(batch: int, tables: StRopeTables, dtype: torch.dtype, options: dict) -> list[Row]:
    """Attention in the field's form and in ours."""
    cases = _attention_cases(batch, tables, dtype)
    return compare(_title("attention fwd+bwd", batch, tables, dtype), cases, **options)


def _overhead(batch: int, tables: StRopeTables, dtype: torch.dtype, options: dict) -> list[Row]:
    """What the rotation adds to attention: both in each order (a b b a), so that neither gains."""
    cases = _attention_cases(batch, tables, dtype)
    none, ours = cases["no rotation"], cases["in place"]
    turns = {"no rotation": none, "in place": ours, "in place, again": ours, "none, again": none}
    rows = compare(_title("rotation over none, fwd+bwd", batch, tables, dtype), turns, **options)
    a, b, b_again, a_again = (row.median_s for row in rows)
    rows[1].notes["over no rotation"] = f"{(b + b_again) / (a + a_again) - 1:+.1%}"
    return rows


def _norm(batch: int, tables: StRopeTables, dtype: torch.dtype, options: dict) -> list[Row]:
    """The residual connection and its norm: four passes forward, four backward."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch * (1 + tables.temporal.shape[0] * tables.spatial.shape[0]), WIDTH)
    x, branch, *grads = (
        torch.randn(shape, generator=generator).to(device_name(), dtype) for _ in range(4)
    )
    weight, bias = (torch.ones(WIDTH, device=device_name(), dtype=dtype) for _ in range(2))
    source, target = torch.cat((x, branch, branch, x)), x.new_empty(4 * shape[0], WIDTH)

    def run(backend: str) -> Callable[[], object]:
        def case() -> object:
            leaves = [leaf.detach().requires_grad_() for leaf in (x, branch, weight, bias)]
            stream, added, w, b = leaves
            results = add_layer_norm(stream, added, w, b, 1e-6, backend=backend)
            return torch.autograd.grad(results, leaves, grads)

        return case

    cases: dict[str, Callable[[], object]] = {
        "separate operations": run("sdpa"),
        "in one pass": run("triton" if x.is_cuda else "auto"),
        "copy of as many bytes": lambda: target.copy_(source),
    }
    return compare(_title("x + branch, norm, fwd+bwd", batch, tables, dtype), cases, **options)


def _block(batch: int, tables: StRopeTables, dtype: torch.dtype, options: dict) -> list[Row]:
    """A whole encoder block of the B/16 model, forward and backward with parameter gradients."""
    torch.manual_seed(0)
    config = BlockConfig(
        WIDTH, NUM_HEADS, MLP_HIDDEN, mlp="swiglu", norm_eps=1e-6, key_bias=False, inner_norm=True
    )
    module = Block(config)
    init_layers(module)
    module.to(device_name(), dtype)
    x = _packed(batch, tables, dtype)[..., :WIDTH].contiguous()
    sin_cos = baselines.materialised_tables(tables, dtype)

    def run(forward: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        def case() -> None:
            forward(x.detach().requires_grad_()).square().sum().backward()
            module.zero_grad(set_to_none=True)

        return case

    cases = {
        "timm-style, softmax": run(lambda x: baselines.block(module, x, sin_cos, True)),
        "timm-style, SDPA": run(lambda x: baselines.block(module, x, sin_cos, False)),
        "this project": run(lambda x: module(x, tables)),
        "linear maps alone": _linear_maps(x),  # what no formulation can do without
    }
    return compare(_title("block fwd+bwd", batch, tables, dtype), cases, **options)


def _linear_maps(x: Tensor) -> Callable[[], None]:
    """The block's four linear maps alone, forward and backward."""
    cases = []
    for outputs, channels in (
        (3 * WIDTH, WIDTH),
        (WIDTH, WIDTH),
        (2 * MLP_HIDDEN, WIDTH),
        (WIDTH, MLP_HIDDEN),
    ):
        leaves = [
            x.new_ones(*x.shape[:2], channels),
            x.new_ones(outputs, channels),
            x.new_ones(outputs),
        ]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        cases.append((leaves, torch.ones_like(F.linear(*leaves))))

    def case() -> None:
        for leaves, gradient in cases:
            torch.autograd.grad(F.linear(*leaves), leaves, gradient)

    return case


_PARTS = {
    "rotation": _rotation,
    "overhead": _overhead,
    "attention": _attention,
    "norm": _norm,
    "block": _block,
}
