"""Fake CUDA tensors in a CPU build of PyTorch: `load()` before `import torch`, then `pretend()`.

Nothing here computes a number. What runs is all that decides what a GPU would be asked to do: the
Python of a step, autograd, autocast, the choice of kernels; shapes, types and devices are true.
"""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CAPABILITY = (9, 0)  # of the H100 that is pretended


def load() -> None:
    """Build and load `fake_cuda.cpp`, before torch is imported: it looks for CUDA only once."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "fake_cuda.so")
        includes = [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
        links = [f"-L{root}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{root}/lib"]
        source = Path(__file__).with_suffix(".cpp")
        command = ["g++", "-std=c++20", "-fPIC", "-shared", *includes, source, "-o", library]
        subprocess.run([*map(str, command), *links], check=True)
        ctypes.CDLL(str(library))


def pretend() -> None:
    """Let torch's Python believe in one H100; for the rest of the process."""
    import torch
    import torch.nn.functional as F

    assert torch._C._get_accelerator().type == "cuda", "load() came after the import of torch"
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") copies visibly
    cuda: Any = torch.cuda
    torch.version.cuda = "13.0"
    properties = SimpleNamespace(
        name="NVIDIA H100",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=132,
        total_memory=80 * 2**30,
    )
    for name, value in {
        "is_available": True,
        "_is_compiled": True,
        "device_count": 1,
        "current_device": 0,
        "is_bf16_supported": True,
        "get_device_capability": CAPABILITY,
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "max_memory_reserved": 0,
        "_lazy_init": None,
        "set_device": None,
        "empty_cache": None,
        "manual_seed": None,
        "manual_seed_all": None,
        "get_rng_state_all": [],
        "set_rng_state_all": None,
        "reset_peak_memory_stats": None,
    }.items():
        setattr(cuda, name, lambda *args, _value=value, **kwargs: _value)
    stream = SimpleNamespace(wait_stream=lambda other: None)
    cuda.Stream = cuda.current_stream = lambda *args, **kwargs: stream
    cuda.stream = nullcontext
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]
    cuda.amp.common.amp_definitely_not_available = lambda: False
    # Random initial values do not exist here, and its fake wants to compare them.
    torch.nn.init.trunc_normal_ = lambda tensor, *args, **kwargs: tensor
    F.scaled_dot_product_attention = _flash_attention


def _flash_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, is_causal: bool = False
) -> Any:
    """What `scaled_dot_product_attention` picks on CUDA in 16 bits; the CPU build has no picker."""
    import torch

    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = (x.to(dtype) for x in (query, key, value))
    aten = torch.ops.aten
    if attn_mask is None and query.element_size() == 2:
        return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]
    bias = None
    if attn_mask is not None:
        bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    grad = any(x.requires_grad for x in (query, key, value))
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, grad, 0.0, is_causal
    )[0]
