"""Running one of Lightning's verbs on a recipe, and what each leaves in the run's folder."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch.utilities import rank_zero_info

from datamodules.files import write_atomically, write_whole
from datamodules.stream.faults import TooManyDamagedSamples
from lightning_modules.training.closing import close
from lightning_modules.training.inputs import check_inputs, check_parts
from lightning_modules.training.monitor.health import NotFiniteError
from lightning_modules.training.recipe import RecipeCLI
from lightning_modules.training.run.checkpoint_store import CheckpointFolder
from lightning_modules.training.run.checkpointing import SafeCheckpoints
from lightning_modules.training.run.loop_state import is_trial
from lightning_modules.training.run.signals import EXIT_REQUEUE, RunStopped
from lightning_modules.training.weights import load_weights, provenance, result_path


def _save_predictions(
    trainer: Trainer, batches: list[Any], run_dir: Path, stated: dict[str, Any]
) -> None:
    """Write every rank's embeddings (or logits) as one file, each row once, in index order.

    A JSON of the same name says of which weights and data they are.
    """
    loaders = batches if batches and isinstance(batches[0], list) else [batches]
    mine = [
        {key: torch.cat([row[key] for row in loader]) for key in loader[0]}
        for loader in loaders
        if loader[0] is not None
    ]
    (kind,) = set(mine[0]) - {"index"}
    run_dir.mkdir(parents=True, exist_ok=True)
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
    path = result_path(run_dir / f"{kind}.pt", run_dir / f"{kind}.json", stated)
    write_whole(path, lambda temporary: torch.save(merged, temporary))
    write_atomically(path.with_suffix(".json"), json.dumps(stated, indent=2) + "\n")
    for part in parts:
        part.unlink()
    close("search", "--checkpoint", run_dir, "--videos", "DIR", "--serve", wrote=(path,))


def _save_figures(
    result: list[Any], evaluation: Any, stage: str, path: Path, stated: dict[str, Any]
) -> Path:
    """Print and write the metrics of a validation or test; what is undefined becomes null.

    Args:
        result: What the trainer logged, in float32.
        evaluation: The module's own, exact and with all counts; None if it made none.
        stage: `val` or `test`.
        path: The file's usual place.
        stated: Which weights and data they are of.

    Returns:
        Where they are.
    """
    figures = {key: value for loader in result for key, value in loader.items()}
    if evaluation is not None:
        figures |= {f"{stage}/{key}": value for key, value in evaluation.measured.flat.items()}
    for key, value in figures.items():
        print(f"{key:<28}" + (f"{value:10d}" if isinstance(value, int) else f"{value:10.4f}"))
    if evaluation is not None and evaluation.coverage.missing:
        print(evaluation.headline)
    defined = {key: value if math.isfinite(value) else None for key, value in figures.items()}
    path = result_path(path, path, stated)
    write_atomically(path, json.dumps({**defined, **stated}, indent=2) + "\n")
    run = path.parent
    if stage == "val":
        close("test", "--config", run / "config.yaml", f"--run_dir={run}", wrote=(path,))
    else:
        close("convert", "--input", run, "--output", run / "model.safetensors", wrote=(path,))
    return path


def run_verb(verb: str, cli: RecipeCLI) -> int:
    """Run a verb on a parsed recipe.

    Args:
        verb: "fit", "validate", "test" or "predict".
        cli: From `build_cli`.

    Returns:
        The exit code.
    """
    try:
        if verb == "fit":
            _fit(cli)
        else:
            _evaluate(verb, cli)
    except RunStopped as stop:
        rank_zero_info(str(stop))
        return EXIT_REQUEUE
    except (NotFiniteError, TooManyDamagedSamples) as error:
        # out of a loader worker it comes with the worker's traceback in front
        told = str(error).rpartition(f"{type(error).__name__}: ")[2].strip()
        print(f"eva02-at: error: {told}", file=sys.stderr)
        return 1
    return 0


def _fit(cli: RecipeCLI) -> None:
    """Train; go on from `ckpt_path`, or the run's newest complete checkpoint."""
    ckpt_path = cli.config.ckpt_path
    if is_trial(cli.trainer):
        cli.trainer.loggers = []
    else:
        for callback in cli.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, SafeCheckpoints):
                callback.recipe = cli.kept()
        root = cli.config.checkpoints.dirpath or Path(cli.config.run_dir) / "checkpoints"
        if ckpt_path is None and CheckpointFolder(root).candidates():
            ckpt_path = str(root)
    if ckpt_path is not None:
        cli.model.init_checkpoint = None  # may be on another machine, and would be overwritten
    check_inputs(cli.model, cli.datamodule, resumes=ckpt_path is not None)
    check_parts(cli.model, cli.datamodule)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=ckpt_path)


def _evaluate(verb: str, cli: RecipeCLI) -> None:
    """Validate, test or predict with a run's weights; the run's own files stay as they are."""
    run_dir, trainer = Path(cli.config.run_dir), cli.trainer
    source = load_weights(cli)
    trainer.loggers = []  # theirs are the training's steps
    quiet = {"verbose": False} if verb in ("validate", "test") else {}
    result = getattr(trainer, verb)(cli.model, datamodule=cli.datamodule, **quiet)
    stated = provenance(verb, cli, source) if trainer.is_global_zero else {}
    if verb == "predict":
        _save_predictions(trainer, result, run_dir, stated)
        path = run_dir / "predict"
    elif trainer.is_global_zero:
        stage = "val" if verb == "validate" else "test"
        evaluation = getattr(cli.model, "evaluations", {}).get(stage)
        path = _save_figures(result, evaluation, stage, run_dir / f"{verb}.json", stated)
    if trainer.is_global_zero:
        text = cli.kept()
        write_atomically(path.with_suffix(".yaml"), text)
