"""Waiting for storage: what is waited for, for how long, and what passes through."""

import errno

import pytest

from datamodules.stream.retry import INFRASTRUCTURE, Retry, StorageUnavailable, wait_out

QUICK = Retry(patience_s=0.2, first_s=0.01, longest_s=0.02)


def failing(times, error):
    left = iter([error] * times)

    def work():
        fault = next(left, None)
        if fault is not None:
            raise fault
        return "done"

    return work


@pytest.mark.parametrize("number", sorted(INFRASTRUCTURE), ids=errno.errorcode.get)
def test_faults_of_the_storage_are_waited_out_and_named(number, caplog):
    assert wait_out(failing(2, OSError(number, "gone")), "a.tar", QUICK) == "done"
    assert caplog.text.count("a.tar") == 2


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "x"), PermissionError(13, "x"), OSError("x")]
)
def test_faults_of_the_file_pass_through_at_once(error):
    work = failing(1, error)
    with pytest.raises(type(error)):
        wait_out(work, "a.tar", QUICK)
    assert work() == "done"


def test_patience_ends_with_what_was_wanted_and_what_went_wrong():
    with pytest.raises(StorageUnavailable, match=r"a\.tar: no answer in \d+ tries.*Errno 5.*slow"):
        wait_out(failing(10**6, OSError(errno.EIO, "slow")), "a.tar", QUICK)


def test_the_caller_says_what_is_transient():
    work = failing(1, FileNotFoundError(2, "not mounted"))
    assert wait_out(work, "a.tar", QUICK, lambda error: error.errno == errno.ENOENT) == "done"
