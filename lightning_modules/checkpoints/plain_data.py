"""Reading what torch pickled without running anything: tensors and plain data, or nothing.

A checkpoint's hashes say that it is what somebody wrote, not who wrote it. DeepSpeed reads its
files with `weights_only=False`; inside `plain_data_only` torch does not heed that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_FORCE_NOT = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch refuses to load where both are set


@contextlib.contextmanager
def plain_data_only(*, deepspeed: bool = False) -> Iterator[None]:
    """Make every `torch.load` inside refuse whatever is not a tensor or plain data.

    Whatever the user's environment says, which is as it was afterwards.

    Args:
        deepspeed: Admit, by name, the three plain classes that DeepSpeed's files hold.
    """
    before = {name: os.environ.pop(name, None) for name in (_FORCE, _FORCE_NOT)}
    os.environ[_FORCE] = "1"
    try:
        with torch.serialization.safe_globals(_deepspeed_classes() if deepspeed else []):
            yield
    finally:
        del os.environ[_FORCE]
        os.environ.update({name: value for name, value in before.items() if value is not None})


def _deepspeed_classes() -> list[Any]:
    if not os.environ.get("DS_ACCELERATOR") and not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"  # or the import warns that it found no accelerator
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [LossScaler, ZeroStageEnum, fragment_address]


def foreign_content(path: Path) -> str | None:
    """Say what a torch file holds beside tensors and plain data; None if nothing.

    Reads the file's table and not its tensors. What a `plain_data_only` around it admits counts as
    plain.
    """
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # an unpickler's operations on any bytes raise anything
        return f"is no file that torch.save writes ({first_line(error)})"
    return f"holds {', '.join(sorted(names))}" if names else None


def first_line(error: Exception) -> str:
    """The first line of what an error says, or its kind."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def load_plain(path: Path) -> Any:
    """`torch.load` to the CPU of a file with tensors and plain data.

    Raises:
        ValueError: it holds more, or cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # as above
        told = foreign_content(path)
        raise ValueError(
            f"{path} {told or f'cannot be read ({first_line(error)})'}; only tensors and "
            "plain data are read from a checkpoint, because a pickle can run any code. Mend: start "
            "from its weights, as safetensors, with model.init_checkpoint"
        ) from None
