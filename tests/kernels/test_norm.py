"""The residual connection and its norm: the kernels and the separate operations against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from kernels import triton_norm
from kernels.norm import add_layer_norm, layer_norm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 2**-7, torch.float16: 2**-9}
NAMES = ("x", "branch", "weight", "bias")


def inputs(
    dtype: torch.dtype, rows: int, channels: int, weights: torch.dtype | None = None
) -> list[torch.Tensor]:
    """x, branch (M, D), weight, bias (D,): leaves."""
    generator = torch.Generator().manual_seed(rows)
    shapes = ((rows, channels), (rows, channels), (channels,), (channels,))
    drawn = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    drawn[2:] = [x.to(weights or dtype) for x in drawn[2:]]
    return [x.to(DEVICE).requires_grad_() for x in drawn]


def exactly(leaves: list[torch.Tensor], adds: bool) -> tuple[list[torch.Tensor], list]:
    """Sum and norm in float64, of the sum as the type of x keeps it; and their leaves."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    total = exact[0] + exact[1] if adds else exact[0] * 1
    rounding = total.detach().to(leaves[0].dtype).double() - total.detach()
    total = total + rounding
    return [total, F.layer_norm(total, exact[2].shape, exact[2], exact[3], 1e-6)], exact


def assert_near(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCE[dtype]
    scale = expected.abs().max().item()
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("backend", ["sdpa", "triton"])
@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("rows", "channels"), [(1, 7), (4, 64), (9, 768), (6, 1000)])
def test_values_and_gradients(
    backend: str, adds: bool, dtype: torch.dtype, rows: int, channels: int
) -> None:
    """Both results are used, as in a residual block, and each gradient is the sum of two ways."""
    leaves = inputs(dtype, rows, channels, torch.float32)
    expected, exact = exactly(leaves, adds)
    found = add_layer_norm(
        leaves[0], leaves[1] if adds else None, *leaves[2:], 1e-6, backend=backend
    )
    grads = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in found]
    grads = [x.to(found[0]) for x in grads]
    torch.autograd.backward(found, grads)
    torch.autograd.backward(expected, [x.double() for x in grads])
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == dtype
        assert_near(got, want, dtype)
    for name, got, want in zip(NAMES, leaves, exact, strict=True):
        if name == "branch" and not adds:
            assert got.grad is None
            continue
        assert got.grad.dtype == got.dtype
        assert_near(got.grad, want.grad, dtype)


@pytest.mark.parametrize("used", ["total", "norm"])
@pytest.mark.parametrize("adds", [False, True])
def test_a_result_that_nothing_uses(used: str, adds: bool) -> None:
    results = []
    for backend in ("triton", "sdpa"):
        leaves = inputs(torch.float32, 5, 24)
        branch = leaves[1] if adds else None
        total, out = add_layer_norm(leaves[0], branch, *leaves[2:], 1e-6, backend=backend)
        (total if used == "total" else out).square().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for got, expected in zip(*results, strict=True):
        assert (got is None) == (expected is None)
        if got is not None:
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_chain_of_blocks_has_the_gradients_of_separate_operations() -> None:
    """The stream goes on from each sum, so its gradient is added up in the norms' own passes."""
    results = []
    for backend in ("triton", "sdpa"):
        x, branch, weight, bias = inputs(torch.float32, 6, 40)
        total, out = add_layer_norm(x, None, weight, bias, 1e-6, backend=backend)
        for _ in range(3):
            total, out = add_layer_norm(total, out * branch, weight, bias, 1e-6, backend=backend)
        (total.square() + layer_norm(total, weight, bias, 1e-6, backend=backend)).sum().backward()
        results.append([total, *(leaf.grad for leaf in (x, branch, weight, bias))])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_float64_and_the_compiler_go_to_the_separate_operations(
    listen: Callable[..., list[str]],
) -> None:
    ran = listen(triton_norm, "forward", "forward")
    x, _, weight, bias = inputs(torch.float32, 3, 16)
    plain = layer_norm(x, weight, bias, 1e-6, backend="triton")
    assert ran == ["forward"]
    doubles = [leaf.double() for leaf in (x, weight, bias)]
    assert layer_norm(*doubles, 1e-6, backend="triton").dtype == torch.float64
    compiled = torch.compile(layer_norm, fullgraph=True, backend="aot_eager")
    again = compiled(x, weight, bias, 1e-6, backend="triton")
    assert ran == ["forward"]
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-5)


def test_the_same_bits_every_time() -> None:
    gradients = []
    for _ in range(3):
        leaves = inputs(torch.float32, 300, 130)
        total, out = add_layer_norm(*leaves, 1e-6, backend="triton")
        (total.square() + out.square()).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for again in gradients[1:]:
        torch.testing.assert_close(again, gradients[0], rtol=0, atol=0)


def test_any_strides_and_shapes() -> None:
    x, branch, weight, bias = inputs(torch.float32, 12, 5)
    turned = x.detach().view(3, 4, 5).transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    results = []
    for leaf in (x.detach().view(3, 4, 5).requires_grad_(), turned):
        total, out = add_layer_norm(
            leaf, branch.detach().view(3, 4, 5), weight, bias, 1e-6, backend="triton"
        )
        assert total.shape == out.shape == (3, 4, 5)
        ((out + total)[..., :1] * 2).expand(3, 4, 5).sum().backward()  # a gradient of strides 0
        results.append((total, out, leaf.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_nan_stays_in_its_own_token() -> None:
    x, branch, weight, bias = inputs(torch.float32, 6, 20)
    with torch.no_grad():
        x[1, 3] = torch.nan
    total, out = add_layer_norm(x, branch, weight, bias, 1e-6, backend="triton")
    (total + out).square().sum().backward()
    for got in (out, x.grad):
        assert got[1].isnan().any()
        assert got[[0, 2, 3, 4, 5]].isfinite().all()


def test_operators_are_registered_correctly() -> None:
    x, branch, weight, bias = (leaf.detach() for leaf in inputs(torch.float32, 10, 24))
    operators = torch.ops.eva02_at
    torch.library.opcheck(operators.norm.default, (x, weight, bias, 1e-6))
    torch.library.opcheck(operators.add_norm.default, (x, branch, weight, bias, 1e-6))
    total, out, mean, rstd = operators.add_norm.default(x, branch, weight, bias, 1e-6)
    for d_total in (None, x):
        arguments = (out, d_total, total, weight, mean, rstd)
        torch.library.opcheck(operators.norm_backward.default, arguments)
