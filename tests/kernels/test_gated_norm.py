"""SwiGLU's gate and norm against the separate operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kernels.gated_norm import gated_norm
from lightning_modules.cli.bench.timing import peak_tensor_bytes


def parameters(dtype: torch.dtype, hidden: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(hidden, generator=generator).to(dtype).requires_grad_() for _ in range(2)
    )


def separate(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.layer_norm(F.silu(gate) * value, weight.shape, weight, bias, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_same_bits_as_separate_operations(dtype: torch.dtype) -> None:
    x = torch.randn(2, 5, 14, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = []
    for function in (separate, lambda x, w, b: gated_norm(x, w, b, 1e-6)):
        weight, bias = parameters(dtype)
        leaf = x.clone().requires_grad_()
        out = function(leaf, weight, bias)
        (out * torch.arange(7)).sum().backward()
        results.append((out, leaf.grad, weight.grad, bias.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_gradients_are_those_of_the_function() -> None:
    weight, bias = parameters(torch.float64)
    x = torch.randn(3, 14, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda *a: gated_norm(*a, 1e-6), (x, weight, bias))


def test_autocast_normalises_in_float32() -> None:
    weight, bias = parameters(torch.float32)
    linear = torch.nn.Linear(4, 14)
    x = torch.randn(2, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = gated_norm(linear(x), weight, bias, 1e-6)
        expected = separate(linear(x), weight, bias)
    assert got.dtype == torch.float32  # CUDA's autocast does so too; the CPU's keeps bf16
    torch.testing.assert_close(got, expected.float(), rtol=2**-7, atol=2**-7)
    got.sum().backward()
    assert linear.weight.grad is not None


def test_keeps_only_its_input() -> None:
    """What stays allocated between forward and backward: the output and the statistics."""
    weight, bias = parameters(torch.float32, hidden=1000)
    x = torch.randn(50, 2000, requires_grad=True)
    kept = {}
    for name, function in (("separate", separate), ("gated", lambda *a: gated_norm(*a, 1e-6))):
        sizes: list[int] = []

        def pack(t: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(t.numel() * t.element_size() if t.numel() > 10_000 else 0)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            function(x, weight, bias)
        kept[name] = sum(sizes)
    one = 50 * 1000 * 4
    # separate: gate, value and SiLU (again for the product), and the product
    assert kept["gated"] == 2 * one
    assert kept["separate"] >= 4 * one
    assert peak_tensor_bytes(lambda: gated_norm(x, weight, bias, 1e-6)) < 2.1 * one
