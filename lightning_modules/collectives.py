"""The collectives whose names PyTorch changed, and where a process group takes its tensors from.

`all_gather_into_tensor` and `reduce_scatter_tensor` are what torch 2.9 to 2.12 have;
`all_gather_single` and `reduce_scatter_single` begin with 2.13, where the old names warn.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

_new = hasattr(dist, "all_gather_single")
all_gather: Any = dist.all_gather_single if _new else dist.all_gather_into_tensor
reduce_scatter: Any = dist.reduce_scatter_single if _new else dist.reduce_scatter_tensor


def on_group_device(tensor: Tensor) -> Tensor:
    """The tensor where the default group's collectives take it: NCCL's take it on the GPU only.

    What is offloaded to the host's memory has to go there and back.
    """
    return tensor if tensor.is_cuda or "gloo" in str(dist.get_backend_config()) else tensor.cuda()


def world_size() -> int:
    """Number of ranks of the default process group; 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
