"""Writing files whole or not at all. Needs nothing but the standard library."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, flush it to the disk, then rename it.

    Args:
        path: Where; missing folders are made.
        write: Called with the temporary name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        temporary.chmod(mode)  # safetensors makes its files readable by their owner alone
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def open_plain_file(path: Path) -> int:
    """Open a file for reading; a pipe or a device in its place would be waited for for ever.

    Returns:
        Its descriptor.

    Raises:
        OSError: It cannot be opened, or is no plain file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no plain file", str(path))
    return descriptor


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file by `write_whole`.

    Args:
        path: Where; missing folders are made.
        content: What.
    """
    data = content.encode() if isinstance(content, str) else content
    write_whole(path, lambda temporary: temporary.write_bytes(data))
