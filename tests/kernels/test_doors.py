"""Which kernels the doors choose, on devices that need not be here: no numerics."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from kernels import c_rotation, flash, trial, xformers_door
from kernels.attention import (
    BACKENDS,
    available_backends,
    resolve_backend,
    st_rope_attention,
    st_rope_attention_packed,
    st_rope_attention_pooled,
)
from kernels.gated_norm import gated_norm
from kernels.st_rope import StRopeTables, apply_st_rope

HEADS, DIM = 3, 20
SDPA = f"torch {torch.__version__} scaled_dot_product_attention"


def status(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[bool, str]:
    """xformers' on a machine that has it: for some types and sizes, and in one mode, as there."""
    usable = dtype in (torch.float32, torch.bfloat16) and head_dim in (DIM, 64)
    return usable and not torch.are_deterministic_algorithms_enabled(), f"{device} {head_dim}"


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "runs", "expected"),
    [
        (
            "cpu",
            torch.float32,
            64,
            True,
            {
                "reference": "the equations in plain PyTorch, float32, every device",
                "sdpa": f"{SDPA}; C for torch.float32",
                "xformers": "cpu 64",
                "triton": "fused Triton kernels in Triton's interpreter (TRITON_INTERPRET=1): "
                f"for tests; {SDPA}",
            },
        ),
        (
            "cuda:1",
            torch.bfloat16,
            20,
            True,
            {
                "reference": "the equations in plain PyTorch, float32, every device",
                "sdpa": f"{SDPA} by FA3; rotation by complex products",
                "xformers": "cuda:1 20",
                "triton": f"fused Triton kernels; {SDPA} by FA3",
            },
        ),
        (
            "cuda",
            torch.float64,
            64,
            False,
            {
                "reference": "the equations in plain PyTorch, float32, every device",
                "sdpa": f"{SDPA}; rotation by complex products",
                "xformers": "not: cuda 64",
                "triton": "not: broken",
            },
        ),
    ],
)
def test_door_says_what_can_run_and_why(
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    runs: bool,
    expected: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial, "triton_problem", lambda kind: None if runs else "broken")
    monkeypatch.setattr(xformers_door, "status", status)
    monkeypatch.setattr(c_rotation, "reason", lambda dtype: f"C for {dtype}")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(flash, "installed", lambda: ["FA3"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    found = available_backends(device, dtype, head_dim)
    told = {n: s.reason if s.available else f"not: {s.reason}" for n, s in found.items()}
    assert told == expected and tuple(told) == BACKENDS
    if device in ("cpu", "cuda"):  # the one that is there
        assert available_backends(None, dtype) == found
    if dtype == torch.float32:
        assert available_backends() == found


def test_a_choice_is_made_anew_for_what_it_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xformers_door, "status", status)
    sizes = {"device": "cuda", "dtype": torch.bfloat16}
    assert resolve_backend("xformers", **sizes) == "xformers"
    for other in ({"head_dim": 512}, {"dtype": torch.float64}):
        with pytest.raises(ValueError, match="'xformers' cannot run"):
            resolve_backend("xformers", **(sizes | other))
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(ValueError, match="'xformers' cannot run"):
            resolve_backend("xformers", **sizes)
    finally:
        torch.use_deterministic_algorithms(False)


class Asked(TorchDispatchMode):
    """Notes what our operators are asked for: `fused` is their last argument."""

    def __init__(self) -> None:
        super().__init__()
        self.fused: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function.namespace == "eva02_at":
            self.fused.append(args[-1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("device", "runs", "backend", "rotation", "norm"),
    [
        ("cuda", True, "auto", True, True),
        ("cuda", True, "triton", True, True),
        ("cuda", True, "xformers", True, True),
        ("cuda", True, "sdpa", False, False),
        ("cuda", False, "auto", False, False),
        ("cuda", False, "xformers", False, False),
        ("cuda", False, "sdpa", False, False),
        ("cpu", True, "auto", False, False),
        ("cpu", True, "triton", True, True),  # the interpreter, which nobody gets by default
        ("cpu", True, "xformers", True, False),
        ("cpu", True, "sdpa", False, False),
        ("cpu", True, "reference", None, False),  # turns by the equation, without an operator
    ],
)
def test_who_gets_the_fused_kernels(
    device: str,
    runs: bool,
    backend: str,
    rotation: bool | None,
    norm: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fake tensors have a device and no memory, so a GPU need not be here to be asked."""
    given: list[bool] = []

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        given.append(causal)
        return torch.empty_like(q)

    monkeypatch.setattr(trial, "triton_problem", lambda kind: None if runs else "broken")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(xformers_door, "status", status)
    monkeypatch.setattr(xformers_door, "attention", attention)
    with FakeTensorMode(), Asked() as asked:
        options = {"device": device, "dtype": torch.bfloat16}
        tables = StRopeTables(*(torch.empty(n, 10, 2, device=device) for n in (6, 3)))
        q, k, v = (torch.empty(2, 19, HEADS, DIM, **options) for _ in range(3))
        one = torch.empty(2, 1, HEADS, DIM, **options)
        three, two = (torch.empty(2, 19, n * HEADS * DIM, **options) for n in (3, 2))
        index = torch.zeros(2, dtype=torch.int64, device=device)
        named = {} if backend == "auto" else {"backend": backend}
        st_rope_attention(q, k, v, tables, **named)
        st_rope_attention_packed(three, HEADS, tables, **named)
        st_rope_attention_pooled(one, two, index, tables, **named)
        assert asked.fused == [rotation] * (0 if rotation is None else 3)
        asked.fused.clear()
        for dtype in (torch.float64, torch.bfloat16):
            hidden, weight, bias = (torch.empty(n, dtype=dtype, device=device) for n in (12, 6, 6))
            gated_norm(hidden, weight, bias, 1e-6, **named)
        assert asked.fused == [False, norm]
        asked.fused.clear()
        apply_st_rope(q, k, tables)
        gated_norm(hidden, weight, bias, 1e-6)
        assert asked.fused == [device == "cuda" and runs] * 2
    assert given == [False] * 2 * (backend == "xformers")  # one query is not xformers'
