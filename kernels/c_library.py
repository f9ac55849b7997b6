"""The CPU's operators that are written in C: built on first use, loaded with ctypes.

A build takes a tenth of a second, so every process that needs one does it, for the processor it
runs on, in a directory that is gone once the library is loaded: nothing can be stale, half written
or another machine's. Where there is no C compiler, a warning says so and the caller does without.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

_log = logging.getLogger(__name__)

# Compiled for OpenMP but not linked to one: its calls are bound to the library that PyTorch has
# loaded, and so to its pool of threads and torch.set_num_threads.
_COMPILE = "-std=gnu11 -O3 -march=native -fno-math-errno -fno-trapping-math -fPIC -fopenmp -c"
_BUILD_SECONDS = 60
# Each source with more of the compiler's options.
_SOURCES = {
    "gated_norm.c": (),
    # in PyTorch's order of roundings: no multiplication fused with an addition
    "rotation.c": ("-ffp-contract=off",),
}


class _Build(NamedTuple):
    directory: tempfile.TemporaryDirectory
    compiler: subprocess.Popen


_begun: dict[str, _Build] = {}


def begin() -> None:
    """Start to compile all of them beside what the process does next, for `load` to finish."""
    for source in _SOURCES.keys() - _begun.keys():
        with contextlib.suppress(OSError):  # `load` meets it again, and tells
            _begun[source] = _compile(source)


@lru_cache
def load(source: str) -> tuple[ctypes.CDLL | None, str]:
    """Compile and load a file of this directory.

    Args:
        source: Its name, such as "rotation.c".

    Returns:
        The library and "built by ...", or None and why it could not be built.
    """
    try:
        build = _begun.pop(source, None) or _compile(source)
        with build.directory as directory:
            _finish(build.compiler)
            library = Path(directory, "library.so")
            _finish(_start("-shared", Path(directory, "compiled.o"), "-o", library))
            return ctypes.CDLL(str(library)), f"built by {_compiler()}"
    except subprocess.CalledProcessError as error:
        problem = (error.stderr.strip().splitlines() or [str(error)])[-1]
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    reason = (
        f"{source} cannot be built ({problem}): install gcc, or set CC to a compiler that knows "
        "-fopenmp"
    )
    _log.warning("%s. Slower operations of PyTorch run instead.", reason)
    return None, reason


def _compiler() -> str:
    return os.environ.get("CC") or "gcc"


def _compile(source: str) -> _Build:
    directory = tempfile.TemporaryDirectory(prefix="eva02-at-")
    given, compiled = Path(__file__).with_name(source), Path(directory.name, "compiled.o")
    try:
        compiler = _start(*_COMPILE.split(), *_SOURCES[source], given, "-o", compiled)
    except OSError:
        directory.cleanup()
        raise
    return _Build(directory, compiler)


def _start(*arguments: str | Path) -> subprocess.Popen:
    command = [*shlex.split(_compiler()), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def _finish(compiler: subprocess.Popen) -> None:
    """Wait for a compiler.

    Raises:
        CalledProcessError: It failed.
        TimeoutExpired: It hangs; it is killed.
    """
    try:
        errors = compiler.communicate(timeout=_BUILD_SECONDS)[1]
    except subprocess.TimeoutExpired:
        compiler.kill()
        raise
    if compiler.returncode:
        raise subprocess.CalledProcessError(compiler.returncode, compiler.args, stderr=errors)
