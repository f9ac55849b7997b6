"""SwiGLU's gate and norm: every form against the separate operations in float64."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from kernels import c_gated_norm, c_library, triton_gated_norm
from kernels.gated_norm import gated_norm
from lightning_modules.bench.timing import peak_tensor_bytes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# roundings of a few operations in float32, and of the result alone: 8 and 11 bits
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 5e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-9,
}


@pytest.fixture(params=["separate", "c", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `gated_norm` is told: Triton's kernels, or what a CPU takes by itself."""
    if request.param == "c" and shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    if request.param == "c":
        assert c_gated_norm._library() is not None
    else:
        monkeypatch.setattr(c_gated_norm, "_library", lambda: None)
    return "triton" if request.param == "triton" else "sdpa"


def separate(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    gate, value = x.chunk(2, dim=-1)
    return F.layer_norm(F.silu(gate) * value, weight.shape, weight, bias, 1e-6)


def inputs(
    dtype: torch.dtype, shape: tuple[int, ...] = (2, 5), channels: int = 7
) -> tuple[torch.Tensor, ...]:
    """Hidden (..., 2F), weight and bias (F,)."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*shape, 2 * channels), (channels,), (channels,))
    return tuple(
        torch.randn(s, generator=generator).to(DEVICE, dtype).requires_grad_() for s in shapes
    )


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[got.dtype]
    scale = expected.abs().max().item()
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("shape", "channels"), [((2, 5), 7), ((1,), 1000), ((70,), 683)])
def test_values_and_gradients(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], channels: int
) -> None:
    leaves = inputs(dtype, shape, channels)
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    out, expected = gated_norm(*leaves, 1e-6, backend=backend), separate(*exact)
    assert out.dtype == dtype
    assert_near(out, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(weights)
    expected.backward(weights.double())
    # 16-bit types without a kernel round SiLU and the product too
    for leaf, other in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == dtype
        assert_near(leaf.grad, other.grad)


def test_far_gates_and_nan(backend: str) -> None:
    """SiLU at the ends of its range; NaN stays in its own token."""
    gates = torch.tensor([-1e30, -200.0, -88.0, -20.0, 0.0, 20.0, 88.0, 1e4])
    hidden = torch.cat((gates, torch.ones(8))).expand(3, -1).clone()
    hidden[1, 3] = torch.nan
    hidden = hidden.to(DEVICE).requires_grad_()
    weight, bias = torch.ones(8, device=DEVICE), torch.zeros(8, device=DEVICE)
    exact = hidden.detach().double().requires_grad_()
    out = gated_norm(hidden, weight, bias, 1e-6, backend=backend)
    expected = separate(exact, weight.double(), bias.double())
    (out * torch.arange(8, device=DEVICE)).sum().backward()
    (expected * torch.arange(8, device=DEVICE)).sum().backward()
    for got, want in ((out, expected), (hidden.grad, exact.grad)):
        assert got[1].isnan().any()
        torch.testing.assert_close(got[::2].double(), want[::2], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_separate_operations_to_the_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(c_gated_norm, "_library", lambda: None)
    results = []
    for function in (separate, lambda *a: gated_norm(*a, 1e-6, backend="sdpa")):
        leaves = inputs(dtype)
        out = function(*leaves)
        (out * torch.arange(7, device=DEVICE)).sum().backward()
        results.append((out, *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_gradients_are_those_of_the_function() -> None:
    x, weight, bias = inputs(torch.float64, (3,))
    torch.autograd.gradcheck(lambda *a: gated_norm(*a, 1e-6, backend="sdpa"), (x, weight, bias))


@pytest.mark.parametrize("threads", [1, 2], ids=["1 thread", "2 threads"])
def test_the_same_bits_every_time(backend: str, threads: int) -> None:
    """Sums over tokens are added up in an order that the number of threads alone decides."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        gradients = []
        for _ in range(5):
            leaves = inputs(torch.float32, (300,), 130)
            gated_norm(*leaves, 1e-6, backend=backend).square().sum().backward()
            gradients.append([leaf.grad for leaf in leaves])
    finally:
        torch.set_num_threads(before)
    for again in gradients[1:]:
        torch.testing.assert_close(again, gradients[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_normalises_in_float32_and_emits_its_own_type(
    backend: str, dtype: torch.dtype
) -> None:
    """Hidden channels of 16 bits and parameters in float32: one rounding, of the result."""
    hidden, weight, bias = inputs(torch.float32)
    leaves = (hidden.detach().to(dtype).requires_grad_(), weight, bias)
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    out, expected = gated_norm(*leaves, 1e-6, backend=backend), separate(*exact)
    assert out.dtype == dtype
    assert_near(out, expected)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(out)
    out.backward(weights)
    expected.backward(weights.double())
    assert [leaf.grad.dtype for leaf in leaves] == [dtype, torch.float32, torch.float32]
    for leaf, other in zip(leaves, exact, strict=True):
        scale = other.grad.abs().max().item()
        tolerance = TOLERANCE[dtype]  # SiLU and the product are rounded where there is no kernel
        torch.testing.assert_close(
            leaf.grad.double(), other.grad, rtol=tolerance, atol=tolerance * scale
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "channels", "padded"), [((2, 5), 7, 8), ((70,), 683, 688)])
def test_padded_channels_change_nothing(
    backend: str, dtype: torch.dtype, shape: tuple[int, ...], channels: int, padded: int
) -> None:
    hidden, weight, bias = inputs(dtype, shape, channels)
    grad = torch.randn((*shape, channels), generator=torch.Generator().manual_seed(1)).to(weight)
    results = []
    for padding in (0, padded - channels):
        leaves = [leaf.detach().clone().requires_grad_() for leaf in (hidden, weight, bias)]
        branches = F.pad(leaves[0].unflatten(-1, (2, -1)), (0, padding))
        out = gated_norm(branches.flatten(-2), *leaves[1:], 1e-6, backend=backend)
        assert not out[..., channels:].any()
        out.backward(F.pad(grad, (0, padding), value=3.0))  # what a padding's gradient is does not
        results.append((out[..., :channels], *(leaf.grad for leaf in leaves)))  # matter
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-7}[dtype]  # sums in another order
    torch.testing.assert_close(*results, rtol=tolerance, atol=10 * tolerance)


def test_any_strides(backend: str) -> None:
    x, weight, bias = inputs(torch.float32, (3, 4))
    turned = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    results = []
    for leaf in (x, turned):
        out = gated_norm(leaf, weight, bias, 1e-6, backend=backend)
        (out[..., :1] * 2).expand(3, 4, 5).sum().backward()  # a gradient of strides 0
        results.append((out, leaf.grad))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_what_was_asked_for_runs_forward_and_backward(
    backend: str, listen: Callable[..., list[str]], request: pytest.FixtureRequest
) -> None:
    """The forms agree, so their results do not tell which one ran."""
    for way in ("forward", "backward"):
        listen(triton_gated_norm, way, f"triton {way}")
        ran = listen(c_gated_norm, way, f"c {way}")
    gated_norm(*inputs(torch.float32), 1e-6, backend=backend).sum().backward()
    form = request.node.callspec.params["backend"]
    separate = form == "separate" or (form == "c" and DEVICE == "cuda")
    assert ran == ([] if separate else [f"{form} forward", f"{form} backward"])


def test_operators_are_registered_correctly(backend: str) -> None:
    fused = backend == "triton"
    hidden, weight, bias = (leaf.detach() for leaf in inputs(torch.float32, (10,)))
    forward = torch.ops.eva02_at.gated_norm.default
    torch.library.opcheck(forward, (hidden, weight, bias, 1e-6, fused))
    out, mean, rstd = forward(hidden, weight, bias, 1e-6, fused)
    arguments = (out, hidden, weight, bias, mean, rstd, fused)
    torch.library.opcheck(torch.ops.eva02_at.gated_norm_backward.default, arguments)


def test_compiles_to_one_graph(backend: str) -> None:
    results = []
    function = torch.compile(gated_norm, fullgraph=True, backend="aot_eager")
    for case in (gated_norm, function):
        leaves = inputs(torch.float32)
        out = case(*leaves, 1e-6, backend=backend)
        out.square().sum().backward()
        results.append((out, *(leaf.grad for leaf in leaves)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_keeps_only_its_input(backend: str) -> None:
    """What stays allocated between forward and backward: the output and the statistics."""
    leaves = inputs(torch.float32, (50,), 1000)
    kept = {}
    for name, function in (
        ("separate", separate),
        ("gated", lambda *a: gated_norm(*a, 1e-6, backend=backend)),
    ):
        sizes: list[int] = []

        def pack(t: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(t.numel() * t.element_size() if t.numel() > 10_000 else 0)
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            function(*leaves)
        kept[name] = sum(sizes)
    one = 50 * 1000 * 4
    # separate: gate, value and SiLU (again for the product), and the product
    assert kept["gated"] == 2 * one
    assert kept["separate"] >= 4 * one


def test_without_a_compiler_it_says_so_and_runs(monkeypatch, caplog) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(c_library, "load", c_library.load.__wrapped__)
    leaves = [leaf.detach().cpu() for leaf in inputs(torch.float32)]
    assert torch.equal(gated_norm(*leaves, 1e-6), separate(*leaves))
    assert "gated_norm.c cannot be built" in caplog.text and "install gcc" in caplog.text


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_c_makes_no_temporary() -> None:
    """Beyond what it returns: a row a thread, and two sums."""
    x, weight, bias = inputs(torch.float32, (500,), 1000)
    one = 500 * 1000 * 4
    small = 0.05 * one
    assert peak_tensor_bytes(lambda: gated_norm(x, weight, bias, 1e-6)) < one + small
    out = gated_norm(x, weight, bias, 1e-6)
    grad = torch.ones_like(out)

    def backward() -> None:
        torch.autograd.grad(out, x, grad, retain_graph=True)

    assert peak_tensor_bytes(backward) < 2 * one + small
