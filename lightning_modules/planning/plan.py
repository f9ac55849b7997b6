"""The plan of a recipe on a cluster: every strategy's memory, time and cost, as a table."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from datamodules.stream.stores import is_remote, local_path
from lightning_modules.models import VideoClassifier
from lightning_modules.planning.costs import (
    GIB,
    ClusterConfig,
    ModelCosts,
    Option,
    model_costs,
    plan_option,
)
from lightning_modules.training.recipe import RecipeCLI

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")


def _steps(cli: RecipeCLI, clips: int | None, epochs: int | None) -> int:
    batch = cli.datamodule.global_batch_size
    if clips is not None:
        per_epoch = clips // batch
    else:
        missing = [
            place
            for place in cli.datamodule.train_manifests
            if not is_remote(place) and not local_path(place).exists()
        ]
        if missing:
            raise ValueError(
                f"{missing[0]} does not exist, so the length of an epoch is not known; "
                "give it with --clips"
            )
        per_epoch = cli.datamodule.batches_per_epoch
    return per_epoch * (epochs or cli.trainer.max_epochs or 1)


def make_plan(
    cli: RecipeCLI, cluster: ClusterConfig, clips: int | None, epochs: int | None
) -> dict[str, Any]:
    """Compute the plan of a parsed recipe.

    Raises:
        ValueError: The global batch does not divide over the GPUs, or the epoch's length is
            unknown.
    """
    batch = cli.datamodule.global_batch_size
    if batch % cluster.ranks:
        raise ValueError(
            f"the recipe's global batch of {batch} does not divide over {cluster.ranks} GPUs; "
            "change data.global_batch_size, or the nodes and GPUs of the cluster"
        )
    model = cli.model.model
    is_recogniser = isinstance(model, VideoClassifier)
    costs = model_costs(model.config, model.num_classes if is_recogniser else None)
    vision = model.config.vision
    input_bytes = 3 * vision.num_frames * vision.image_size**2
    if not is_recogniser:
        input_bytes += 8 * model.config.text.context_length
    steps = _steps(cli, clips, epochs)
    rows = []
    for strategy in STRATEGIES:
        for checkpointing in (False, True):
            option = plan_option(
                costs,
                cluster,
                strategy=strategy,
                checkpointing=checkpointing,
                batch=batch // cluster.ranks,
                pair_input_bytes=input_bytes,
            )
            if is_recogniser:  # which has no GradCache to split a batch with
                option = replace(option, micro_batch=None)
            hours = steps * option.step_s / 3600
            gpu_hours = hours * cluster.ranks
            cost = gpu_hours * cluster.price_per_gpu_hour
            row = {**asdict(option), "hours": hours, "gpu_hours": gpu_hours, "cost": cost}
            rows.append({**row, "limited_by": _limit(option)})
    summary = {"steps": steps, "ranks": cluster.ranks, "batch_per_rank": batch // cluster.ranks}
    return {"cluster": asdict(cluster), "model": asdict(costs), **summary, "options": rows}


def _limit(option: Option) -> str:
    if option.data_s >= option.step_s:
        return "decoding"
    return "network" if option.communication_s > option.compute_s * 2 / 3 else "GPUs"


def describe(plan: dict[str, Any]) -> str:
    """Lay a plan out as text."""
    costs = ModelCosts(**plan["model"])
    cluster = ClusterConfig(**plan["cluster"])
    lines = [
        f"{costs.parameters / 1e6:.1f} M parameters, {costs.flops / 1e9:.0f} GFLOPs forward a pair",
        f"{plan['ranks']} x {cluster.gpu} ({cluster.gpu_memory_gib:g} GiB), "
        f"{plan['batch_per_rank']} pairs each, {plan['steps']} steps",
        "",
        "strategy  recompute   state  activ.   total GiB  fits         step s  limit     "
        " hours  GPU-hours    cost",
    ]
    for row in plan["options"]:
        micro = row["micro_batch"]
        fits = "yes" if row["fits"] else f"micro {micro}" if micro else "no"
        figures = [row[key] / GIB for key in ("state_bytes", "activation_bytes", "total_bytes")]
        lines.append(
            f"{row['strategy']:<9} {'yes' if row['checkpointing'] else 'no':<9} "
            f"{figures[0]:7.1f} {figures[1]:7.1f} {figures[2]:11.1f}  {fits:<11} "
            f"{row['step_s']:7.2f}  {row['limited_by']:<9}{row['hours']:6.1f} "
            f"{row['gpu_hours']:10.0f} {row['cost']:7.0f}"
        )
    lines += ["", f"fits: {_advice(plan)}"]
    return "\n".join(lines)


def _advice(plan: dict[str, Any]) -> str:
    usable = [row for row in plan["options"] if row["fits"] or row["micro_batch"]]
    if not usable:
        return "nothing; more GPUs, configs/strategy/zero3_offload.yaml, or a smaller model"
    best = min(usable, key=lambda r: (r["step_s"], bool(r["micro_batch"]), r["checkpointing"]))
    words = [f"configs/strategy/{best['strategy']}.yaml"]
    words.append(f"model.model.activation_checkpointing={str(best['checkpointing']).lower()}")
    if best["micro_batch"]:
        words.append(f"model.micro_batch={best['micro_batch']}")
    return "fastest with " + ", ".join(words)
