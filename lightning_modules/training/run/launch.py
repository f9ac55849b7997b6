"""How the ranks of a SLURM step find each other: one port a step, a deadline, and who is missing.

Lightning takes one port a job, so that two steps in one allocation meet each other's ranks, and
torch waits for half an hour for whoever does not come. Here rank 0 opens a door on the first free
port of a few that follow from job, step and restart; the others knock at the same ones until it is
their own launch that answers. Once all have come it tells them where torch's store listens.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import socket
import time
from typing import Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from torch.distributed import DistError, TCPStore

log = logging.getLogger(__name__)

_TOLD_AFTER_S = 30.0  # somebody is missing: say so, and wait on
_PORTS = range(10000, 32768)  # below what Linux hands out by itself
_ANSWER_S = 10.0  # of a stranger's port
_store: Any = None  # rank 0's holds the server: as long as the process


class NotAllCame(TimeoutError):
    """Ranks are missing at the start; says which."""


def check_slurm() -> None:
    """Look at SLURM's variables before Lightning does.

    Raises:
        ValueError: They promise other processes, but this one was not started by `srun`.
    """
    if "SLURM_NTASKS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        return
    if "SLURM_STEP_ID" in os.environ:
        return
    tasks = os.environ["SLURM_NTASKS"]
    if tasks != "1":
        raise ValueError(
            f"SLURM_NTASKS is {tasks}, but this process was not started by `srun`, so that nobody "
            "starts the others. Mend: `srun eva02-at ...`, or for one process alone "
            "`SLURM_NTASKS=1 eva02-at ...`"
        )
    # in a shell of `salloc`, or in a batch script: Lightning's own word for "SLURM started nothing"
    os.environ["SLURM_JOB_NAME"] = "interactive"


def meet() -> None:
    """Connect the ranks of this SLURM step, where it has several, and tell torch where.

    `EVA02_AT_START_S` (600) is how long they wait for each other. Where `MASTER_PORT` is set, torch
    takes that port, and its own half hour.

    Raises:
        NotAllCame: Somebody did not come in time.
    """
    size = int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
    given = {"MASTER_PORT", "TORCHELASTIC_RUN_ID"} & set(os.environ)
    if size == 1 or given or not SLURMEnvironment.detect():
        return
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ["SLURM_NODELIST"]
    host = os.environ.setdefault("MASTER_ADDR", SLURMEnvironment.resolve_root_node_address(nodes))
    rank, deadline = int(os.environ["SLURM_PROCID"]), time.monotonic() + _patience_s()
    port = _open_door(size, deadline) if rank == 0 else _knock(host, rank, deadline)
    os.environ["MASTER_PORT"] = str(port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # torch: the store is there already
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "0"


def _patience_s() -> float:
    return float(os.environ.get("EVA02_AT_START_S", "600"))


def _launch() -> str:
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    return ".".join(os.environ.get(name, "0") for name in names)


def ports(launch: str, count: int = 8) -> list[int]:
    """The ports that a launch tries, in order; those of another launch are others."""
    digests = (hashlib.sha256(f"{launch}/{k}".encode()).digest() for k in range(count))
    return [_PORTS[int.from_bytes(digest[:8], "big") % len(_PORTS)] for digest in digests]


def _open_door(size: int, deadline: float) -> int:
    """On rank 0: wait for the others, say who is missing, and tell all where the store is."""
    global _store
    with contextlib.ExitStack() as opened:
        door, _ = _first_free(lambda port: socket.create_server(("", port), backlog=size))
        opened.enter_context(door)
        _store, port = _first_free(
            lambda port: TCPStore("localhost", port, is_master=True, wait_for_workers=False)
        )
        door.settimeout(0.2)
        came: dict[int, socket.socket] = {}
        begin, told = time.monotonic(), False
        while missing := [rank for rank in range(1, size) if rank not in came]:
            if (visitor := _let_in(door)) is not None:
                rank, connection = visitor
                came[rank] = opened.enter_context(connection)
            waited_s = time.monotonic() - begin
            who = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
            what = f"{len(missing)} of {size} ranks have not come after {waited_s:.0f} s: {who}"
            if time.monotonic() > deadline:
                raise NotAllCame(f"{what}. Did each task of `srun` start this command?")
            if waited_s > _TOLD_AFTER_S and not told:
                log.warning("%s. Each task of `srun` must start this command; waiting on", what)
                told = True
        for connection in came.values():
            connection.sendall(f"{port}\n".encode())
    return port


def _first_free(listen: Any) -> tuple[Any, int]:
    tried = ports(_launch())
    for port in tried:
        try:
            return listen(port), port
        except (OSError, DistError) as error:
            if getattr(error, "errno", None) != errno.EADDRINUSE and "EADDRINUSE" not in str(error):
                raise
    raise OSError(errno.EADDRINUSE, f"ports {tried} are all taken; name a free one: MASTER_PORT")


def _let_in(door: socket.socket) -> tuple[int, socket.socket] | None:
    """The next rank of this launch that knocks, if one does soon."""
    try:
        connection, _ = door.accept()
    except TimeoutError:
        return None
    try:
        connection.settimeout(_ANSWER_S / 5)
        launch, _, rank = connection.recv(200).decode().strip().partition(" ")
        if launch == _launch():
            connection.sendall(f"{launch}\n".encode())
            return int(rank), connection
    except (OSError, ValueError):
        pass  # no rank: a port scan, say
    connection.close()
    return None


def _knock(host: str, rank: int, deadline: float) -> int:
    """On the other ranks: find the door, wait until all have come, return the store's port."""
    why = "nobody answers"
    while time.monotonic() < deadline:
        for port in ports(_launch()):
            try:
                with socket.create_connection((host, port), timeout=_ANSWER_S) as connection:
                    connection.sendall(f"{_launch()} {rank}\n".encode())
                    answer = connection.makefile()
                    if answer.readline().strip() != _launch():
                        continue  # a stranger
                    connection.settimeout(max(1.0, deadline - time.monotonic()) + 5)
                    if told := answer.readline().strip():
                        return int(told)
                    raise NotAllCame("rank 0 ended at the start; its own message says why")
            except NotAllCame:
                raise
            except (OSError, ValueError) as error:
                why = str(error)
        time.sleep(0.2)
    raise NotAllCame(
        f"rank 0 cannot be reached on {host} within {_patience_s():g} s (EVA02_AT_START_S): {why}"
    )
