"""The plan of a recipe on a cluster: every strategy's memory, time and cost, as a table."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import PurePath
from typing import Any

from datamodules.stream.stores import is_remote, local_path
from lightning_modules.models import VideoClassifier
from lightning_modules.models.rerank import ReRanker
from lightning_modules.planning.costs import (
    GIB,
    ClusterConfig,
    ModelCosts,
    Option,
    model_costs,
    plan_option,
)
from lightning_modules.planning.store import StoreConfig, describe_store, plan_store
from lightning_modules.pretrain import PretrainModule
from lightning_modules.training.recipe import RecipeCLI

STRATEGIES = ("ddp", "zero1", "zero2", "zero3")
# Clips of an epoch by the folder that the recipes' manifests lie in: the published files' rows
# (docs/datasets; LaViLa's two are round figures).
KNOWN_CLIPS = {
    "egoclip": 3_847_723,
    "ego4d_rephrased": 4_000_000,
    "ego4d_pseudo": 4_000_000,
    "ek100_mir_train": 67_217,
    "ek100_train": 67_217,
}


def _clips(cli: RecipeCLI) -> tuple[int, str]:
    """Clips of an epoch, and where the figure is from.

    Raises:
        ValueError: A manifest is not there, and its data set not known.
    """
    places = cli.datamodule.train_manifests
    missing = [p for p in places if not is_remote(p) and not local_path(p).exists()]
    if not missing:
        steps = cli.datamodule.batches_per_epoch
        return steps * cli.datamodule.global_batch_size, "the manifests"
    for path in missing:
        if _data_set(path) not in KNOWN_CLIPS:
            raise ValueError(
                f"{path} does not exist and the size of its data set is not known, so the length "
                "of an epoch is not either; give it with --clips"
            )
    known = [KNOWN_CLIPS.get(_data_set(place)) for place in places]
    if None in known:
        raise ValueError("some manifests are there and some are not; give the length with --clips")
    return sum(n for n in known if n), "the data sets' published sizes"


def _data_set(manifest: str) -> str:
    return PurePath(manifest).parent.name


def _hard_negatives(cli: RecipeCLI) -> tuple[int, float]:
    """False captions of a clip, and the share of clips shown backwards too: each at most."""
    options = getattr(cli.datamodule, "hard_negatives", None)
    if options is None:
        return 0, 0.0
    captions = options.num_verbs + options.num_nouns if isinstance(cli.model, PretrainModule) else 0
    return captions, options.reversed_share


def _activation_precision(strategy: str, precision: str) -> str:
    """DeepSpeed casts the weights where the others run autocast."""
    return precision.replace("mixed", "true") if strategy.startswith("zero") else precision


def make_plan(
    cli: RecipeCLI,
    cluster: ClusterConfig,
    clips: int | None,
    epochs: int | None,
    store: StoreConfig | None = None,
) -> dict[str, Any]:
    """Compute the plan of a parsed recipe.

    Args:
        cli: The recipe.
        cluster: Where it would run.
        clips: Clips an epoch; what the recipe's manifests say by default.
        epochs: Instead of the recipe's.
        store: Where the shards lie, if not on disks of the cluster.

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
    if isinstance(model, ReRanker):
        raise ValueError(
            "plan knows dual encoders and classifiers, and this recipe trains a re-ranker: a step "
            "takes less than its dual encoder's in evaluation and a half; plan that one's recipe"
        )
    is_recogniser = isinstance(model, VideoClassifier)
    precision = str(cli.trainer.precision)
    num_classes = model.num_classes if is_recogniser else None
    muon = cli.model.optimizer_config.name == "muon"  # which is refused under ZeRO
    strategies = STRATEGIES[:1] if muon else STRATEGIES
    modes = {_activation_precision(s, precision) for s in strategies}
    captions, turned = _hard_negatives(cli)
    costs = {
        mode: model_costs(model.config, num_classes, mode, num_captions=1 + captions, turned=turned)
        for mode in modes
    }
    vision = model.config.vision
    input_bytes = 3 * vision.num_frames * vision.image_size**2
    if not is_recogniser:
        input_bytes += 8 * model.config.text.context_length * (1 + captions)
    input_bytes = int(input_bytes * (1 + turned))
    per_epoch, source = (clips, "--clips") if clips is not None else _clips(cli)
    steps = per_epoch // batch * (epochs or cli.trainer.max_epochs or 1)
    rows = []
    for strategy in strategies:
        for checkpointing in (False, True):
            option = plan_option(
                costs[_activation_precision(strategy, precision)],
                cluster,
                strategy=strategy,
                checkpointing=checkpointing,
                batch=batch // cluster.ranks,
                pair_input_bytes=input_bytes,
                workers=cli.datamodule.num_workers,
            )
            if is_recogniser:  # which has no GradCache to split a batch with
                option = replace(option, micro_batch=None)
            hours = steps * option.step_s / 3600
            gpu_hours = hours * cluster.ranks
            cost = gpu_hours * cluster.price_per_gpu_hour
            row = {**asdict(option), "hours": hours, "gpu_hours": gpu_hours, "cost": cost}
            rows.append({**row, "limited_by": _limit(option)})
    summary = {
        "clips": per_epoch,
        "clips_from": source,
        "steps": steps,
        "ranks": cluster.ranks,
        "batch_per_rank": batch // cluster.ranks,
        "precision": precision,
        "activation_bytes": {mode: cost.activation_bytes for mode, cost in costs.items()},
        "recomputes": model.config.activation_checkpointing,
        "workers": cli.datamodule.num_workers,
        "optimizer": cli.model.optimizer_config.name,
        "hard_negatives": {"captions": captions, "reversed_share": turned},
    }
    plan = {
        "cluster": asdict(cluster),
        "model": asdict(costs[precision]),
        **summary,
        "options": rows,
    }
    if store is not None:
        step_s = min(row["step_s"] for row in rows)
        shape = per_epoch, batch, cluster.ranks, cluster.gpus_per_node
        plan["store"] = plan_store(*shape, step_s, cli.datamodule.num_workers, store)
    return plan


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
        f"{plan['ranks']} x {cluster.gpu} ({cluster.memory_gib:.0f} GiB), "
        f"{plan['batch_per_rank']} pairs each, {plan['steps']} steps; {plan['clips']:,} clips an "
        f"epoch ({plan['clips_from']})",
        "kept for the backward pass: "
        + ", ".join(f"{b / 2**20:.0f} MiB a pair in {m}" for m, b in _modes(plan)),
        *_told_of_negatives(plan["hard_negatives"]),
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
    if "store" in plan:
        lines += ["", *describe_store(plan["store"])]
    return "\n".join(lines)


