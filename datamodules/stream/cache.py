"""Files that are not local: webdataset's openers, with retries, deadlines and a bounded cache."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import logging
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from webdataset.gopen import Pipe, gopen, gopen_pipe, gopen_schemes

from datamodules.files import open_plain_file

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20
_STALE_S = 3600


def _gopen_s3(url: str, mode: str = "rb", bufsize: int = 8192) -> Any:
    """webdataset knows no `s3:`; AWS's own client does the work."""
    return gopen_pipe(f"pipe:aws s3 cp '{url}' -", mode, bufsize)


gopen_schemes.setdefault("s3", _gopen_s3)


def is_remote(location: str) -> bool:
    """True for a URL that needs one of webdataset's openers; `file:` and paths are local."""
    scheme, colon, _ = location.partition(":")
    return bool(colon) and len(scheme) > 1 and scheme != "file" and "/" not in scheme


def local_path(location: str) -> Path:
    """Path of a local location, `file:` URLs included."""
    return Path(location.removeprefix("file://").removeprefix("file:"))


def read_bytes(location: str) -> bytes:
    """Read a whole small file.

    Raises:
        OSError: It cannot be read; remote ones after retries.
    """
    if not is_remote(location):
        with os.fdopen(open_plain_file(local_path(location)), "rb") as file:
            return file.read()
    buffer = io.BytesIO()
    Fetcher().copy(location, buffer)
    return buffer.getvalue()


class Fetcher:
    """Copies remote files, again and again if need be.

    Args:
        tries: How often.
        wait_s: Pause after the first failure; it doubles from try to try.
        timeout_s: Longest silence of the source before a try counts as failed.
    """

    def __init__(self, tries: int = 4, wait_s: float = 1.0, timeout_s: float = 60.0) -> None:
        self.tries, self.wait_s, self.timeout_s = tries, wait_s, timeout_s

    def copy(self, url: str, target: BinaryIO, sha256: str | None = None) -> None:
        """Copy a file.

        Args:
            url: Where from.
            target: Where to; emptied before each try.
            sha256: What must have come.

        Raises:
            OSError: All tries failed; the message has the last reason.
        """
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.wait_s * 2 ** (attempt - 1))
            target.seek(0)
            target.truncate()
            try:
                digest = hashlib.sha256()
                for chunk in self._read(url):
                    digest.update(chunk)
                    target.write(chunk)
                if sha256 is not None and digest.hexdigest() != sha256:
                    raise OSError(f"{target.tell()} bytes came whose SHA-256 is another")
                return
            except (OSError, ValueError) as error:  # gopen raises ValueError for unknown schemes
                last = error
                logger.warning("%s: %s (try %d of %d)", url, error, attempt + 1, self.tries)
        raise OSError(f"cannot read {url} in {self.tries} tries: {last}") from last

    def _read(self, url: str) -> Iterator[bytes]:
        stream = gopen(url, "rb")
        if not isinstance(stream, Pipe):
            with stream:
                while chunk := stream.read(_CHUNK):
                    yield chunk
            return
        # a subprocess, such as curl: it may be silent for ever, so wait with a deadline
        assert stream.stream is not None
        descriptor = stream.stream.fileno()
        try:
            while True:
                if not select.select([descriptor], [], [], self.timeout_s)[0]:
                    raise TimeoutError(f"nothing came for {self.timeout_s:g} s")
                chunk = os.read(descriptor, _CHUNK)
                if not chunk:
                    break
                yield chunk
        except BaseException:
            stream.proc.kill()
            with contextlib.suppress(OSError):
                stream.close()
            raise
        stream.close()  # raises if the command failed


class FileCache:
    """Remote files on a local disk, shared by all processes of a node, up to a size.

    Files are named by their SHA-256, so that a changed data set never meets an old file. A file
    that is deleted to make room stays readable to those who have it open.

    Args:
        folder: Where; made if need be.
        limit_bytes: Above this, the files used longest ago go.
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
                temporary = path.with_suffix(".tmp")
                with temporary.open("wb") as target:
                    self.fetcher.copy(url, target, sha256)
                temporary.replace(path)
                file = path.open("rb")
            os.utime(path)
        self._make_room(keep=path)
        return file

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _make_room(self, keep: Path) -> None:
        with self._locked("evict"):
            entries = []
            for entry in os.scandir(self.folder):
                with contextlib.suppress(FileNotFoundError):
                    entries.append((entry.stat().st_mtime, entry.stat().st_size, Path(entry.path)))
            now, total = time.time(), sum(size for _, size, _ in entries)
            for used_s, size, path in sorted(entries):
                abandoned = path.suffix == ".tmp" and now - used_s > _STALE_S
                if path.suffix == ".lock" or (path.suffix == ".tmp" and not abandoned):
                    continue
                if abandoned or (total > self.limit_bytes and path != keep):
                    path.unlink(missing_ok=True)
                    total -= size
