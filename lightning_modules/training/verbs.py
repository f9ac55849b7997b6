"""Running one of Lightning's verbs on a recipe, and what each leaves in the run's folder."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from datamodules.files import write_atomically
from datamodules.stream.faults import TooManyDamagedSamples
from lightning_modules.training.monitor.health import NotFiniteError
from lightning_modules.training.recipe import RecipeCLI
from lightning_modules.training.run.checkpoint_store import CheckpointFolder
from lightning_modules.training.run.ownership import RunOwner
from lightning_modules.training.run.signals import EXIT_REQUEUE, RunStopped


@rank_zero_only
def _save_config(cli: RecipeCLI) -> None:
    """Keep the resolved recipe beside the run; a requeued job finds its directory in use."""
    text = cli.parser.dump(cli.config, skip_none=False)
    write_atomically(Path(cli.config.run_dir) / "config.yaml", text)


def _save_predictions(trainer: Trainer, batches: list[Any], run_dir: Path) -> None:
    """Write every rank's embeddings (or logits) as one file, each row once, in index order."""
    loaders = batches if batches and isinstance(batches[0], list) else [batches]
    mine = [
        {key: torch.cat([row[key] for row in loader]) for key in loader[0]}
        for loader in loaders
        if loader[0] is not None
    ]
    (kind,) = set(mine[0]) - {"index"}
    torch.save(mine, run_dir / f".{kind}.{trainer.global_rank}.pt")
    trainer.strategy.barrier()
    if not trainer.is_global_zero:
        return
    parts = [run_dir / f".{kind}.{rank}.pt" for rank in range(trainer.world_size)]
    ranks = [torch.load(part, weights_only=True) for part in parts]
    merged = {}
    for number, modality in enumerate(("video", "text")[: len(mine)]):
        index = torch.cat([rank[number]["index"] for rank in ranks])
        rows = torch.cat([rank[number][kind] for rank in ranks])
        order = index.argsort()
        merged[modality] = {"index": index[order], kind: rows[order]}
    path = run_dir / f"{kind}.pt"
    torch.save(merged, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)
    for part in parts:
        part.unlink()
    print(f"{kind} in {path}")


def _save_figures(result: list[Any], evaluation: Any, stage: str, path: Path) -> None:
    """Print and write the metrics of a validation or test; what is undefined becomes null.

    Args:
        result: What the trainer logged, in float32.
        evaluation: The module's own, exact and with all counts; None if it made none.
        stage: `val` or `test`.
        path: The file.
    """
    figures = {key: value for loader in result for key, value in loader.items()}
    if evaluation is not None:
        figures |= {f"{stage}/{key}": value for key, value in evaluation.measured.flat.items()}
    for key, value in figures.items():
        print(f"{key:<28}" + (f"{value:10d}" if isinstance(value, int) else f"{value:10.4f}"))
    if evaluation is not None and evaluation.coverage.missing:
        print(evaluation.headline)
    defined = {key: value if math.isfinite(value) else None for key, value in figures.items()}
    write_atomically(path, json.dumps(defined, indent=2) + "\n")
    print(f"metrics in {path}")


def run_verb(verb: str, cli: RecipeCLI) -> int:
    """Run a verb on a parsed recipe.

    Args:
        verb: "fit", "validate", "test" or "predict".
        cli: From `build_cli`.

    Returns:
        The exit code.
    """
    if verb == "fit":  # once the folder is ours
        (owner,) = (c for c in cli.trainer.callbacks if isinstance(c, RunOwner))  # type: ignore[attr-defined]
        owner.once_taken = lambda: _save_config(cli)
    else:
        _save_config(cli)
    run_dir = Path(cli.config.run_dir)
    ckpt_path = cli.config.ckpt_path
    if verb == "fit" and ckpt_path is None:
        store = CheckpointFolder(cli.config.checkpoints.dirpath or run_dir / "checkpoints")
        ckpt_path = str(store.root) if store.candidates() else None
    if ckpt_path is not None:
        cli.model.init_checkpoint = None  # may be on another machine, and would be overwritten
    run = getattr(cli.trainer, verb)
    quiet = {"verbose": False} if verb in ("validate", "test") else {}
    try:
        result = run(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path, **quiet)
    except RunStopped as stop:
        rank_zero_info(str(stop))
        return EXIT_REQUEUE
    except (NotFiniteError, TooManyDamagedSamples) as error:
        # out of a loader worker it comes with the worker's traceback in front
        told = str(error).rpartition(f"{type(error).__name__}: ")[2].strip()
        print(f"eva02-at: error: {told}", file=sys.stderr)
        return 1
    if verb == "predict":
        _save_predictions(cli.trainer, result, run_dir)
    elif verb in ("validate", "test") and cli.trainer.is_global_zero:
        stage = "val" if verb == "validate" else "test"
        evaluation = getattr(cli.model, "evaluations", {}).get(stage)
        _save_figures(result, evaluation, stage, run_dir / f"{verb}.json")
    return 0
