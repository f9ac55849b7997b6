"""The state that all metrics here share: rows of samples, each counted once by its id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.distributed import gather_all_tensors


class SampleStore(Metric):
    """Rows of tensors over updates and ranks.

    Subclasses declare their columns of state with `add_rows`, append to them in `update` and read
    them with `rows` in `compute`. Ranks may hold different numbers of rows, and a rank may hold
    none at all; `first_of_each` drops a sample's second and later copies, so that the padding of a
    sampler never counts.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._row_types: dict[str, tuple[torch.dtype, int]] = {}

    def add_rows(self, name: str, dtype: torch.dtype, ndim: int = 1) -> None:
        """Declare a state `name` of tensors with `ndim` dimensions, rows along the first."""
        self.add_state(name, [], dist_reduce_fx="cat")
        self._row_types[name] = (dtype, ndim)

    def append(self, name: str, rows: Tensor) -> None:
        """Add rows to a state, in the state's dtype and on the metric's device."""
        dtype, _ = self._row_types[name]
        getattr(self, name).append(rows.detach().to(device=self.device, dtype=dtype))

    def rows(self, name: str) -> Tensor:
        """All rows of a state; (0, ...) where there are none."""
        value = getattr(self, name)
        if len(value) == 0:
            dtype, ndim = self._row_types[name]
            return torch.empty((0,) * ndim, dtype=dtype, device=self.device)
        return dim_zero_cat(value)

    def _sync_dist(
        self, dist_sync_fn: Callable = gather_all_tensors, process_group: Any | None = None
    ) -> None:
        """Gather every state; torchmetrics' own way breaks where a rank has no rows of 2-D state.

        It would stand in a float vector for the missing rows, whatever the others' shape and type.
        """
        for name in self._row_types:
            gathered = dist_sync_fn(self.rows(name), group=process_group or self.process_group)
            filled = [rows for rows in gathered if len(rows)]
            setattr(self, name, [torch.cat(filled)] if filled else [])


def first_of_each(index: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct ids in ascending order, and where each occurs first.

    Ascending ids make results independent of how samples were spread over ranks and batches.

    Args:
        index: (n,) int64 ids.

    Returns:
        `(ids, places)`, both (distinct,) int64.
    """
    ids, inverse = torch.unique(index, return_inverse=True)
    places = torch.full_like(ids, len(index))
    places.scatter_reduce_(0, inverse, torch.arange(len(index), device=index.device), "amin")
    return ids, places


def kept(mask: Tensor | None, *rows: Tensor) -> tuple[Tensor, ...]:
    """Select the rows that a (B,) bool mask keeps; all of them without a mask."""
    return rows if mask is None else tuple(tensor[mask] for tensor in rows)
