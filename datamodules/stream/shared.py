"""Memory that processes share, /dev/shm: a container's is 64 MiB, and torch tells badly of its end.

A loader worker hands a batch over in a thread of its queue. What fails there is printed and the
batch is lost: the trainer would wait for it for ever. So workers put tensors there before.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_convert, get_worker_info


def hand_over(batch: Any) -> Any:
    """A loader's `collate_fn` for whole batches: in a worker, their tensors go to shared memory."""
    batch = default_convert(batch)
    if get_worker_info() is not None:
        for tensor in _tensors(batch):
            tensor.share_memory_()
    return batch


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for inner in value:
            yield from _tensors(inner)


def shared_zeros(*shape: int) -> Tensor:
    """Integers that all processes forked from this one see.

    Raises:
        OSError: There is no room for them.
    """
    with full_shared_memory_named():
        return torch.zeros(*shape, dtype=torch.int64).share_memory_()


@contextlib.contextmanager
def full_shared_memory_named() -> Iterator[None]:
    """Say so where what fails inside, in this process or a worker, is that /dev/shm is full.

    Raises:
        OSError: It is.
    """
    try:
        yield
    except (RuntimeError, OSError) as error:
        # a semaphore's has no name either
        certain = isinstance(error, OSError) and error.errno == errno.ENOSPC
        refuse_full_shared_memory(error, certain=certain)
        raise


def refuse_full_shared_memory(
    error: BaseException, exitcodes: Sequence[int] = (), *, certain: bool = False
) -> None:
    """Raise where /dev/shm was full, as torch's words or a worker's SIGBUS tell.

    Args:
        error: What was caught.
        exitcodes: Of workers that died.
        certain: It was, whatever the error's words.

    Raises:
        OSError: It was.
    """
    told = str(error)
    full = "torch_" in told and ("No space left" in told or "shared memory" in told)
    if certain or full or -signal.SIGBUS in exitcodes:
        disk = shutil.disk_usage("/dev/shm")
        raise OSError(
            errno.ENOSPC,
            f"/dev/shm is full ({disk.free >> 10} of {disk.total >> 10} KiB free), in which loader "
            "workers hand over their batches. Mend: make it larger (of a container: --shm-size), "
            "or lower data.num_workers or data.prefetch",
        ) from error
