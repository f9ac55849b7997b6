"""The last words of a command: what it wrote, and what may come next."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable


def close(*following: object, wrote: Iterable[object] = (), told: str = "") -> None:
    """Say on the error stream what was written and what may come next.

    A program may be reading the other stream.

    Args:
        following: The words of the next command after `eva02-at`.
        wrote: Files and folders; None among them is one that was not asked for.
        told: What may come next where that is no command of this project, in words.
    """
    files = [str(path) for path in wrote if path is not None]
    if files:
        print(f"wrote {', '.join(files)}", file=sys.stderr)
    if following:
        words = shlex.join(["eva02-at", *map(str, following)])
        told = f"{words} ({told})" if told else words
    print(f"next: {told}", file=sys.stderr)
