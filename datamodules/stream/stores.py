"""Files that are not local: object stores through fsspec, and commands where they are allowed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import select
import shlex
import signal
import subprocess
import tempfile
import threading
import time
import urllib.parse
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback
from fsspec.core import url_to_fs

from datamodules.files import open_plain_file
from datamodules.stream.retry import Retry, wait_out

_CHUNK = 1 << 20
_WRONG_TRIES = 3  # a file whose hash differs as often is another file
# scheme -> the extra whose package reads it; fsspec knows more, some of which run commands
SCHEMES: dict[str, str | None] = {
    "s3": "s3",
    "gs": "gs",
    "az": "az",
    "abfs": "az",
    "hf": None,
    "http": None,
    "https": None,
}
# A fork shares the poll set of fsspec's event loop. A child that collects the loop it inherited, or
# a connection of it, takes their sockets out of that set, and the parent is never woken again. What
# was ever opened is therefore never collected; fsspec makes one of each a process.
_KEPT: dict[int, Any] = {}


def scheme_of(location: str) -> str:
    """`s3` of `s3://bucket/set`; empty for paths and `file:`."""
    scheme, colon, _ = location.partition(":")
    local = not colon or len(scheme) < 2 or "/" in scheme or scheme == "file"
    return "" if local else scheme


def is_remote(location: str) -> bool:
    """True for a URL or a `pipe:`; `file:` and paths are local."""
    return bool(scheme_of(location))


def local_path(location: str) -> Path:
    """Path of a local location, `file:` URLs included."""
    return Path(location.removeprefix("file://").removeprefix("file:"))


def check_location(location: str, allow_pipe: bool = False) -> None:
    """Refuse what cannot or may not be read.

    Args:
        location: Path, URL, or `pipe:` and a command.
        allow_pipe: The user allows commands.

    Raises:
        ValueError: An unknown scheme, or a command that is not allowed.
    """
    scheme = scheme_of(location)
    if scheme == "pipe":
        if not allow_pipe:
            raise ValueError(
                f"{location!r:.200} runs a command on this machine; allow it with --allow-pipe "
                "(in a recipe: data.init_args.allow_pipe=true)"
            )
    elif scheme and (scheme not in SCHEMES or "::" in location):
        raise ValueError(
            f"{location!r:.200} has a scheme that is not read; one of "
            f"{', '.join(f'{name}://' for name in SCHEMES)}, file:, pipe:, or a path"
        )


def join(root: str, name: str) -> str:
    """Full location of a file of a set.

    Args:
        root: The set's folder, URL, or a pattern in which `{}` stands for the name.
        name: As `manifest_rules.name_fault` lets it pass.
    """
    scheme = scheme_of(root)
    if scheme == "pipe":
        name = shlex.quote(name)
    elif scheme in ("http", "https"):
        name = urllib.parse.quote(name)
    if "{}" in root:
        return root.replace("{}", name)
    return f"{root.rstrip('/')}/{name}" if root else name


class _Progress(Callback):
    """Remembers when something came last."""

    def __init__(self) -> None:
        super().__init__()
        self.last_s = time.monotonic()

    def call(self, *args: Any, **kwargs: Any) -> None:
        self.last_s = time.monotonic()


class Fetcher:
    """Copies remote files, again and again if need be.

    Args:
        retry: How long to wait for a store that fails or is silent.
        timeout_s: Longest silence before a try counts as failed.
    """

    def __init__(self, retry: Retry | None = None, timeout_s: float = 60.0) -> None:
        self.retry, self.timeout_s = retry or Retry(), timeout_s

    def copy(self, url: str, target: Path, sha256: str | None = None) -> None:
        """Copy a file.

        Args:
            url: Where from.
            target: Where to; appears whole or not at all.
            sha256: What must have come.

        Raises:
            StorageUnavailable: The store did not answer in time.
            OSError: It has no such file, does not let us read it, or the file is another one.
            ValueError: The scheme needs a package that is not installed.
        """
        wrong: list[str] = []
        tries = itertools.count()

        def attempt() -> None:
            # a name of its own: a try that was given up may still write to its file
            one = f"{os.getpid()}-{threading.get_ident()}-{next(tries)}"
            temporary = target.with_name(f"{target.name}.{one}.tmp")
            try:
                self._read(url, temporary)
                if sha256 is not None:
                    with temporary.open("rb") as file:
                        found = hashlib.file_digest(file, "sha256").hexdigest()
                    if found != sha256:
                        wrong.append(found)
                        size = temporary.stat().st_size
                        raise OSError(errno.EBADMSG, f"{size} bytes came whose SHA-256 is another")
                temporary.replace(target)
            finally:
                temporary.unlink(missing_ok=True)

        wait_out(attempt, url, self.retry, lambda error: _may_pass(error, len(wrong)))

    def _read(self, url: str, target: Path) -> None:
        if scheme_of(url) == "pipe":
            self._run(url.removeprefix("pipe:"), target)
            return
        progress, outcome = _Progress(), list[BaseException]()

        def work() -> None:
            try:
                store, path = open_store(url, self.timeout_s)
                store.get_file(path, str(target), callback=progress)
            except BaseException as error:  # handed to the waiting thread
                outcome.append(error)

        # a thread, since not every store has a deadline of its own; one that hangs is left behind
        thread = threading.Thread(target=work, daemon=True, name="fetch")
        thread.start()
        while thread.is_alive():
            left_s = progress.last_s + self.timeout_s - time.monotonic()
            if left_s <= 0:
                raise TimeoutError(f"nothing came for {self.timeout_s:g} s")
            thread.join(min(left_s, 1.0))
        if outcome:
            raise _as_os_error(outcome[0]) from outcome[0]

    def _run(self, command: str, target: Path) -> None:
        """Write a command's output to a file; a silent command is killed with its children."""
        process = subprocess.Popen(
            command, shell=True, stdout=subprocess.PIPE, start_new_session=True
        )
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        try:
            with target.open("wb") as file:
                while True:
                    if not select.select([descriptor], [], [], self.timeout_s)[0]:
                        raise TimeoutError(f"nothing came for {self.timeout_s:g} s")
                    chunk = os.read(descriptor, _CHUNK)
                    if not chunk:
                        break
                    file.write(chunk)
            if process.wait(self.timeout_s):
                raise OSError(f"`{command}` ended with exit code {process.returncode}")
        except subprocess.TimeoutExpired as error:
            raise TimeoutError(f"`{command}` does not end") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.wait()


