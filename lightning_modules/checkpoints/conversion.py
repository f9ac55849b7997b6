"""One door to trained models: any checkpoint in, a model ready for use out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from datamodules.files import write_whole
from lightning_modules.checkpoints import LoadReport, load_clip_checkpoint
from lightning_modules.checkpoints.layouts import translate
from lightning_modules.checkpoints.model_config import (
    config_to_json,
    describes_classifier,
    describes_reranker,
    for_inference,
    guess_config,
    read_config,
    warn_of_frames,
    with_settings,
)
from lightning_modules.checkpoints.source import CheckpointSource, find_checkpoint
from lightning_modules.models import DualEncoder, DualEncoderConfig, VideoClassifier
from lightning_modules.models.towers import Towers

# An image checkpoint has no time; a temperature is of no use at inference.
_MAY_BE_MISSING = {"visual.temporal_embed", "logit_scale"}
_TIME_ATTENTION = (".timeattn.", ".norm3.")


@dataclass
class Loaded:
    """A model in evaluation mode, and where it came from.

    Attributes:
        model: The model, fp32, on the CPU.
        config: What rebuilds it.
        source: The checkpoint found.
        report: What was used of it.
        assumed: What the checkpoint does not tell and was assumed.
        parts: Of an interpolated model, the checkpoints it lies between, and their weights.
    """

    model: Towers
    config: DualEncoderConfig
    source: CheckpointSource
    report: LoadReport
    assumed: list[str] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)

    def model_hash(self) -> str:
        """SHA-256 over configuration and weights: equal where the embeddings are."""
        digest = hashlib.sha256(config_to_json(self.config).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


@dataclass
class LoadedModel(Loaded):
    """A dual encoder."""

    model: DualEncoder


@dataclass
class LoadedClassifier(Loaded):
    """A video tower with a head of its own."""

    model: VideoClassifier


def load_model(path: str | Path, **how: Any) -> LoadedModel:
    """Load a dual encoder, as `load_trained` does.

    Raises:
        ValueError: The checkpoint is a classifier.
    """
    loaded = load_trained(path, **how)
    if isinstance(loaded, LoadedClassifier):
        raise ValueError(
            f"checkpoint {loaded.source.path} names one of {loaded.model.num_classes} classes and "
            "keeps no text tower: it has no embeddings. Its figures: `eva02-at evaluate "
            "--benchmark ek100_cls`."
        )
    return loaded


def load_trained(
    path: str | Path,
    *,
    config: str | Path | None = None,
    settings: Sequence[str] = (),
    average: bool = False,
    drop_time_attention: bool = False,
) -> LoadedModel | LoadedClassifier:
    """Load a checkpoint of any supported kind into the model that it describes.

    The architecture comes from `config`, else from what lies beside the checkpoint (the JSON that
    `eva02-at convert` writes, a run's `config.yaml`), else from the shapes in it.

    Args:
        path: See `find_checkpoint`.
        config: A JSON or recipe that describes the model.
        settings: `vision.num_frames=16` and the like, over all of these.
        average: Take the run's moving average of the weights.
        drop_time_attention: Read LaViLa's TimeSformer as an image model, without its attention
            over time: a point to start from, not LaViLa's features.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: it is incomplete, unsafe to read, or does not fit the architecture.
    """
    source = find_checkpoint(path)
    if describes_reranker(source.config):
        raise ValueError(
            f"{source.path} is a re-ranker, which is no model by itself: give its dual encoder as "
            "the checkpoint, and this with `evaluate --rerank`"
        )
    tensors = source.read(average=average)
    tensors = _without_time_attention(tensors, drop_time_attention, source.path)
    described = Path(config) if config is not None else source.config
    assumed: list[str] = []
    try:
        if described is not None:
            architecture = read_config(described)
        else:
            translated = translate(tensors)
            architecture, assumed = guess_config(translated.tensors, translated.settings)
    except ValueError as error:
        raise ValueError(f"checkpoint {source.path}: {error}") from None
    trained = architecture.vision.num_frames
    architecture = for_inference(with_settings(architecture, settings))
    warn_of_frames(architecture.vision, architecture.vision.num_frames, trained)
    num_classes = _num_classes(tensors) if describes_classifier(described) else None
    model = _empty_model(architecture, num_classes)
    try:
        report = load_clip_checkpoint(tensors, model)
    except ValueError as error:
        told = str(error).replace("the given mapping", f"checkpoint {source.path}")
        raise ValueError(told) from None
    _check_nothing_is_random(report, source.path)
    where = architecture, source, report, assumed
    if isinstance(model, VideoClassifier):
        return LoadedClassifier(model.eval(), *where)
    return LoadedModel(model.eval(), *where)


def _num_classes(tensors: Mapping[str, Tensor]) -> int:
    head = tensors.get("visual.head.weight")
    if head is None:
        raise ValueError("the checkpoint of a classifier lacks its head (visual.head.weight)")
    return len(head)


def _empty_model(
    config: DualEncoderConfig, num_classes: int | None = None
) -> DualEncoder | VideoClassifier:
    """Build a model whose parameters are about to be read: to draw them at random takes seconds."""
    with torch.device("meta"):
        model = VideoClassifier(config, num_classes) if num_classes else DualEncoder(config)
    assert not list(model.buffers()), "a buffer would be left undefined"
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(math.log(1 / 0.07) if name == "logit_scale" else 0.0)
    return model


def _without_time_attention(
    tensors: dict[str, Tensor], drop: bool, path: Path
) -> dict[str, Tensor]:
    """LaViLa's TimeSformer divides time and space; our encoders attend to both at once."""
    divided = [key for key in tensors if any(mark in key for mark in _TIME_ATTENTION)]
    if divided and not drop:
        raise ValueError(
            f"checkpoint {path} is a TimeSformer with divided attention over time and space "
            f"({divided[0]}), which the encoders here cannot compute. --drop-time-attention reads "
            "its image and text weights as a point to start from; features differ from LaViLa's."
        )
    kept = {key: value for key, value in tensors.items() if key not in set(divided)}
    if divided:  # (1, T, D) there
        kept = {k: v[0] if k.endswith("temporal_embed") else v for k, v in kept.items()}
    return kept


def _check_nothing_is_random(report: LoadReport, path: Path) -> None:
    random = [key for key in report.missing if key not in _MAY_BE_MISSING] + report.reinitialised
    if random:
        shown = ", ".join(random[:4]) + (f" and {len(random) - 4} more" if len(random) > 4 else "")
        raise ValueError(
            f"checkpoint {path} lacks {shown}, which would stay random. A file to start training "
            "from goes into a recipe as model.init_args.init_checkpoint."
        )


def save_model(loaded: Loaded, output: str | Path) -> Path:
    """Write a model as safetensors, and beside it the JSON that rebuilds it.

    Each file appears whole or not at all; the weights, which a reader looks for, last.

    Args:
        loaded: The model.
        output: `NAME.safetensors`; the description becomes `NAME.json`.

    Returns:
        Path of the JSON.

    Raises:
        ValueError: the output has another suffix.
    """
    output = Path(output)
    if output.suffix != ".safetensors":
        raise ValueError(f"output {output} must end in .safetensors")
    about: dict[str, Any] = {
        "source": loaded.source.path.name,
        "step": loaded.source.step,
        "assumed": loaded.assumed,
    }
    if loaded.parts:
        about["parts"] = loaded.parts
    if isinstance(loaded.model, VideoClassifier):
        about["num_classes"] = loaded.model.num_classes
    description = output.with_suffix(".json")
    write_whole(
        description, lambda path: path.write_text(config_to_json(loaded.config, **about) + "\n")
    )
    tensors = {k: v.detach().contiguous() for k, v in loaded.model.state_dict().items()}
    write_whole(output, lambda path: save_file(tensors, path, metadata={"format": "pt"}))
    return description
