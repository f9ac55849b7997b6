"""Run a function on several gloo ranks, real processes, and collect what each returns."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return `function(rank, *args)` of each rank, in their order; an error of any is raised.

    Args:
        world_size: Number of processes.
        function: A module-level function of a test file.
        args: Whatever can be pickled.
    """
    # Ranks are forked from a server that has imported torch once; a fork of pytest itself would
    # inherit its threads.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "torchmetrics"])
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, folder, function, args, dict(os.environ))
        mp.start_processes(_rank_main, arguments, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(world_size)]


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)  # the server may have been started before a test set it
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    torch.save(function(rank, *args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
