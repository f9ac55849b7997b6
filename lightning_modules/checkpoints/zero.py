"""Whole fp32 weights out of a DeepSpeed directory, without unpickling anything that could run."""

from __future__ import annotations

import contextlib
import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.checkpoints.plain_data import (
    first_line,
    foreign_content,
    plain_data_only,
)
from lightning_modules.training.run.checkpoint_store import is_of_the_machine


def is_deepspeed_folder(folder: Path) -> bool:
    """True for a folder with the files of one DeepSpeed checkpoint (the one its tag names)."""
    return any(folder.glob("*mp_rank_00_model_states.pt"))


def consolidate(folder: Path) -> dict[str, Tensor]:
    """Join the ranks' parts of a DeepSpeed checkpoint of any ZeRO stage.

    Args:
        folder: The folder with `*model_states.pt` and, from stage 1 on, `*optim_states.pt`.

    Returns:
        Parameter name -> whole tensor. fp32 master weights where the stage keeps them.

    Raises:
        ValueError: a rank's file is missing, damaged, or holds more than tensors and plain data.
        OSError: the storage fails.
    """
    try:
        with plain_data_only(deepspeed=True), _quietly():
            if not any(folder.glob("*_optim_states.pt")):  # stage 0 shards nothing
                return _unsharded(folder)
            from deepspeed.utils import zero_to_fp32

            return zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
                str(folder.parent), tag=folder.name
            )
    except MemoryError:
        raise
    except pickle.UnpicklingError:
        with plain_data_only(deepspeed=True):
            told = [f"{p.name} {what}" for p in folder.glob("*.pt") if (what := foreign_content(p))]
        raise ValueError(
            f"DeepSpeed checkpoint {folder}: {min(told, default='a file is damaged')}; it is not "
            "unpickled, because a pickle can run any code"
        ) from None
    except Exception as error:  # an unpickler's operations on any bytes raise anything
        if is_of_the_machine(error):
            raise
        raise ValueError(
            f"DeepSpeed checkpoint {folder} cannot be joined: {first_line(error)}. A rank's file "
            "may be missing or cut short."
        ) from None


def _unsharded(folder: Path) -> dict[str, Tensor]:
    """Stage 0 (plain data parallelism): the module's state lies in one file."""
    states: Any = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu")
    return {name: value for name, value in states["module"].items() if isinstance(value, Tensor)}


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep DeepSpeed's prints and progress bars away."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield
