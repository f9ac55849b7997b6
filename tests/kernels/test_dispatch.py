"""Which kernels a GPU gets and why, for GPUs that are not here: no numerics, only the choice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from python_process import run_python
from torch.nn import attention

from kernels import flash, operators, trial, triton_rotation, xformers_door
from kernels.attention import _resolve, resolve_backend

CUDA = torch.device("cuda")
ROOT = Path(__file__).parents[2]
registry = pytest.mark.skipif(
    not hasattr(attention, "restore_flash_attention_impl"), reason="this torch has no way back"
)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    caches = (trial.triton_problem, flash.activate, _resolve)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


@pytest.mark.parametrize(
    ("torch_version", "cuda", "problem"),
    [
        ("2.10.0+cu128", "12.8", None),
        ("2.13.0+cu126", "12.6", None),
        ("2.13.0", "13.0", "is built for CUDA 12, and torch 2.13.0 brings 13.0"),
        ("2.13.0+cpu", None, "brings none"),
        ("2.9.1", "12.8", "needs torch 2.10.0 or newer, not 2.9.1"),
    ],
)
def test_xformers_says_whether_it_can_load_without_being_imported(
    torch_version: str, cuda: str | None, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion(torch_version))
    found = xformers_door.load_problem()
    assert found is None if problem is None else problem in (found or "")


def test_auto_never_imports_xformers_nor_one_that_cannot_load() -> None:
    out = run_python(
        """
        import sys, torch
        from kernels.attention import available_backends, resolve_backend
        torch.version.cuda = "13.0"
        print(resolve_backend("auto", "cuda", torch.bfloat16))
        print(available_backends("cuda", torch.bfloat16)["xformers"].reason)
        assert "xformers" not in sys.modules
        """
    )
    assert out.startswith("triton\n") and "brings 13.0" in out


def test_xformers_dispatch_without_a_gpu() -> None:
    """xformers' own dispatcher on fake CUDA tensors of every architecture from sm_70 to sm_120."""
    out = run_python(
        """
        from unittest.mock import patch
        import torch
        from torch._subclasses import FakeTensorMode
        torch.backends.cuda.is_flash_attention_available = lambda: True
        torch.version.cuda = "12.8"
        from kernels import xformers_door as door
        door._ops().fmha.common._built_with_cuda = True
        bf16, cuda = torch.bfloat16, torch.device("cuda")
        def status(capability, dtype):
            with FakeTensorMode(), patch("torch.cuda.get_device_capability", lambda *_: capability):
                usable, reason = door.status(cuda, dtype, 64)
            print("%d%d" % capability, str(dtype)[6:], usable, reason)
        for capability in ((7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)):
            for dtype in (bf16, torch.float32):
                status(capability, dtype)
        status((9, 0), torch.float64)
        torch.use_deterministic_algorithms(True)
        status((9, 0), bf16)
        status((10, 0), bf16)
        """
    )
    lines = out.splitlines()
    flash_pair, cutlass = (
        r"True xformers \S+: fa2F\S+ and fa2B\S+$",
        r".*cutlassF-pt and cutlassB-pt$",
    )
    old = r"False xformers has no operator .*requires device with capability"
    expected = [f"{sm} bfloat16 {flash_pair}" for sm in (80, 86, 89, 90, 100, 120)]
    expected += [f"{sm} bfloat16 {old}" for sm in (70, 75)]
    expected += [f"{sm} float32 True{cutlass}" for sm in (70, 75, 80, 86, 89, 90)]
    expected += ["90 float64 False .*not torch.float64"]
    expected += [r"90 bfloat16 True xformers \S+: fa2F\S+ and cutlassB-pt$"]
    expected += [r"100 bfloat16 False .*fa2B\S+: operator is non-deterministic"]
    for pattern in expected:
        assert any(re.match(pattern, line) for line in lines), f"no {pattern!r} in\n{out}"


def test_triton_that_cannot_run_leaves_sdpa_and_says_why() -> None:
    """CUDA is pretended, so that the trial really fails, in the driver."""
    out = run_python(
        """
        import logging, torch
        logging.basicConfig(format="%(levelname)s %(message)s")
        torch.cuda.is_available = lambda: True
        from kernels.attention import resolve_backend, st_rope_attention
        print(resolve_backend("auto", "cuda", torch.bfloat16))
        try:
            resolve_backend("triton", "cuda", torch.bfloat16)
        except ValueError as error:
            print(error)
        """
    )
    chosen, refused, warning = out.splitlines()
    assert chosen == "sdpa"
    assert re.search(
        r"'triton' cannot run .*Triton cannot run a kernel here: .*Use backend", refused
    )
    assert warning.startswith("WARNING no fused kernels on cuda: Triton cannot run a kernel here: ")