def open_store(url: str, timeout_s: float = 60.0) -> tuple[Any, str]:
    """Return fsspec's file system of a URL, and the path in it.

    Credentials, endpoints and regions are the store's own affair: environment, `~/.aws`, fsspec's
    `FSSPEC_S3_...` variables.

    Raises:
        ValueError: The package that reads it is not installed.
    """
    check_location(url)
    scheme = scheme_of(url)
    options: dict[str, Any] = {}
    if scheme == "s3":
        # one policy of retries, ours: the client's own would take minutes before we hear of a fault
        options["config_kwargs"] = {
            "read_timeout": timeout_s,
            "connect_timeout": timeout_s,
            "retries": {"total_max_attempts": 1},
        }
    elif scheme in ("http", "https"):
        import aiohttp  # fsspec's own for these schemes; half a second to import

        silence = aiohttp.ClientTimeout(total=None, sock_connect=timeout_s, sock_read=timeout_s)
        options["client_kwargs"] = {"timeout": silence}
    try:
        store, path = url_to_fs(url, **options)
        for kept in (store, getattr(store, "loop", None)):
            _KEPT[id(kept)] = kept
        return store, path
    except ImportError as error:
        raise ValueError(
            f"{scheme}:// needs a package that is not installed; "
            f"`pip install 'eva02-at[{SCHEMES[scheme]}]'` ({error})"
        ) from error


def read_bytes(location: str, fetcher: Fetcher | None = None) -> bytes:
    """Read a whole small file.

    Raises:
        OSError: It cannot be read; remote ones after retries.
    """
    if is_remote(location):
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "file"
            (fetcher or Fetcher()).copy(location, target)
            return target.read_bytes()
    with os.fdopen(open_plain_file(local_path(location)), "rb") as file:
        return file.read()


def _as_os_error(error: BaseException) -> BaseException:
    """Clients raise what their libraries do; what matters is whether waiting may help."""
    if isinstance(error, OSError | ValueError):
        return error
    text = f"{type(error).__name__}: {error}"
    status = getattr(error, "status", None)  # aiohttp's
    if status in (404, 410):
        return FileNotFoundError(errno.ENOENT, text)
    if status in (401, 403) or "Credential" in type(error).__name__:
        return PermissionError(errno.EACCES, text)
    return OSError(text)


_FINAL: tuple[type[OSError], ...] = (FileNotFoundError, PermissionError, IsADirectoryError)


def _may_pass(error: OSError, wrong: int) -> bool:
    """True if a remote fault may be gone at the next try."""
    if isinstance(error, _FINAL) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return False  # the last three are our own disk's
    return wrong < _WRONG_TRIES
