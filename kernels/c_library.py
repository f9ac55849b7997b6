"""The CPU's operators that are written in C: built on first use, loaded with ctypes.

A build takes a tenth of a second, so every process that needs one does it, for the processor it
runs on, in a directory that is gone once the library is loaded: nothing can be stale, half written
or another machine's. Where there is no C compiler, a warning says so and the caller does without.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

_log = logging.getLogger(__name__)

# Compiled for OpenMP but not linked to one: its calls are bound to the library that PyTorch has
# loaded, and so to its pool of threads and torch.set_num_threads.
_COMPILE = "-std=gnu11 -O3 -march=native -fno-math-errno -fno-trapping-math -fPIC -fopenmp -c"
_BUILD_SECONDS = 60


@lru_cache
def load(source: str, *flags: str) -> tuple[ctypes.CDLL | None, str]:
    """Compile and load a file of this directory.

    Args:
        source: Its name, such as "rotation.c".
        flags: More of the compiler's options.

    Returns:
        The library and "built by ...", or None and why it could not be built.
    """
    compiler = os.environ.get("CC") or "gcc"
    with tempfile.TemporaryDirectory(prefix="eva02-at-") as directory:
        compiled, library = Path(directory, "compiled.o"), Path(directory, "library.so")
        try:
            for arguments in (
                (*_COMPILE.split(), *flags, str(Path(__file__).with_name(source)), "-o", compiled),
                ("-shared", compiled, "-o", library),
            ):
                subprocess.run(
                    [*shlex.split(compiler), *map(str, arguments)],
                    check=True,
                    capture_output=True,
                    text=True,
                    timeout=_BUILD_SECONDS,
                )
            return ctypes.CDLL(str(library)), f"built by {compiler}"
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
