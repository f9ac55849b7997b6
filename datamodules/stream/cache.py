"""Copies of remote files on a local disk, shared by all processes of a node."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from datamodules.files import write_atomically
from datamodules.stream.stores import Fetcher

_STALE_S = 3600.0
_PLAN = ".plan"


class FileCache:
    """Remote files on a local disk, shared by all processes of a node, up to a size.

    Files are named by their SHA-256, so that a changed data set never meets an old file. A file
    that is deleted to make room stays readable to those who have it open.

    What goes first is what nobody plans to use, the longest unused before the others; then what
    is to be used last. A reader that knows its order says so with `publish`.

    Args:
        folder: Where; made if need be.
        limit_bytes: How much it may hold.
        fetcher: Gets what is not there.
    """

    def __init__(
        self, folder: str | Path, limit_bytes: int, fetcher: Fetcher | None = None
    ) -> None:
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self.fetcher = fetcher or Fetcher()

    def open(self, url: str, sha256: str) -> BinaryIO:
        """Open a file, fetching it first if it is not there.

        Raises:
            OSError: It cannot be fetched.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / sha256
        with self._locked(sha256):  # one process fetches, the others wait for it
            try:
                file = path.open("rb")
            except FileNotFoundError:
                self.fetcher.copy(url, path, sha256)
                file = path.open("rb")
            os.utime(path)
        self._make_room(keep=path)
        return file

    def has(self, sha256: str) -> bool:
        """True if a file is there."""
        return (self.folder / sha256).exists()

    def publish(self, reader: str, sha256s: Sequence[str]) -> None:
        """Say which files a reader will use, the next one first; holds for an hour."""
        write_atomically(self.folder / f"{reader}{_PLAN}", "\n".join(sha256s))

    def withdraw(self, reader: str) -> None:
        """Take a reader's plan back."""
        (self.folder / f"{reader}{_PLAN}").unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, keep: Path) -> None:
        with self._locked("evict"):
            files, total = [], 0
            next_use: dict[str, int] = {}
            for entry in os.scandir(self.folder):
                path = Path(entry.path)
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    stale = time.time() - status.st_mtime > _STALE_S
                    if path.suffix == ".lock" or entry.name.startswith("."):
                        continue
                    if stale and path.suffix in (".tmp", _PLAN):  # of a process that is gone
                        path.unlink(missing_ok=True)
                    elif path.suffix == _PLAN:
                        for place, name in enumerate(path.read_text().split("\n")):
                            next_use[name] = min(place, next_use.get(name, place))
                    else:
                        total += status.st_size
                        if path != keep and path.suffix != ".tmp":
                            files.append((path, status.st_mtime, status.st_size))
            never = len(next_use) + 1
            files.sort(key=lambda file: (-next_use.get(file[0].name, never), file[1]))
            for path, _, size in files:
                if total <= self.limit_bytes:
                    return
                path.unlink(missing_ok=True)
                total -= size
