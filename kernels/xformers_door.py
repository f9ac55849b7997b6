"""xformers' memory-efficient attention: whether it can run, which operator it picks, the call.

xformers ships no dense attention kernel for current PyTorch: it dispatches to FlashAttention 3 or
2 where those packages are installed, to PyTorch's flash operator, or to PyTorch's CUTLASS one. All
of them are refused where its own extension does not load, which its metadata tell beforehand. So it
is imported only for CUDA tensors, where it was asked for and can run: an import takes 2 s.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import warnings
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@lru_cache(maxsize=1)
def _ops() -> ModuleType:
    logger = logging.getLogger("xformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("xformers.ops")
    finally:
        logger.setLevel(level)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """(B, S, H, D) each -> (B, S, H, D)."""
    bias = _ops().LowerTriangularMask() if causal else None
    return _ops().memory_efficient_attention(q, k, v, attn_bias=bias)


def status(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[bool, str]:
    """Say whether xformers can run, forward and backward, and with which operators."""
    if device.type != "cuda":
        return False, f"xformers attention runs on CUDA only, not on {device.type}"
    if dtype not in _DTYPES:
        return False, f"xformers attention takes float32, float16 and bfloat16, not {dtype}"
    if (problem := load_problem()) is not None:
        return False, problem
    try:
        operators = _dispatch(device, dtype, head_dim)
    except ImportError as error:
        return False, f"xformers cannot be imported: {error}"
    except NotImplementedError as error:
        return False, f"xformers has no operator for it: {_reasons(error)}"
    return True, f"xformers {metadata.version('xformers')}: {' and '.join(operators)}"


def load_problem() -> str | None:
    """Say why xformers' extension cannot load beside this PyTorch, without importing it.

    Its wheels link one major version of CUDA's runtime, and use what PyTorch has had since the
    version that they were built with (its stable interface).
    """
    spec = importlib.util.find_spec("xformers")
    if spec is None or spec.origin is None:
        return "xformers is not installed"
    version = metadata.version("xformers")
    build = Path(spec.origin).with_name("cpp_lib.json")
    if not build.exists():
        return f"xformers {version} was built without its CUDA extension"
    built_with = json.loads(build.read_text())["version"]
    cuda = (built_with["cuda"] or 0) // 100
    if torch.version.cuda is None or int(torch.version.cuda.split(".")[0]) != cuda:
        return (
            f"xformers {version} is built for CUDA {cuda}, and torch {torch.__version__} brings "
            f"{torch.version.cuda or 'none'}: docs/kernels.md has a combination that works"
        )
    needed = TorchVersion(built_with["torch"].split("+")[0])
    if torch.__version__ < needed:
        return f"xformers {version} needs torch {needed} or newer, not {torch.__version__}"
    return None


def _reasons(error: NotImplementedError) -> str:
    """The first reason of each operator out of the dispatcher's page of text."""
    lines = [line.strip() for line in str(error).splitlines()]
    refusals = [i for i, line in enumerate(lines) if line.endswith("is not supported because:")]
    return "; ".join(f"{lines[i].split('`')[1]}: {lines[i + 1]}" for i in refusals)


def _dispatch(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """Names of the forward and the backward operator that xformers picks for such inputs.

    Its own dispatcher knows the device's capability, the types, the installed packages and
    PyTorch's deterministic mode.
    """
    fmha = _ops().fmha
    shape = (1, 32, 1, head_dim)
    q, k, v = (torch.empty(shape, device=device, dtype=dtype) for _ in range(3))
    inputs = fmha.Inputs(query=q, key=k, value=v)
    forward = fmha.dispatch._dispatch_fw(inputs, True)
    backward = fmha.dispatch._dispatch_bw(inputs, False)
    return forward.NAME, backward.NAME
