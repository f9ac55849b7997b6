"""The ranks of the allocation that the doctor runs in, and what the network between them gives."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment

from lightning_modules.doctor.finding import Finding

JOIN_S = 120
_WORK_S = 600  # one rank of a node checks it while the others wait
_MEBIBYTES, _ROUNDS = 64, 5
_SLOW_GB_S = 2.0  # of NCCL; 25 Gbit/s Ethernet


@dataclass(frozen=True)
class Ranks:
    """This process among the others.

    Attributes:
        rank: Its number among all.
        world: All of them.
        local_rank: Its number on its node.
        node: Name of its node; SLURM's, where SLURM started it.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    node: str = platform.node()

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        return torch.device("cpu")


@contextmanager
def joined() -> Iterator[tuple[Ranks, Finding | None]]:
    """Join the ranks that srun or torchrun started; alone elsewhere.

    Yields:
        The ranks, and what is bad where they cannot be joined (every rank then goes on alone).
    """
    environment = _environment()
    if environment is None:
        yield Ranks(), None
        return
    node = os.environ.get("SLURMD_NODENAME", platform.node())
    ranks = Ranks(
        environment.global_rank(), environment.world_size(), environment.local_rank(), node
    )
    problem = _join(ranks, environment.main_address, environment.main_port)
    if problem is not None:
        yield Ranks(local_rank=ranks.local_rank, node=node), problem
        return
    try:
        yield ranks, None
    finally:
        dist.destroy_process_group()


def _environment() -> SLURMEnvironment | TorchElasticEnvironment | None:
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    # a batch script's own process has SLURM's variables too, but no other ranks beside it
    if "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return SLURMEnvironment(auto_requeue=False)
    return None


def _join(ranks: Ranks, address: str, port: int) -> Finding | None:
    if ranks.device.type == "cuda":
        torch.cuda.set_device(ranks.device)
    try:
        join = timedelta(seconds=JOIN_S)
        store = dist.TCPStore(address, port, ranks.world, ranks.rank == 0, join)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if ranks.device.type == "cuda" else "gloo",
            store=store,
            rank=ranks.rank,
            world_size=ranks.world,
            timeout=timedelta(seconds=_WORK_S),
        )
        dist.barrier()
    except Exception as error:
        text = f"the {ranks.world} ranks do not find each other at {address}:{port}: {error}"
        mend = (
            "every node must reach that address: name the interface between the nodes in "
            "slurm/env.sh (NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), and open its ports"
        )
        return Finding("ranks", "bad", text, mend)
    return None


def network(ranks: Ranks) -> list[Finding]:
    """Time all-reduces within the nodes and over all of them; a collective call."""
    if ranks.world == 1:
        return _alone(ranks)
    nodes: list[str] = [""] * ranks.world
    dist.all_gather_object(nodes, ranks.node)
    kind = "NCCL" if ranks.device.type == "cuda" else "gloo"
    members = {node: [r for r, n in enumerate(nodes) if n == node] for node in dict.fromkeys(nodes)}
    groups = {node: dist.new_group(ranks_) for node, ranks_ in members.items()}
    findings = []
    if len(members[ranks.node]) > 1 and len(members) > 1:
        inside = all_reduce_gb_s(ranks.device, groups[ranks.node])
        text = f"{inside:.2f} GB/s by {kind}, {len(members[ranks.node])} ranks"
        figures = {"intra_node_gb_s": inside}
        findings.append(Finding("all-reduce in a node", "ok", text, figures=figures))
    over = all_reduce_gb_s(ranks.device)
    figures = {"inter_node_gb_s" if len(members) > 1 else "intra_node_gb_s": over}
    text = f"{over:.2f} GB/s by {kind}, {ranks.world} ranks on {len(members)} nodes"
    slow = kind == "NCCL" and over < _SLOW_GB_S
    mend = (
        "NCCL runs over Ethernet or through the host: set NCCL_SOCKET_IFNAME and NCCL_IB_HCA in "
        "slurm/env.sh; NCCL_DEBUG=INFO shows what it chose"
    )
    verdict = ("bad", text, mend) if slow else ("ok", text, "")
    return [*findings, Finding("all-reduce", *verdict, figures)]


def _alone(ranks: Ranks) -> list[Finding]:
    """Without other ranks: this machine's own GPUs, or two gloo ranks on its CPU."""
    gpus = torch.cuda.device_count()
    world = gpus if gpus > 1 else 2
    device = "cuda" if gpus > 1 else "cpu"
    speed = _spawned_gb_s(world, device)
    kind = "NCCL" if device == "cuda" else "gloo"
    text = f"{speed:.2f} GB/s by {kind}, {world} ranks of this machine"
    figures = {"intra_node_gb_s": speed} if device == "cuda" else {}
    findings = [Finding("all-reduce", "ok", text, figures=figures)]
    if device == "cpu":
        why = "no second GPU" if gpus else "no GPU"
        findings.append(Finding("NCCL", "skipped", f"{why} here"))
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        text = "this is the batch script's own process: `srun eva02-at doctor` checks all ranks"
        findings.append(Finding("ranks", "note", text))
    return findings


def _spawned_gb_s(world: int, device: str) -> float:
    context = torch.multiprocessing.get_context("spawn")
    speeds = context.SimpleQueue()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(_rank, (world, device, store.port, speeds), nprocs=world)
    return speeds.get()


def _rank(rank: int, world: int, device: str, port: int, speeds) -> None:  # type: ignore[no-untyped-def]
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    speed = all_reduce_gb_s(torch.device(device))
    if rank == 0:
        speeds.put(speed)
    dist.destroy_process_group()


def all_reduce_gb_s(device: torch.device, group: dist.ProcessGroup | None = None) -> float:
    """GB/s that every rank sends in a ring's all-reduce of 64 MiB: NCCL's "bus bandwidth"."""
    numbers = torch.ones(_MEBIBYTES * 2**18, device=device)
    world = dist.get_world_size(group)
    seconds = []
    for _ in range(_ROUNDS + 1):
        _wait(device)
        start = time.perf_counter()
        dist.all_reduce(numbers, group=group)
        _wait(device)
        seconds.append(time.perf_counter() - start)
        numbers.fill_(1.0)
    return 2 * (world - 1) / world * numbers.nbytes / sorted(seconds[1:])[_ROUNDS // 2] / 1e9


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
