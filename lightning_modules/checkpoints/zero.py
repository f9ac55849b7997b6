"""Whole fp32 weights out of a DeepSpeed directory, without unpickling anything that could run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


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
    """
    if not os.environ.get("DS_ACCELERATOR") and not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # or the import warns that it found no accelerator
    try:
        with _only_plain_data():
            if not any(folder.glob("*_optim_states.pt")):  # stage 0 shards nothing
                return _unsharded(folder)
            from deepspeed.utils import zero_to_fp32

            return zero_to_fp32.get_fp32_state_dict_from_zero_checkpoint(
                str(folder.parent), tag=folder.name
            )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"DeepSpeed checkpoint {folder} holds more than tensors and plain data, or is "
            f"damaged, and is not unpickled, because a pickle can run any code: "
            f"{_reason(error)}"
        ) from None
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError) as error:
        raise ValueError(
            f"DeepSpeed checkpoint {folder} cannot be joined: {_reason(error)}. A rank's file may "
            "be missing or cut short."
        ) from None


def _unsharded(folder: Path) -> dict[str, Tensor]:
    """Stage 0 (plain data parallelism): the module's state lies in one file."""
    states: Any = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu")
    return {name: value for name, value in states["module"].items() if isinstance(value, Tensor)}


@contextlib.contextmanager
def _only_plain_data() -> Iterator[None]:
    """Make every torch.load inside refuse code, and DeepSpeed's functions quiet.

    DeepSpeed's own consolidation passes weights_only=False. This variable overrides it, and three
    plain classes of DeepSpeed's files are admitted by name.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with (
            torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),  # its progress bars
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    told = next((line for line in lines if "Unsupported global" in line), None)
    return told or next(iter(lines), "") or type(error).__name__