def _told_of_negatives(negatives: dict[str, Any]) -> list[str]:
    captions, share = negatives["captions"], negatives["reversed_share"]
    if not captions and not share:
        return []
    return [
        f"with all of data.hard_negatives that there can be: {captions} false captions a clip, "
        f"{share:.0%} of the clips backwards too"
    ]


def _modes(plan: dict[str, Any]) -> list[tuple[str, float]]:
    """The recipe's own precision first."""
    return sorted(plan["activation_bytes"].items(), key=lambda item: item[0] != plan["precision"])


def _advice(plan: dict[str, Any]) -> str:
    usable = [row for row in plan["options"] if row["fits"] or row["micro_batch"]]
    if not usable and plan["optimizer"] == "muon":
        return "nothing; a smaller model, or adamw instead of muon, which is not for ZeRO"
    if not usable:
        return "nothing; more GPUs, configs/strategy/zero3_offload.yaml, or a smaller model"
    best = min(usable, key=lambda r: (r["step_s"], bool(r["micro_batch"]), r["checkpointing"]))
    words = [f"configs/strategy/{best['strategy']}.yaml"]
    words.append(f"model.model.activation_checkpointing={str(best['checkpointing']).lower()}")
    if best["micro_batch"]:
        words.append(f"model.micro_batch={best['micro_batch']}")
    workers, cores = plan["workers"], plan["cluster"]["cores_per_gpu"]
    if best["limited_by"] == "decoding" and workers < cores:
        words.append(f"data.num_workers={cores:.0f}, which has {workers} of {cores:.0f} cores")
    return "fastest with " + ", ".join(words)
