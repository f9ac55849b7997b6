"""Published checkpoints, in any of their layouts, into this project's models.

What reads them needs torch and is imported when it is asked for: the zoo's table needs none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_modules.checkpoints.loading import (
        LoadReport,
        load_clip_checkpoint,
        read_checkpoint,
    )

__all__ = ["LoadReport", "load_clip_checkpoint", "read_checkpoint"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("lightning_modules.checkpoints.loading"), name)
