"""Counts what a step asks of a GPU and its network, operator by operator."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).parents[2]
_aten = torch.ops.aten
_SIZED_BY_VALUES = {  # the host waits for the device to learn how large the result is
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_consecutive.default,
    _aten.unique_dim.default,
    _aten.bincount.default,
    _aten.repeat_interleave.Tensor,
    _aten.equal.default,
    _aten.is_nonzero.default,
}


_BAD_NEWS = {_aten.any.default, _aten.any.dim, _aten.bitwise_not.default}  # "is anything wrong?"


@dataclass
class Collective:
    """One call on the network: `sent` bytes go into it on each rank."""

    name: str
    dtype: str
    sent: int
    phase: str


# What `torch.use_deterministic_algorithms(True)` refuses on CUDA, of what such a model might use.
_NOT_REPEATABLE = {
    "aten::bincount",  # with weights
    "aten::cumsum",  # of floats
    "aten::histc",
    "aten::kthvalue",
    "aten::put_",
    "aten::upsample_linear1d_backward",
    "aten::upsample_bilinear2d_backward",
    "aten::upsample_bicubic2d_backward",
}


@dataclass
class Counts:
    """What was seen.

    Attributes:
        waits: Where the host waits for the device: "file:line operator" -> times.
        collectives: In their order.
        casts: "shape from to" -> times.
        made: "phase shape type" -> times, of floating point results on the device.
        not_repeatable: "file:line operator" -> times, of what deterministic mode refuses.
    """

    waits: Counter[str] = field(default_factory=Counter)
    collectives: list[Collective] = field(default_factory=list)
    casts: Counter[str] = field(default_factory=Counter)
    made: Counter[str] = field(default_factory=Counter)
    not_repeatable: Counter[str] = field(default_factory=Counter)


class Counting(TorchDispatchMode):
    """Counts, and stands in for what fake tensors cannot do: their values, and the network.

    Args:
        answer: What an integer read from the device is taken to be.
    """

    def __init__(self, answer: int = 1) -> None:
        super().__init__()
        self.counts = Counts()
        self.answer = answer
        self.phase = "forward"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args)
        on_device = _has_cuda(tree_iter((args, kwargs)))
        if func is _aten._local_scalar_dense.default:
            if on_device:
                self._wait(func)
            elif args[0].constant is not None:  # a number of the host's own
                return args[0].constant.item()
            return self._value(args[0])
        if func in _SIZED_BY_VALUES:
            if on_device:
                self._wait(func)
            return self._stand_in(func, args)
        if func is _aten.index.Tensor and _masks(args[1]):
            if on_device:
                self._wait(func)
            indices = [
                None if i is None else self._stand_in(_aten.nonzero.default, (i,)).unbind(1)
                for i in args[1]
            ]
            args = (args[0], [one for i in indices for one in ([None] if i is None else i)])
        if func is _aten._to_copy.default and str(kwargs.get("device", "")).startswith("cuda"):
            args[0].constant = None  # its value cannot follow it to a device that is not there
        out = func(*args, **kwargs)
        self._note(func, args, kwargs, out)
        return out

    def _wait(self, func: Any) -> None:
        self.counts.waits[f"{_place()} {func.name().removeprefix('aten::')}"] += 1

    def _value(self, tensor: Tensor) -> Any:
        if tensor.dtype == torch.bool:  # a check for what should not be, or that all is well
            return getattr(tensor, "made_by", None) not in _BAD_NEWS
        return 1.0 if tensor.is_floating_point() else self.answer

    def _stand_in(self, func: Any, args: tuple) -> Any:
        """A result of a plausible size."""
        x = args[0]
        if func is _aten.nonzero.default:
            return x.new_empty((x.shape[0], x.dim()), dtype=torch.int64)
        if func is _aten._unique2.default:
            inverse = x.new_empty(x.shape, dtype=torch.int64)
            return x.new_empty(min(8, x.numel())), inverse, x.new_empty(0, dtype=torch.int64)
        if func is _aten.equal.default:
            return True
        raise NotImplementedError(f"{func} waits for the device, and has no stand-in here")

    def _collective(self, func: Any, args: tuple) -> Any:
        name = func.name().removeprefix("c10d::").strip("_").replace("_base", "")
        inplace = isinstance(args[0], list)
        source = args[0] if inplace else [args[1]]
        group = next(a for a in args if isinstance(a, torch.ScriptObject) and _is_group(a))
        world = dist.ProcessGroup.unbox(group).group_name == dist.group.WORLD.group_name
        tensors = [t for t in tree_iter(source) if isinstance(t, Tensor)]
        if world and any(t.device.type != "cuda" for t in tensors):
            raise RuntimeError(
                f"{name} of a tensor on {tensors[0].device} on the default group, which is NCCL "
                f"on GPUs: it takes CUDA tensors only ({_place()})"
            )
        sent = 0 if name == "recv" else sum(t.numel() * t.element_size() for t in tensors)
        dtypes = "+".join(sorted({_name(t.dtype) for t in tensors}))
        self.counts.collectives.append(Collective(name, dtypes, sent, self.phase))
        work = FakeWork().boxed()
        return (args[0], work) if func.name() not in _WORK_ALONE else work

    def _note(self, func: Any, args: tuple, kwargs: dict, out: Any) -> None:
        if func.name().split(".")[0] in _NOT_REPEATABLE and _has_cuda(tree_iter(out)):
            floats = any(isinstance(x, Tensor) and x.is_floating_point() for x in tree_iter(args))
            if floats:
                self.counts.not_repeatable[f"{_place()} {func.name()}"] += 1
        if func in (_aten._to_copy.default, _aten.copy_.default):
            source = args[0] if func is _aten._to_copy.default else args[1]
            waits = not (kwargs.get("non_blocking") or (args[2:] and args[2]))
            if source.device.type != out.device.type and waits:
                self._wait(func)
            elif out.is_floating_point() and source.dtype != out.dtype:
                shape = tuple(out.shape)
                self.counts.casts[f"{shape} {_name(source.dtype)} {_name(out.dtype)}"] += 1
        for tensor in tree_iter(out):
            if isinstance(tensor, FakeTensor):
                tensor.made_by = func  # type: ignore[attr-defined]
                if tensor.is_floating_point() and tensor.device.type == "cuda":
                    key = f"{self.phase} {tuple(tensor.shape)} {_name(tensor.dtype)}"
                    self.counts.made[key] += 1


_WORK_ALONE = {
    f"c10d::{name}" for name in ("barrier", "alltoall_base_", "reduce_", "gather_", "send", "recv_")
}


def _is_group(value: torch.ScriptObject) -> bool:
    return value._type().name() == "ProcessGroup"


def _has_cuda(leaves: Iterable[Any]) -> bool:
    return any(isinstance(x, Tensor) and x.device.type == "cuda" for x in leaves)


def _masks(indices: Iterable[Any]) -> bool:
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def _place() -> str:
    """The innermost line of this project's packages, or of Lightning, that led here."""
    stack = traceback.extract_stack()
    for part in ("/kernels/", "/lightning_modules/", "/datamodules/"), ("/lightning/",), ("",):
        for frame in reversed(stack):
            name = frame.filename
            if name != __file__ and any(p in name for p in part) and "/torch/" not in name:
                return f"{name.rsplit('/', 1)[-1]}:{frame.lineno}"
    return "?"


def patch_fake_tensors() -> None:
    """Let `tolist` count as one read, not as one for each element, and `deepcopy` copy."""

    def tolist(tensor: FakeTensor) -> Any:
        value = tensor.flatten()[0].item() if tensor.numel() else None
        nested: Any = value
        for size in reversed(tensor.shape):
            nested = [nested] * size
        return nested

    FakeTensor.__deepcopy__ = lambda tensor, memo: tensor.clone()  # type: ignore[attr-defined]
    FakeTensor.tolist = tolist  # type: ignore[method-assign, assignment]
