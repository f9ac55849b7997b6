"""Waiting out what storage does to readers: the one policy of retries, for files near and far.

    wait_out(work, name, retry=Retry(), transient=is_infrastructure) -> what work() returns

`work` is called until it returns. An `OSError` that `transient` says is the storage's, not the
file's, is logged and waited out with doubling pauses; any other passes through at once. After
`retry.patience_s` of nothing but transient faults `StorageUnavailable` ends it: no sample is to be
replaced for it, since the same run on a quiet day would have had it.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")

# What network file systems, full tables and failing links raise; the file itself may be sound.
INFRASTRUCTURE = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
        errno.EIO,
        errno.EMFILE,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        errno.ENFILE,
        errno.ENOMEM,
        errno.ENOTCONN,
        errno.EPIPE,
        errno.EREMOTEIO,
        errno.ESHUTDOWN,
        errno.ESTALE,
        errno.ETIMEDOUT,
    }
)


class StorageUnavailable(OSError):
    """The storage did not come back in time; says what was wanted and what went wrong last."""


@dataclass  # not frozen: Lightning moves it like a batch
class NoBatch:
    """What a loader hands over in a batch's place when the storage did not come back.

    An exception would end one rank and leave the others in their next collective; this lets all
    of them agree to stop, with a checkpoint.

    Attributes:
        storage_fault: What became of the batch.
    """

    storage_fault: str


@dataclass(frozen=True)
class Retry:
    """How long to wait for storage.

    Attributes:
        patience_s: From the first fault to giving up.
        first_s: First pause; it doubles from try to try.
        longest_s: No pause is longer.
    """

    patience_s: float = 600.0
    first_s: float = 1.0
    longest_s: float = 30.0


def is_infrastructure(error: OSError) -> bool:
    """True for a fault of mounts, links and process limits rather than of the file."""
    return isinstance(error, TimeoutError | ConnectionError) or error.errno in INFRASTRUCTURE


def wait_out(
    work: Callable[[], T],
    name: str,
    retry: Retry | None = None,
    transient: Callable[[OSError], bool] = is_infrastructure,
) -> T:
    """Call something until the storage lets it through.

    Args:
        work: What to do; must start from the beginning each time.
        name: What is wanted, for the log and the error.
        retry: How long to wait.
        transient: Which faults are worth waiting for.

    Raises:
        StorageUnavailable: Transient faults lasted for longer than `retry.patience_s`.
        OSError: What `work` raised, if that is not transient.
    """
    retry = retry or Retry()
    pause_s, tries, deadline = retry.first_s, 0, 0.0
    while True:
        tries += 1
        try:
            return work()
        except OSError as error:
            if not transient(error):
                raise
            now = time.monotonic()
            deadline = deadline or now + retry.patience_s
            if now >= deadline:
                raise StorageUnavailable(
                    f"{name}: no answer in {tries} tries over {retry.patience_s:g} s; the last "
                    f"fault was: {error}"
                ) from error
            # half of it at random, so that hundreds of readers do not come back at one moment
            wait_s = min(pause_s * (0.5 + random.SystemRandom().random() / 2), deadline - now)
            logger.warning("%s: %s (try %d; again in %.1f s)", name, error, tries, wait_s)
            time.sleep(wait_s)
            pause_s = min(2 * pause_s, retry.longest_s)