def test_a_wrong_kernel_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trial.triton_problem("cpu") is None  # in the interpreter
    trial.triton_problem.cache_clear()
    rotate = triton_rotation.rotate_parts
    monkeypatch.setattr(
        triton_rotation,
        "rotate_parts",
        lambda q, out, factors, sign: rotate(q, out, factors, -sign),
    )
    assert "wrong here" in (trial.triton_problem("cpu") or "")


def test_no_device_to_try_on_is_no_failure() -> None:
    """Fake CUDA tensors go the way that a GPU's would."""
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert operators.fused_status("cuda") == (True, "fused Triton kernels")


@pytest.mark.parametrize(
    ("major", "here", "expected"),
    [
        (8, ["FA3", "FA4"], None),
        (9, ["FA3", "FA4"], "FA3"),
        (9, ["FA4"], "FA4"),
        (10, ["FA3", "FA4"], "FA4"),
        (12, ["FA3", "FA4"], None),
        (9, [], None),
    ],
)
def test_the_newest_flash_attention_that_a_gpu_takes(
    major: int, here: list[str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "installed", lambda: here)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    assert flash.choice(CUDA, torch.bfloat16) == expected
    assert flash.choice(CUDA, torch.float32) is None
    assert flash.choice(torch.device("cpu"), torch.bfloat16) is None


@registry
def test_packages_are_found_without_importing_them(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert flash.installed() == []
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text("raise RuntimeError")
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise RuntimeError")
    monkeypatch.syspath_prepend(tmp_path)
    assert flash.installed() == ["FA4"]
    (tmp_path / "flash_attn_interface.py").write_text("raise RuntimeError")
    assert flash.installed() == ["FA3", "FA4"]


class _Handle:
    removed = 0

    def remove(self) -> None:
        _Handle.removed += 1


@registry
@pytest.mark.parametrize("holds", [True, False])
def test_a_newer_flash_attention_proves_itself_or_is_taken_back(
    holds: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch's real registry, an implementation of ours in it; the trial runs on the CPU."""
    known = dict(attention._registry._FLASH_ATTENTION_IMPLS)
    _Handle.removed = 0
    try:
        attention.register_flash_attention_impl("FA3", register_fn=_Handle)
        monkeypatch.setattr(flash, "choice", lambda *_: "FA3")
        if not holds:
            monkeypatch.setattr(trial, "TOLERANCE", 0.0)
        expected = "FA3" if holds else "torch's own"
        assert flash.activate(torch.device("cpu"), torch.bfloat16, 64) == expected
        assert attention.current_flash_attention_impl() == ("FA3" if holds else None)
        assert _Handle.removed == (not holds)
        refused = "FA3 is installed and cannot be used: it is off by" in caplog.text
        assert refused == (not holds)
    finally:
        attention.restore_flash_attention_impl(_raise_warn=False)
        attention._registry._FLASH_ATTENTION_IMPLS.update(known)


@registry
def test_an_implementation_that_does_not_load_is_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch's own FA3 entry, without its package: the real failure."""
    monkeypatch.setattr(flash, "choice", lambda *_: "FA3")
    assert flash.activate(torch.device("cpu"), torch.bfloat16, 64) == "torch's own"
    assert "No module named 'flash_attn_interface'" in caplog.text
    assert resolve_backend("auto", "cpu", torch.bfloat16) == "sdpa"


def test_the_lock_for_xformers_differs_in_torch_and_what_it_brings() -> None:
    """What only one of them has is no difference: `make lock` writes both anew."""
    ours, theirs = (
        dict(line.split("==") for line in (ROOT / name).read_text().splitlines() if "==" in line)
        for name in ("requirements.lock", "requirements-xformers.lock")
    )
    assert {k for k in ours.keys() & theirs.keys() if ours[k] != theirs[k]} == {"torch", "triton"}
    assert theirs["torch"] == "2.10.0"
