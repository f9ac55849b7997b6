"""FlashAttention 3 and 4 behind torch's own attention, where their packages are installed.

PyTorch brings FlashAttention 2. Its registry (`torch.nn.attention.activate_flash_attention_impl`)
puts a newer one behind `scaled_dot_product_attention` for the whole process. torch 2.10 has the
registry but no way back from an implementation that fails, so there it is left alone.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache
from pathlib import Path

import torch
from torch.nn import attention

from kernels.trial import flash_problem

_log = logging.getLogger(__name__)

# name in torch's registry -> what it imports, and the major compute capabilities it is for
_PACKAGES = {"FA3": ("flash_attn_interface", (9,)), "FA4": ("flash_attn.cute.interface", (9, 10))}


def installed() -> list[str]:
    """Return the implementations that torch knows and whose package is here, without importing."""
    if not hasattr(attention, "restore_flash_attention_impl"):
        return []
    names = attention.list_flash_attention_impls()
    return [name for name, (module, _) in _PACKAGES.items() if name in names and _exists(module)]


def _exists(module: str) -> bool:
    package, *inner = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not inner:
        return spec is not None
    file = Path(*inner).with_suffix(".py")  # find_spec of an inner module would import its package
    return any(Path(folder, file).exists() for folder in spec.submodule_search_locations or [])


def choice(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the implementation that is for such a GPU and type, or None for torch's own."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return None
    if not (names := installed()):
        return None
    major = torch.cuda.get_device_capability(device)[0]
    return next((name for name in names if major in _PACKAGES[name][1]), None)


@lru_cache
def activate(device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Put the best implementation behind torch's attention, once it has proved itself here.

    Returns:
        What stands behind torch's attention now: "FA3", "FA4", or "torch's own".
    """
    name = choice(device, dtype)
    if name is None:
        return "torch's own"
    if attention.current_flash_attention_impl() == name:
        return name
    try:
        attention.activate_flash_attention_impl(name)
        problem = flash_problem(device, dtype, head_dim)
    except Exception as error:  # whatever a package built for something else raises
        problem = f"{type(error).__name__}: {error}"
    if problem is None:
        return name
    attention.restore_flash_attention_impl(_raise_warn=False)
    _log.warning("%s is installed and cannot be used: %s. torch's own runs instead.", name, problem)
    return "torch's own"
