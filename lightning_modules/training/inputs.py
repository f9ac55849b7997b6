"""What a recipe needs on the disk, looked for before anything starts, all of it at once."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from lightning import LightningDataModule, LightningModule

from datamodules.module import RetrievalSplit, StreamDataModule
from datamodules.stream.stores import is_remote

_SHARDS = "`eva02-at shards build` writes it"
_WEIGHTS = (
    "where public weights come from is in docs/downloads.md; "
    "--model.init_args.init_checkpoint=null starts from none"
)
_VALIDATION = "to train without validation: --data.init_args.val=null"


def check_inputs(module: LightningModule, data: LightningDataModule, resumes: bool) -> None:
    """Look for the files that a training run will read.

    Args:
        module: Its `init_checkpoint` is looked for, unless the run goes on from its own, and a
            re-ranker's `dual_checkpoint`.
        data: Its manifests and annotations are, where it is one of ours.
        resumes: Whether the run has a checkpoint.

    Raises:
        FileNotFoundError: Names each missing file with its mend.
    """
    told = []
    weights = getattr(module, "init_checkpoint", None)
    if weights is not None and not resumes and not _is_there(weights):
        told.append(f"no checkpoint at {weights} ({_WEIGHTS})")
    dual = getattr(module, "dual_checkpoint", None)
    if dual is not None and not _is_there(dual):
        told.append(f"no dual encoder at {dual} (--model.dual_checkpoint=PATH names a trained one)")
    if isinstance(data, StreamDataModule):
        told += [
            f"no manifest at {m} ({_SHARDS})" for m in data.train_manifests if not _is_there(m)
        ]
        told += _missing_of_split(data.val_split)
    if told:
        raise FileNotFoundError(f"nothing was started: {'; '.join(told)}")


def check_parts(module: LightningModule, data: LightningDataModule) -> None:
    """Compare what the recipe's parts say of each other.

    Args:
        module: Its model's clips are compared with the data's, its loss with what it gives it.
        data: The recipe's.

    Raises:
        ValueError: They do not fit; both sides are named.
    """
    vision = getattr(getattr(getattr(module, "model", None), "config", None), "vision", None)
    options = getattr(data, "clip_options", None)
    for name in ("num_frames", "image_size"):
        wanted, given = getattr(vision, name, None), getattr(options, name, None)
        if None not in (wanted, given) and wanted != given:
            raise ValueError(
                f"data.{name} is {given} and model.model.{name} is {wanted}; give both the same"
            )
    takes = getattr(module, "loss_takes", None)
    if takes is None or (arguments := takes()) is None:
        return
    loss: Any = module.loss
    try:
        inspect.signature(loss.forward).bind(*arguments)
    except TypeError as error:
        raise ValueError(
            f"model.loss is {type(loss).__name__}, whose forward cannot be called as "
            f"{type(module).__name__} does, with ({', '.join(arguments)}): {error}. "
            "Mend: a loss of pairs (InfoNCELoss, EgoNCELoss, SigLIPLoss) goes with PretrainModule, "
            "one of relevance (MaxMarginLoss, SymmetricMultiSimilarityLoss) with "
            "RetrievalModule"
        ) from None


def _missing_of_split(split: RetrievalSplit | None) -> list[str]:
    if split is None:
        return []
    told = []
    if not _is_there(split.manifest):
        told.append(f"no validation manifest at {split.manifest} ({_SHARDS})")
    if split.annotations is not None and not _is_there(split.annotations):
        told.append(f"no validation annotations at {split.annotations}")
    return [*told, _VALIDATION] if told else []


def _is_there(location: str) -> bool:
    """True also of what is not on this machine's disk: that is asked when it is read."""
    return ":" in location.partition("/")[0] or is_remote(location) or Path(location).exists()
