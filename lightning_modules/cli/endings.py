"""What an exception that ends a command is, by what failed and not by the exception's type.

The user's mistake ends a job for good (exit code 2), a fault of the machine is worth another try
(75), and what is neither is a fault of ours (1), whose traceback is shown. Imports nothing heavy.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from datamodules.stream.retry import INFRASTRUCTURE, StorageUnavailable
from lightning_modules.training.run.devices import MachineFault

EXIT_OK, EXIT_FAULT, EXIT_USER_ERROR, EXIT_MACHINE = 0, 1, 2, 75

# Where a raise counts as ours; pathlib raises for a file that our code was given.
_OUR_MODULES = {"__main__", "lightning_modules", "datamodules", "kernels", "pathlib"}
# A disk or a port that is taken, besides what storage does to readers.
_TAKEN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EADDRINUSE, errno.ENODEV})
_OF_THIS_NODE = frozenset(
    {errno.EIO, errno.ESTALE, errno.EROFS, errno.ENODEV, errno.ENOTCONN, errno.EREMOTEIO}
)
_WRONG_PATH = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception, then what it was raised from or in the handling of."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__ or (None if seen.__suppress_context__ else seen.__context__)


def _raised_by_us(error: BaseException) -> bool:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    module = frame.tb_frame.f_globals.get("__name__", "") if frame else ""
    return module.split(".")[0] in _OUR_MODULES


def exit_code(error: BaseException, words: Sequence[str]) -> int:
    """Return the exit code that an exception means.

    Args:
        error: What ended the command.
        words: The command and its words. Where a `fit` has checkpoints already, its paths were
            right once: one that is missing now is a mount's fault, to be tried again.
    """
    for link in _chain(error):
        if isinstance(link, MachineFault | StorageUnavailable | TimeoutError):
            return EXIT_MACHINE
        if isinstance(link, OSError) and link.errno in INFRASTRUCTURE | _TAKEN:
            return EXIT_MACHINE
    if not isinstance(error, ValueError | OSError) or not _raised_by_us(error):
        return EXIT_FAULT
    if list(words[:1]) == ["fit"] and any(isinstance(link, _WRONG_PATH) for link in _chain(error)):
        return EXIT_MACHINE if _has_checkpoints(words[1:]) else EXIT_USER_ERROR
    if isinstance(error, OSError) and not isinstance(error, (*_WRONG_PATH, FileExistsError)):
        # what our own code says of a failure on some rank
        return EXIT_MACHINE if error.errno is None else EXIT_USER_ERROR
    return EXIT_USER_ERROR


def _has_checkpoints(words: Sequence[str]) -> bool:
    """Whether the run of a `fit` has checkpoints; a recipe that is missing cannot name it."""
    import yaml

    run_dir, dirpath = "runs/default", ""
    for number, word in enumerate(words):
        name, equals, value = word.lstrip("-").partition("=")
        value = value if equals else "".join(words[number + 1 : number + 2])
        if name in ("config", "c"):
            try:
                run_dir = (yaml.safe_load(Path(value).read_text()) or {}).get("run_dir", run_dir)
            except (OSError, ValueError, AttributeError, yaml.YAMLError):
                continue  # the parser has said what is wrong with it
        run_dir = value if name == "run_dir" else run_dir
        dirpath = value if name == "checkpoints.dirpath" else dirpath
    root = Path(dirpath or f"{run_dir}/checkpoints")
    return any(root.glob("step-*"))


def report(error: BaseException, code: int) -> None:
    """Say what happened, on one rank if all say the same; name this node where it is at fault."""
    if code == EXIT_MACHINE and _is_of_this_node(error):
        _tell_the_job()
    told = " ".join(str(error).split()) if code == EXIT_MACHINE else str(error)
    told = told or type(error).__name__
    if not _is_ours_to_say(error, told):
        return
    kind = "error" if code == EXIT_USER_ERROR else f"fault on {_node()}"
    print(f"eva02-at: {kind}: {told}", file=sys.stderr)


def _is_of_this_node(error: BaseException) -> bool:
    """A wrong path too: files that are missing here are on the node where the user looked."""
    return any(
        isinstance(link, (MachineFault, *_WRONG_PATH))
        or (isinstance(link, OSError) and link.errno in _OF_THIS_NODE)
        for link in _chain(error)
    )


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def _tell_the_job() -> None:
    """Leave the node's name where slurm/requeue.sh looks for nodes to keep off."""
    folder = os.environ.get("EVA02_AT_JOB")
    if folder is None:
        return
    try:
        with (Path(folder) / "bad-nodes").open("a") as file:
            print(_node(), file=file)
    except OSError as error:
        print(f"eva02-at: {folder} cannot be written to: {error}", file=sys.stderr)


def _is_ours_to_say(error: BaseException, told: str) -> bool:
    """False on the ranks whose message another one gives in the same words.

    Once the ranks are connected, the first to come speaks. Before that, rank 0 does, and any rank
    that met something of its own node.
    """
    dist = sys.modules.get("torch.distributed")
    if dist is not None and dist.is_available() and dist.is_initialized():
        from lightning_modules.training.run.private import default_store

        try:
            store = default_store()
            mine = str(dist.get_rank())
            return store.compare_set(f"eva02_at/said/{told}", "", mine).decode() == mine
        except RuntimeError:  # rank 0, which keeps the store, has left
            return dist.get_rank() != 0 and not isinstance(error, ValueError)
    task = "SLURM_PROCID" if "SLURM_STEP_ID" in os.environ else "RANK"
    return os.environ.get(task, "0") == "0" or _is_of_this_node(error)
