"""What only a GPU can show: the kernels themselves, at the models' sizes."""

from __future__ import annotations

import pytest
import torch

from kernels.attention import BACKENDS, available_backends, st_rope_attention_packed
from kernels.gated_norm import gated_norm
from kernels.norm import add_layer_norm
from kernels.rotation import rotate_packed_
from kernels.st_rope import rotate_reference, st_rope_tables
from lightning_modules.models.layers import Block, BlockConfig, init_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(),
        reason="needs a CUDA device; without one the kernels run in Triton's interpreter "
        "(test_rotation.py) and are compiled ahead of time (test_ahead_of_time.py)",
    ),
]
HEADS, DIM = 12, 64


def inputs(dtype: torch.dtype, frames: int = 4, batch: int = 2):
    tables = st_rope_tables((14, 14), frames, DIM, device="cuda", dtype=torch.float32)
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, 1 + 196 * frames, 3 * HEADS * DIM)
    return tables, torch.randn(shape, generator=generator, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_rotation(dtype: torch.dtype) -> None:
    tables, packed = inputs(dtype, frames=16)
    qkv = packed.unflatten(-1, (3, HEADS, DIM))
    expected = torch.stack([rotate_reference(x, tables) for x in qkv.unbind(2)[:2]], dim=2)
    v = qkv[:, :, 2].clone()
    rotate_packed_(qkv, *tables.factors(dtype), True)
    # Kernel and reference round float32 sums that differ by a fused multiply-add: where the sum is
    # next to the middle of two numbers of the type, they fall to either side, one unit apart. In a
    # simulation 1.2e-4 of float16's differ and 1.8e-5 of bfloat16's, none by more than one unit.
    tolerance = max(torch.finfo(dtype).eps, 1e-6)
    torch.testing.assert_close(qkv[:, :, :2], expected, rtol=tolerance, atol=tolerance)
    if dtype != torch.float32:
        assert (qkv[:, :, :2] != expected).float().mean() < 1e-3
    assert torch.equal(qkv[:, :, 2], v)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [2048, 2730, 2736])
def test_gated_norm(channels: int, weight_dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    rounded = [
        torch.randn(shape, generator=generator, device="cuda").to(dtype)
        for shape, dtype in (
            ((3000, 2 * channels), torch.bfloat16),
            ((channels,), weight_dtype),
            ((channels,), weight_dtype),
        )
    ]
    results = []
    for backend, inputs in (("triton", rounded), ("sdpa", [x.double() for x in rounded])):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = gated_norm(*leaves, 1e-6, backend=backend)
        out.sum().backward()
        results.append([x.double() for x in (out, *(leaf.grad for leaf in leaves))])
    for got, expected in zip(*results, strict=True):
        tolerance = 2**-7  # one rounding of the result to bf16
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [512, 768, 1024])
def test_residual_norm(channels: int, weight_dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = ((3001, channels), (3001, channels), (channels,), (channels,))
    rounded = [torch.randn(s, generator=generator, device="cuda").bfloat16() for s in shapes]
    grads = [torch.randn(shapes[0], generator=generator, device="cuda") for _ in range(2)]
    rounded[1] = rounded[0]  # a sum that needs no rounding
    results = []
    for backend, dtype in (("triton", torch.bfloat16), ("sdpa", torch.float64)):
        wide = weight_dtype if backend == "triton" else dtype
        leaves = [x.to(dtype, copy=True) for x in rounded[:2]]
        leaves += [x.to(wide, copy=True) for x in rounded[2:]]
        for leaf in leaves:
            leaf.requires_grad_()
        found = add_layer_norm(*leaves, 1e-6, backend=backend)
        torch.autograd.backward(found, [g.bfloat16().to(dtype) for g in grads])
        results.append([x.double() for x in (*found, *(leaf.grad for leaf in leaves))])
    for got, expected in zip(*results, strict=True):
        scale = expected.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=2**-7, atol=2**-7 * scale)


def test_more_than_two_to_the_31_elements() -> None:
    """Offsets of a large batch: the L model at 16 frames passes 2^31 at batch 223."""
    tables, _ = inputs(torch.bfloat16, frames=16, batch=1)
    needed = 300 * 3137 * 3 * HEADS * DIM * 2
    if torch.cuda.mem_get_info()[0] < 1.2 * needed:
        pytest.skip(f"needs {1.2 * needed / 2**30:.0f} GiB of free GPU memory")
    qkv = torch.ones(300, 3137, 3, HEADS, DIM, device="cuda", dtype=torch.bfloat16)
    rotate_packed_(qkv, *tables.factors(torch.bfloat16), True)
    assert torch.equal(qkv[0], qkv[-1])
    expected = rotate_reference(torch.ones_like(qkv[-1:, :, 0]), tables)
    torch.testing.assert_close(qkv[-1:, :, 0], expected, rtol=2**-7, atol=2**-7)
    assert not torch.equal(qkv[-1, -1, 0], qkv[-1, -1, 2])  # the last patch turns, and v does not


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(backend: str, dtype: torch.dtype) -> None:
    status = available_backends("cuda", dtype, DIM)[backend]
    if not status.available:
        pytest.skip(status.reason)
    tables, packed = inputs(dtype)
    results = []
    for name, x in ((backend, packed), ("reference", packed.double())):
        leaf = x.clone().requires_grad_()
        out = st_rope_attention_packed(leaf * 1, HEADS, tables, backend=name)
        out.sum().backward()
        results.append((out.double(), leaf.grad.double()))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)


def test_deterministic_mode_repeats_every_bit() -> None:
    tables, packed = inputs(torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        gradients = []
        for _ in range(3):
            leaf = packed.clone().requires_grad_()
            st_rope_attention_packed(leaf * 1, HEADS, tables).square().sum().backward()
            gradients.append(leaf.grad)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(gradients[0], g) for g in gradients[1:])


def test_compiled_block_under_autocast() -> None:
    tables, _ = inputs(torch.float32)
    config = BlockConfig(HEADS * DIM, HEADS, 2048, "swiglu", 1e-6, key_bias=False, inner_norm=True)
    block = Block(config).cuda()
    init_layers(block)
    x = torch.randn(2, 785, HEADS * DIM, device="cuda", dtype=torch.bfloat16)  # a tower's stream
    results = []
    for function in (block, torch.compile(block, fullgraph=True)):
        with torch.autocast("cuda", torch.bfloat16):
            out = function(x, tables)
        block.zero_grad()
        out.float().square().mean().backward()
        results.append((out, block.attn.qkv.weight.grad.clone()))
    torch.testing.assert_close(*results, rtol=3e-2, atol=3e-2)
