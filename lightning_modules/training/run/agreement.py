"""Small agreements between ranks, on a gloo group of their own.

The default group is NCCL on GPUs; these messages are a few integers on the CPU, must not wait for
the GPU's queue, and have to work while that queue is stuck or its tensors are not finite.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(hours=2)  # a checkpoint of terabytes may sit between two agreements


class Ranks:
    """The ranks of the run, for agreeing on flags and gathering reports; one process needs none.

    Make it on every rank, in the same order, once the default process group is up.
    """

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self._group: Any = None
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            if self.size > 1:
                self._group = dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def maximum(self, values: list[int]) -> list[int]:
        """Return the largest value over the ranks, one for each position."""
        if self._group is None:
            return values
        tensor = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._group)
        return tensor.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on every rank."""
        if self._group is None:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered

    def first(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        if self._group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """What each rank does by itself, ended by an agreement that it worked everywhere.

        No rank is left in a collective by another's exception, whatever its type; nothing inside
        may be a collective.

        Raises:
            OSError: Some rank failed; raised on all of them.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self.raise_together(error, doing)

    def raise_together(self, error: BaseException | None, doing: str) -> None:
        """Raise on every rank if any rank failed, naming the ranks and their reasons.

        Raises:
            OSError: Somebody failed; each rank's own error is its cause.
        """
        if not self.maximum([int(error is not None)])[0]:
            return
        reasons = self.gather(None if error is None else f"{type(error).__name__}: {error}")
        told = "; ".join(f"rank {r}: {why}" for r, why in enumerate(reasons) if why is not None)
        raise OSError(f"{doing} failed on {told}") from error


_shared: tuple[Any, Ranks] | None = None


def run_ranks() -> Ranks:
    """The ranks of the run, one gloo group however many callbacks ask; all ranks ask in step."""
    global _shared
    world = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    if _shared is None or _shared[0] is not world:
        _shared = (world, Ranks())
    return _shared[1]
