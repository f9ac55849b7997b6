"""Re-rankers that were trained: read, and held to the dual encoder they belong to."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from lightning_modules.checkpoints.model_config import (
    describes_reranker,
    for_inference,
    read_rerank_config,
)
from lightning_modules.checkpoints.source import find_checkpoint
from lightning_modules.models import DualEncoder, DualEncoderConfig
from lightning_modules.models.rerank import ReRanker, fingerprint


def load_reranker(path: str | Path, dual: DualEncoder) -> ReRanker:
    """Load the re-ranker of a dual encoder, in evaluation mode, fp32, on the CPU.

    Args:
        path: A run of a recipe of `configs/rerank`, or one of its checkpoints.
        dual: The dual encoder that finds the candidates, in float32.

    Raises:
        FileNotFoundError: Nothing is there.
        ValueError: It is no re-ranker, or another dual encoder's.
    """
    source = find_checkpoint(path)
    if source.config is None or not describes_reranker(source.config):
        raise ValueError(
            f"{source.path} is no re-ranker: give a run of a recipe of configs/rerank, or one of "
            "its checkpoints"
        )
    head = read_rerank_config(source.config)
    reranker = ReRanker(head, dual.config)
    try:
        reranker.load_state_dict(source.read())
    except RuntimeError as error:
        told = " ".join(line.strip() for line in str(error).splitlines()[1:3])
        raise ValueError(
            f"re-ranker {source.path} does not fit the dual encoder or its own config.yaml: {told}"
        ) from None
    check_same_encoder(reranker, fingerprint(dual), "the checkpoint to evaluate")
    return reranker.eval()


def check_same_encoder(reranker: ReRanker, own: Tensor, where: str) -> None:
    """Refuse tokens of another encoder than the head was trained on.

    Args:
        reranker: The head.
        own: `fingerprint` of the encoder at hand.
        where: Names that encoder.

    Raises:
        ValueError: They are another's.
    """
    trained = reranker.fingerprint.cpu()
    if not torch.equal(trained, own):
        names = [bytes(part[:4].tolist()).hex() for part in (trained, own)]
        raise ValueError(
            f"the re-ranker was trained on the dual encoder {names[0]}..., and {where} is "
            f"{names[1]}...: other weights, whose patches and words it cannot read. Give the "
            "checkpoint that its recipe names as dual_checkpoint (that very step), or train a "
            "re-ranker on this one"
        )


def check_architecture(expected: DualEncoderConfig, found: DualEncoderConfig, where: str) -> None:
    """Refuse a dual encoder of another shape than a recipe's.

    Raises:
        ValueError: A field differs; the first is named.
    """
    one, other = (dataclasses.asdict(for_inference(config)) for config in (expected, found))
    for part in ("vision", "text"):
        for name, value in one[part].items():
            if other[part][name] != value:
                raise ValueError(
                    f"the recipe's model has {part}.{name} {value}, and the dual encoder of "
                    f"{where} has {other[part][name]}; its own recipe says what to set in "
                    "model.init_args.model"
                )
