"""Each form of the rotation against the equation: values, gradients, memory, stray reads.

Each test runs once with each form. Triton's runs in its interpreter where there is no GPU
(tests/conftest.py).
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kernels import c_library, c_rotation, rotation, triton_rotation
from kernels.attention import available_backends
from kernels.rotation import _multiply_into, pack_unrotated, rotate, rotate_packed_, split_rotated
from kernels.st_rope import StRopeTables, apply_st_rope, rotate_reference, st_rope_tables
from lightning_modules.bench.timing import peak_tensor_bytes

# grid, frames, heads, head dim: odd everything, head dims that are no power of two
SHAPES = [((2, 3), 3, 3, 20), ((1, 1), 1, 1, 4), ((3, 3), 2, 4, 64), ((5, 1), 5, 2, 12)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# one rounding of the result: 8, 11 and 24 bits; the interpreter rounds bf16 up to one ulp apart
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.bfloat16: 2**-7,
    torch.float16: 2**-10,
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["complex", "c", "triton"])
def fused(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """What the operators are told: True for the Triton kernel; C is what a CPU takes by itself."""
    if request.param == "c" and shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    if request.param == "c":
        assert "in C" in c_rotation.reason(torch.float32)
    else:
        monkeypatch.setattr(c_rotation, "_library", lambda: (None, "not in this test"))
    return request.param == "triton"


def inputs(shape: tuple, dtype: torch.dtype, batch: int = 2) -> tuple[StRopeTables, torch.Tensor]:
    """Tables and a packed (B, S, 3, H, D)."""
    grid, frames, heads, head_dim = shape
    tables = st_rope_tables(grid, frames, head_dim, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    tokens = 1 + frames * grid[0] * grid[1]
    packed = torch.randn(batch, tokens, 3, heads, head_dim, generator=generator)
    return tables, packed.to(DEVICE, dtype)


def assert_near(got: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCE[expected.dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape: tuple, dtype: torch.dtype, fused: bool) -> None:
    tables, packed = inputs(shape, dtype)
    factors = tables.factors(dtype)
    q, k, v = packed.unbind(2)
    leaf = packed.flatten(2).clone().requires_grad_()
    parts = split_rotated(leaf * 1, 3, q.shape[2], *factors, fused=fused)
    expected = (rotate_reference(q, tables), rotate_reference(k, tables), v)
    for got, want in zip(parts, expected, strict=True):
        assert_near(got, want)
    for got, want in zip(rotate(q, k, *factors, False, fused), expected, strict=False):
        assert_near(got, want)

    slow = packed.double().clone().requires_grad_()
    q, k, v = slow.unbind(2)
    weights = torch.randn(3, *q.shape, dtype=torch.float64).to(DEVICE, dtype)
    torch.autograd.backward(
        (rotate_reference(q, tables), rotate_reference(k, tables), v), list(weights.double())
    )
    torch.autograd.backward(parts, list(weights))
    assert_near(leaf.grad, slow.grad.to(dtype).flatten(2))


def test_keys_alone(fused: bool) -> None:
    """The last block packs k and v only."""
    tables, packed = inputs(SHAPES[0], torch.float32)
    factors = tables.factors(torch.float32)
    leaf = packed[:, :, 1:].flatten(2).clone().requires_grad_()
    k, v = split_rotated(leaf * 1, 2, 3, *factors, fused=fused)
    assert_near(k, rotate_reference(packed[:, :, 1], tables))
    assert torch.equal(v, packed[:, :, 2])
    (k * 2 + v).sum().backward()
    ones = torch.ones_like(packed[:, :, 1]).requires_grad_()
    (rotate_reference(ones, tables) * 2).sum().backward()
    grads = leaf.grad.view(*leaf.shape[:2], 2, 3, -1)
    assert_near(grads[:, :, 0], ones.grad)
    assert torch.equal(grads[:, :, 1], torch.ones_like(ones))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_clip_with_patches_of_its_own(dtype: torch.dtype, fused: bool) -> None:
    whole = st_rope_tables((3, 3), 2, 8, device=DEVICE)
    kept = torch.tensor([[0, 3, 4, 8], [1, 2, 5, 7]], device=DEVICE)
    tables = whole.select(kept)
    x = torch.randn(2, 1 + 2 * 9, 3, 8, device=DEVICE).to(dtype)
    rotated = rotate_reference(x, whole)

    def drop(y: torch.Tensor, clip: int) -> torch.Tensor:
        patches = y[clip, 1:].unflatten(0, (2, 9))[:, kept[clip]].flatten(0, 1)
        return torch.cat((y[clip, :1], patches))

    dropped, expected = (torch.stack([drop(y, clip) for clip in (0, 1)]) for y in (x, rotated))
    got, _ = rotate(dropped, dropped, *tables.factors(dtype), False, fused)
    assert_near(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_outside_the_tensor_is_touched(dtype: torch.dtype, fused: bool) -> None:
    """NaN guard bands around the tokens, the heads and the channels."""
    tables, packed = inputs(SHAPES[0], dtype)
    factors = tables.factors(dtype)
    batch, tokens, _, heads, dim = packed.shape
    guarded = torch.full((batch + 2, tokens + 2, 5, heads + 2, dim + 4), torch.nan, dtype=dtype)
    guarded = guarded.to(DEVICE)
    inner = guarded[1:-1, 1:-1, 1:-1, 1:-1, 2:-2]
    inner.copy_(packed)
    rotate_packed_(inner, *factors, fused)
    expected = torch.stack([rotate_reference(x, tables) for x in packed.unbind(2)[:2]], dim=2)
    assert_near(inner[:, :, :2], expected)
    assert torch.equal(inner[:, :, 2], packed[:, :, 2])
    inner.fill_(torch.nan)
    assert guarded.isnan().all()


@pytest.mark.filterwarnings("ignore:invalid value")  # 0 * inf, discarded for the CLS
@pytest.mark.parametrize("dtype", DTYPES)
def test_cls_passes_through_bit_for_bit(dtype: torch.dtype, fused: bool) -> None:
    tables, packed = inputs(SHAPES[2], dtype)
    packed[:, 0] = torch.tensor([torch.inf, -torch.inf, 1e-30, -0.0] * 16).to(DEVICE, dtype)
    before = packed[:, 0].clone()
    rotate_packed_(packed, *tables.factors(dtype), fused)
    assert torch.equal(packed[:, 0], before)


def test_the_inverse_undoes_it_and_angles_add() -> None:
    tables, packed = inputs(SHAPES[2], torch.float64)
    q, k, _ = packed.unbind(2)
    there = rotate(q, k, *tables.factors(q.dtype), False, False)
    back = rotate(*there, *tables.factors(q.dtype), True, False)
    torch.testing.assert_close(back, (q, k), rtol=0, atol=1e-14)
    space = st_rope_tables((3, 3), 2, 64, mode="none", device=DEVICE)
    time = StRopeTables(torch.zeros_like(tables.spatial), tables.temporal)
    time.spatial[..., 0] = 1.0
    twice = rotate_reference(rotate_reference(q, space), time)
    torch.testing.assert_close(there[0], twice, rtol=0, atol=1e-14)


def test_any_strides(fused: bool) -> None:
    tables, packed = inputs(SHAPES[0], torch.float32)
    q = packed[:, :, 0].transpose(1, 2).contiguous().transpose(1, 2)  # heads in front
    k = packed[:, :, 1].permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)  # channels in front
    factors = tables.factors(torch.float32)
    for got, x in zip(rotate(q, k, *factors, False, fused), (q, k), strict=True):
        assert_near(got, rotate_reference(x, tables))


@pytest.mark.parametrize("odd", ["clip", "token", "head", "offset", "channels in front"])
def test_pairs_that_are_no_complex_numbers_in_memory(odd: str, fused: bool) -> None:
    """Each stride alone, in place and into new tensors; no projection comes out so."""
    tables, values = inputs(SHAPES[0], torch.float32)
    factors = tables.factors(torch.float32)
    memory = torch.full((8000,), torch.nan, device=DEVICE)
    steps = (4000 + (odd == "clip"), 200 + (odd == "token"), 64, 20 + (odd == "head"), 1)
    packed = memory.as_strided(values.shape, steps, int(odd == "offset"))
    if odd == "channels in front":
        packed = torch.empty(20, *values.shape[:-1], device=DEVICE).permute(1, 2, 3, 4, 0)
    packed.copy_(values)
    q, k, v = values.unbind(2)
    expected = (rotate_reference(q, tables), rotate_reference(k, tables), v)
    new = rotate(packed[:, :, 0], packed[:, :, 1], *factors, False, fused)
    rotate_packed_(packed, *factors, fused)
    for got, want in zip((*new, *packed.unbind(2)), (*expected[:2], *expected), strict=True):
        assert_near(got, want)
    packed.fill_(torch.nan)
    assert memory.isnan().all()  # and nothing beside it


def test_a_projection_that_the_backward_still_needs_is_noticed(fused: bool) -> None:
    tables, packed = inputs(SHAPES[0], torch.float32)
    leaf = packed.flatten(2).clone().requires_grad_()
    projected = leaf * 1
    square = projected * projected  # keeps its factors for the backward
    q, *_ = split_rotated(projected, 3, 3, *tables.factors(torch.float32), fused=fused)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square.sum() + q.sum()).backward()
    with torch.inference_mode():
        split_rotated(leaf * 1, 3, 3, *tables.factors(torch.float32), fused=fused)


def test_no_temporary_of_the_size_of_q(fused: bool) -> None:
    tables, packed = inputs(((4, 4), 16, 2, 64), torch.float32, batch=1)
    factors = tables.factors(torch.float32)
    q, k, _ = packed.unbind(2)
    one = q.numel() * q.element_size()
    assert peak_tensor_bytes(lambda: rotate_packed_(packed, *factors, fused)) < one / 2
    assert peak_tensor_bytes(lambda: rotate(q, k, *factors, False, fused)) < 2.5 * one


def test_what_was_asked_for_turns_forward_and_backward(
    fused: bool, listen: Callable[..., list[str]], request: pytest.FixtureRequest
) -> None:
    """The forms agree, so their results do not tell which one ran."""
    listen(triton_rotation, "rotate_parts", "triton")
    listen(c_rotation, "rotate_parts", "c")
    ran = listen(rotation, "_multiply_into", "complex")
    tables, packed = inputs(SHAPES[0], torch.float32)
    factors = tables.factors(torch.float32)
    leaf = packed.flatten(2).requires_grad_()
    sum(split_rotated(leaf * 1, 3, 3, *factors, fused=fused)).sum().backward()
    q, k, _ = packed.detach().requires_grad_().unbind(2)
    sum(rotate(q, k, *factors, False, fused)).sum().backward()
    form = request.node.callspec.params["fused"]
    if form == "c" and DEVICE == "cuda":
        form = "complex"
    assert ran == [form] * (8 if form == "complex" else 4)  # of which each call turns one part


@pytest.mark.parametrize("dtype", DTYPES)
def test_apply_makes_new_tensors(dtype: torch.dtype) -> None:
    tables, packed = inputs(SHAPES[0], dtype)
    before = packed.clone()
    q, k, _ = packed.unbind(2)
    for got, x in zip(apply_st_rope(q, k, tables), (q, k), strict=True):
        assert_near(got, rotate_reference(x, tables))
    assert torch.equal(packed, before)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_the_reference_computes_in_float32(dtype: torch.dtype) -> None:
    """Whatever the precision that the tables are kept in."""
    tables, packed = inputs(SHAPES[0], dtype)
    rounded = StRopeTables(*tables.factors(torch.float32))
    for x in packed.unbind(2):
        assert torch.equal(rotate_reference(x, tables), rotate_reference(x, rounded))


def test_operators_are_registered_correctly(fused: bool) -> None:
    tables, packed = inputs(SHAPES[0], torch.float32)
    factors = tables.factors(torch.float32)
    q, k, v = packed.unbind(2)
    leaves = (q.clone().requires_grad_(), k.clone().requires_grad_())
    for operator, arguments in (
        (rotate, (*leaves, *factors, False, fused)),
        (rotate_packed_, (packed, *factors, fused)),
        (pack_unrotated, ([q, k, v], *factors, fused)),
    ):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_is_that_of_no_rotation(dtype: torch.dtype) -> None:
    from kernels.attention import st_rope_attention_packed

    tables = st_rope_tables((10, 10), 4, 64, device=DEVICE, dtype=torch.float32)
    packed = torch.randn(1, 401, 3 * 4 * 64, device=DEVICE).to(dtype)

    def peak(used: StRopeTables | None) -> int:
        leaf = packed.clone().requires_grad_()

        def case() -> None:  # frees all that it allocates: the profiler may miss the first event
            torch.autograd.grad(st_rope_attention_packed(leaf * 1, 4, used).sum(), leaf)

        case()
        return peak_tensor_bytes(case)

    assert peak(tables) == peak(None)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_c_gives_the_bits_of_complex_products(dtype: torch.dtype, inverse: bool) -> None:
    """For the head dim of the models, so that a run does not depend on there being a compiler."""
    tables = st_rope_tables((9, 9), 3, 64)
    x = torch.randn(2, 1 + 3 * 81, 4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[:, 1, 0, :4] = torch.tensor([torch.inf, 1.0, torch.nan, 3e38]).to(dtype)
    got, expected = torch.empty_like(x), torch.empty_like(x)
    c_rotation.rotate_parts([x], [got], tables.factors(dtype), inverse, num_turned=1)
    _multiply_into(x, expected, *tables.factors(dtype), inverse)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("compiler", "problem"),
    [("no-such-compiler", "No such file.*no-such-compiler"), ("false", "non-zero exit status 1")],
)
def test_without_a_compiler_it_says_so_and_multiplies(
    compiler: str,
    problem: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(c_library, "load", c_library.load.__wrapped__)
    reason = available_backends("cpu")["sdpa"].reason
    assert re.search(f"complex products, because.*{problem}.*install gcc", reason)
    assert re.search(f"{problem}.*Slower operations", caplog.text)
    tables, packed = inputs(SHAPES[0], torch.float32)
    expected = rotate_reference(packed[:, :, 0], tables)
    rotate_packed_(packed, *tables.factors(torch.float32), False)
    assert_near(packed[:, :, 0], expected)
    assert not list(tmp_path.iterdir()), "the build left something behind"


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc")
def test_what_was_begun_is_finished_and_not_built_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls, compiler, scratch = tmp_path / "calls", tmp_path / "cc", tmp_path / "scratch"
    scratch.mkdir()
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexec gcc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(c_library, "_begun", {})
    c_library.begin()
    c_library.begin()
    for source in ("rotation.c", "gated_norm.c"):
        library, how = c_library.load.__wrapped__(source)
        assert library is not None and how == f"built by {compiler}"
    compiled = [line for line in calls.read_text().splitlines() if " -c " in f" {line} "]
    assert len(compiled) == 2
    assert not list(scratch.iterdir()), "the build left something behind"


def test_what_cannot_begin_is_told_when_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(c_library, "_begun", {})
    monkeypatch.setenv("CC", "no-such-compiler")
    c_library.begin()
    assert not caplog.text
    assert c_library.load.__wrapped__("rotation.c")[0] is None
    assert "no-such-compiler" in caplog.text
    assert not list(tmp_path.iterdir())
