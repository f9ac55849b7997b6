"""Every check in its order, on every rank of the allocation; rank 0 has the result."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_modules.doctor import machine, packages, rates
from lightning_modules.doctor.finding import Check, Finding, merge, run_check
from lightning_modules.doctor.ranks import Ranks, joined, network
from lightning_modules.planning.costs import ClusterConfig


def examine(
    folder: Path, preset: str | None, quick: bool
) -> tuple[str, list[Finding], dict] | None:
    """Run the checks; a collective call in an allocation.

    Args:
        folder: Where a run would write.
        preset: Whose training step to time; by default B/16 on a GPU and the demo's on a CPU.
        quick: Leave out what takes long: decoding, the step, the kernels' parity.

    Returns:
        Title, findings and the cluster's description, on rank 0; None on the others.
    """
    with joined() as (ranks, problem):
        nodes: list[str] = [ranks.node]
        if ranks.world > 1:
            nodes = [""] * ranks.world
            dist.all_gather_object(nodes, ranks.node)
        mine = [problem] if problem else []
        if ranks.local_rank == 0:
            mine += _of_a_node(ranks, nodes.count(ranks.node), folder, preset, quick)
        together = run_check("all-reduce", partial(network, ranks))
        together += run_check("shared folder", partial(machine.shared_folder, ranks, folder))
        gathered: list[list[Finding]] = [mine]
        if ranks.world > 1:
            gathered = [[] for _ in nodes]
            dist.all_gather_object(gathered, mine)
        if ranks.rank != 0:
            return None
        by_node: dict[str, list[Finding]] = {}
        for node, findings in zip(nodes, gathered, strict=True):
            by_node.setdefault(node, []).extend(findings)
        findings = merge(by_node) + together
        title = f"eva02-at doctor on {', '.join(by_node)}; ranks: {ranks.world}"
        return title, findings, cluster(findings, len(by_node))


def _of_a_node(
    ranks: Ranks, ranks_on_node: int, folder: Path, preset: str | None, quick: bool
) -> list[Finding]:
    device = ranks.device
    checks: dict[str, Check] = {
        "software": machine.software,
        "driver": machine.driver,
        "GPUs": machine.gpus,
        "cores": partial(machine.cores, ranks_on_node),
        "/dev/shm": machine.shared_memory,
        "limits": machine.limits,
        "disk": partial(machine.disk, folder),
        "attention": partial(packages.attention, device.type),
        "decoders": packages.decoders,
        "DeepSpeed": packages.deepspeed,
    }
    if not quick:
        preset = preset or ("eva02_at_base_16" if device.type == "cuda" else "eva02_at_tiny")
        checks |= {
            "kernels": partial(packages.parity, device.type),
            "decoding": rates.decoding,
            "step": partial(rates.training_step, preset, device),
        }
    findings = [f for name, check in checks.items() for f in run_check(name, check)]
    return findings + ([] if quick else list(rates.feeding(findings)))


def cluster(findings: list[Finding], num_nodes: int) -> dict[str, Any]:
    """Return what was measured as `ClusterConfig`'s fields: what `eva02-at plan --doctor` reads.

    The slowest node counts.
    """
    known = {f.name for f in fields(ClusterConfig)}
    measured: dict[str, Any] = {}
    for finding in findings:
        for name, value in finding.figures.items():
            if name in known:
                old = measured.get(name)
                measured[name] = value if old is None or isinstance(value, str) else min(old, value)
    if torch.cuda.is_available():
        measured |= {"nodes": num_nodes, "gpus_per_node": torch.cuda.device_count()}
    return measured
