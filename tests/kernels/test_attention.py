"""Every backend behind the one door against the equations, and what the door says of itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from python_process import run_python
from torch.utils.checkpoint import checkpoint

from kernels import xformers_door
from kernels.attention import (
    BACKENDS,
    BackendStatus,
    available_backends,
    resolve_backend,
    st_rope_attention,
    st_rope_attention_packed,
    st_rope_attention_pooled,
)
from kernels.st_rope import StRopeTables, st_rope_tables

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HEADS, DIM = 3, 20
# softmax of float32 scores in another order; bf16 and fp16 round the result and the probabilities
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
CASES = [
    (name, dtype)
    for name in BACKENDS
    for dtype in TOLERANCE
    if available_backends(DEVICE, dtype, DIM)[name].available
]


def inputs(dtype: torch.dtype, frames: int = 3) -> tuple[StRopeTables, torch.Tensor]:
    tables = st_rope_tables((2, 3), frames, DIM, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 1 + 6 * frames, 3 * HEADS * DIM, generator=generator)
    return tables, packed.to(DEVICE, dtype)


def exact(packed: torch.Tensor, tables: StRopeTables | None, causal: bool = False) -> torch.Tensor:
    """Eq. 8-10 and softmax attention in float64, from the angles, one head at a time."""
    q, k, v = packed.double().unflatten(-1, (3, HEADS, DIM)).unbind(2)
    if tables is not None:
        space, time = (torch.view_as_complex(table.double()) for table in tables)
        turn = (time[:, None] * space[None]).flatten(0, 1)
        turn = torch.cat((torch.ones_like(turn[:1]), turn))[:, None]  # CLS: by no angle

        def rotate(x: torch.Tensor) -> torch.Tensor:
            return torch.view_as_real(torch.complex(x[..., 0::2], x[..., 1::2]) * turn).flatten(-2)

        q, k = rotate(q), rotate(k)
    heads = []
    for h in range(HEADS):
        scores = q[:, :, h] @ k[:, :, h].transpose(1, 2) * DIM**-0.5
        if causal:
            tokens = torch.arange(scores.shape[-1], device=scores.device)
            scores = scores.masked_fill(tokens[None, :] > tokens[:, None], -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, :, h])
    return torch.stack(heads, dim=2)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_values_and_gradients(
    backend: str, dtype: torch.dtype, rotated: bool, causal: bool
) -> None:
    tables, packed = inputs(dtype)
    used = tables if rotated else None
    weights = torch.randn(2, 19, HEADS, DIM, generator=torch.Generator().manual_seed(1))
    weights = weights.to(DEVICE, dtype)
    slow = packed.double().clone().requires_grad_()
    expected = exact(slow, used, causal)
    expected.backward(weights.double())
    assert slow.grad is not None

    whole = packed.clone().requires_grad_()
    separate = packed.clone().requires_grad_()
    q, k, v = separate.unflatten(-1, (3, HEADS, DIM)).unbind(2)
    options = {"backend": backend, "causal": causal}
    for leaf, out in (
        (whole, st_rope_attention_packed(whole * 1, HEADS, used, **options)),
        (separate, st_rope_attention(q, k, v, used, **options)),
    ):
        assert out.dtype == dtype and out.shape == (2, 19, HEADS, DIM)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[dtype])
        out.backward(weights)
        # gradients are sums of some twenty terms of that error
        torch.testing.assert_close(leaf.grad.double(), slow.grad, rtol=0, atol=4 * TOLERANCE[dtype])
    torch.testing.assert_close(separate, packed, rtol=0, atol=0)  # inputs are left untouched


@pytest.mark.parametrize(
    ("backend", "dtype"), [case for case in CASES if case[1] in (torch.float32, torch.float64)]
)
@pytest.mark.parametrize("kind", ["cls, rotated", "cls", "any token, causal"])
def test_one_query_is_a_row_of_the_whole(backend: str, dtype: torch.dtype, kind: str) -> None:
    tables, packed = inputs(dtype)
    causal, used = "causal" in kind, tables if "rotated" in kind else None
    index = torch.tensor([7, 18] if causal else [0, 0], device=DEVICE)
    rows = torch.arange(2, device=DEVICE)
    whole = packed.double().clone().requires_grad_()
    expected = exact(whole, used, causal)[rows, index].unsqueeze(1)
    leaf = packed.clone().requires_grad_()
    q = leaf[rows, index, : HEADS * DIM].view(2, 1, HEADS, DIM)
    projected = leaf[:, :, HEADS * DIM :] * 1
    options = {"backend": backend} | ({"causal": True} if causal else {})
    out = st_rope_attention_pooled(q, projected, index, used, **options)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(leaf.grad.double(), whole.grad, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_reference_rounds_nothing_but_its_result(dtype: torch.dtype) -> None:
    tables, packed = inputs(dtype)
    results = []
    for numbers in (packed, packed.float()):
        q, k, v = numbers.unflatten(-1, (3, HEADS, DIM)).unbind(2)
        results.append(
            (
                st_rope_attention(q, k, v, tables, backend="reference"),
                st_rope_attention_packed(numbers, HEADS, tables, backend="reference"),
            )
        )
    for rounded, precise in zip(*results, strict=True):
        assert torch.equal(rounded, precise.to(dtype))


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_the_default_device_has_no_say(backend: str) -> None:
    tables, packed = inputs(torch.float32)
    index = torch.tensor([7, 18], device=DEVICE)
    expected = exact(packed, tables, causal=True)
    q, k, v = packed.unflatten(-1, (3, HEADS, DIM)).unbind(2)
    one, two = q[:, 7:8], packed[:, :, HEADS * DIM :]
    with torch.device("meta"):
        out = st_rope_attention(q, k, v, tables, backend=backend, causal=True)
        pooled = st_rope_attention_pooled(one, two, index, None, backend=backend, causal=True)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
    assert pooled.device == packed.device


def test_each_clip_with_patches_of_its_own() -> None:
    tables, packed = inputs(torch.float64)
    kept = torch.tensor([[0, 2, 5], [1, 3, 4]], device=DEVICE)
    rows = torch.stack(
        [torch.cat([torch.zeros(1).long()] + [1 + 6 * t + k.cpu() for t in range(3)]) for k in kept]
    ).to(DEVICE)
    dropped = packed.gather(1, rows[:, :, None].expand(-1, -1, packed.shape[-1]))
    got = st_rope_attention_packed(dropped.clone(), HEADS, tables.select(kept))
    for clip in range(2):
        own = StRopeTables(tables.spatial[kept[clip]], tables.temporal)
        expected = exact(dropped[clip : clip + 1], own)
        torch.testing.assert_close(got[clip : clip + 1], expected, rtol=0, atol=1e-13)


def test_checkpointing_recomputes_the_same() -> None:
    tables, packed = inputs(torch.float64)
    gradients = []
    for recompute in (False, True):
        leaf = packed.clone().requires_grad_()

        def attend(x: torch.Tensor) -> torch.Tensor:
            return st_rope_attention_packed(x * 1, HEADS, tables)

        out = checkpoint(attend, leaf, use_reentrant=False) if recompute else attend(leaf)
        out.square().sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_autocast() -> None:
    """The projection comes out in bf16; the angles stay float32."""
    tables, packed = inputs(torch.float32)
    weight = torch.eye(packed.shape[-1], device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = st_rope_attention_packed(packed @ weight, HEADS, tables)
    assert out.dtype == torch.bfloat16
    expected = exact(packed, tables)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=TOLERANCE[torch.bfloat16])
    out.float().sum().backward()
    assert weight.grad is not None and weight.grad.isfinite().all()


def test_torch_compile_sees_one_graph() -> None:
    tables, packed = inputs(torch.float32)

    def attend(x: torch.Tensor) -> torch.Tensor:
        return st_rope_attention_packed(x * 1, HEADS, tables)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attend, compiled):
        leaf = packed.clone().requires_grad_()
        out = function(leaf)
        out.square().sum().backward()
        results.append((out, leaf.grad))
    torch.testing.assert_close(*results)


def test_the_door_on_this_machine() -> None:
    assert available_backends("cpu")["xformers"] == BackendStatus(
        False, "xformers attention runs on CUDA only, not on cpu"
    )
    assert resolve_backend("auto", "cpu", torch.float32) == "sdpa"


def test_a_named_backend_that_cannot_run_is_an_error() -> None:
    q = torch.randn(1, 2, 1, 4)
    with pytest.raises(ValueError, match=r"'xformers' cannot run on cpu.*CUDA only.*'auto'"):
        st_rope_attention(q, q, q, None, backend="xformers")
    with pytest.raises(ValueError, match="'flash'; one of: auto, reference"):
        st_rope_attention(q, q, q, None, backend="flash")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rotated", [False, True])
def test_what_xformers_is_given(
    rotated: bool, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place is taken by torch's attention, of which it has the layout (B, S, H, D)."""

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        turned = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(*turned, is_causal=causal).transpose(1, 2) + 1

    monkeypatch.setattr(xformers_door, "status", lambda *given: (given[-1] == DIM, "as if"))
    monkeypatch.setattr(xformers_door, "attention", attention)
    tables, packed = inputs(torch.float32)
    used, options = tables if rotated else None, {"backend": "xformers", "causal": causal}
    expected = exact(packed, used, causal) + 1
    q, k, v = packed.unflatten(-1, (3, HEADS, DIM)).unbind(2)
    for out in (
        st_rope_attention(q, k, v, used, **options),
        st_rope_attention_packed(packed.clone(), HEADS, used, **options),
    ):
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)


def test_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    from kernels.attention import _resolve

    _resolve.cache_clear()
    with caplog.at_level("INFO", logger="kernels.attention"):
        for _ in range(3):
            resolve_backend("auto", "cpu", torch.float32)
    assert [r.message for r in caplog.records] == [
        f"attention on cpu, torch.float32: sdpa (auto): {available_backends('cpu')['sdpa'].reason}"
    ]


def test_xformers_is_not_even_imported_on_cpu() -> None:
    out = run_python(
        """
        import sys, torch
        from kernels.attention import available_backends, st_rope_attention
        q = torch.randn(1, 2, 1, 4)
        st_rope_attention(q, q, q, None)
        assert not available_backends("cpu")["triton"].available  # no interpreter asked for
        assert not any(name.split(".")[0] in ("xformers", "triton") for name in sys.modules)
        """
    )
    assert out == ""
