"""The start of a command: importing libraries of a million objects, and no more work than that."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing() -> Iterator[None]:
    """Leave the garbage collector off while torch and what needs it are imported.

    Nothing of a module is garbage, but the collector goes through all of them again and again as
    they come: a quarter of the whole time. Afterwards they are set aside for good, so that no later
    collection visits them either, and forked loader workers do not copy their pages. Once torch is
    there, nothing is done.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if "torch" in sys.modules:
            gc.freeze()
        gc.enable()
