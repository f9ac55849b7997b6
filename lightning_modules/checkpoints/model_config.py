"""Where a checkpoint's architecture comes from: a JSON file, a run's recipe, or its shapes."""

from __future__ import annotations

import dataclasses
import difflib
import json
import logging
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from yaml import YAMLError

from lightning_modules.models import (
    PRESETS,
    DualEncoderConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from lightning_modules.models.rerank import RerankConfig

log = logging.getLogger(__name__)

FORMAT = "eva02-at model"
_QUICK_GELU_NOTE = (
    "quick_gelu, as in OpenAI's models; for open_clip's LAION models add "
    "--set vision.activation=gelu --set text.activation=gelu"
)


def config_to_json(config: DualEncoderConfig, **about: Any) -> str:
    """Write a model's configuration, and what else is known about it, as JSON."""
    return json.dumps({"format": FORMAT, "model": dataclasses.asdict(config), **about}, indent=2)


def read_config(path: Path) -> DualEncoderConfig:
    """Read a model's configuration.

    Args:
        path: The JSON that `eva02-at convert` writes, or a recipe or a run's `config.yaml`.

    Raises:
        ValueError: it is neither, or a field is unknown or impossible.
    """
    if path.suffix != ".json":
        return _config_of_recipe(path)
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no model description ({error!r})") from None
    if not is_description(path):
        raise ValueError(f"{path} is no model description (it has no `vision` and `text`)")
    model = _model_in(content)
    return _dataclass_of(DualEncoderConfig, model, str(path))


def describes_classifier(path: Path | None) -> bool:
    """True for what describes a classifier of actions: a recipe of recognition, or its JSON."""
    if path is None:
        return False
    if path.suffix == ".json":
        return "num_classes" in json.loads(path.read_text())
    return _module_class(path) == "lightning_modules.recognition.RecognitionModule"


def describes_reranker(path: Path | None) -> bool:
    """True for a recipe of a re-ranker, which is no model by itself."""
    if path is None or path.suffix == ".json":
        return False
    return _module_class(path) == "lightning_modules.rerank.RerankModule"


def read_rerank_config(path: Path) -> RerankConfig:
    """The head in a recipe of a re-ranker.

    Raises:
        ValueError: A field is unknown or impossible.
    """
    section = OmegaConf.select(OmegaConf.load(path), "model.init_args.reranker")
    values = {} if section is None else OmegaConf.to_container(section, resolve=True)
    return _dataclass_of(RerankConfig, values, str(path))


def _module_class(path: Path) -> str | None:
    return OmegaConf.select(OmegaConf.load(path), "model.class_path")


def is_description(path: Path) -> bool:
    """True for JSON that `convert` or `DualEncoder.save_pretrained` writes; others' is not ours."""
    try:
        return {"vision", "text"} <= set(_model_in(json.loads(path.read_text())))
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _model_in(content: Any) -> Any:
    """`convert` puts the model beside what is known of it, the Hub's mixin writes it alone."""
    return content.get("model", content)


def has_model_section(path: Path) -> bool:
    """True for a recipe that says which model it trains."""
    try:
        return _model_section(path) is not None
    except (OSError, ValueError):
        return False


def _model_section(path: Path) -> dict[str, Any] | None:
    try:
        recipe = OmegaConf.load(path)
        section = OmegaConf.select(recipe, "model.init_args.model")  # interpolations resolved
        return OmegaConf.to_container(section, resolve=True) if OmegaConf.is_dict(section) else None  # type: ignore[return-value]
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} cannot be read: {error}") from None


def _config_of_recipe(path: Path) -> DualEncoderConfig:
    section = _model_section(path)
    if section is None:
        raise ValueError(
            f"{path} has no section model.init_args.model; give a run's config.yaml, a recipe, or "
            "the JSON that `eva02-at convert` writes"
        )
    return _dataclass_of(ModelConfig, section, str(path)).resolve()


def _dataclass_of(kind: type, values: Any, where: str) -> Any:
    """Build a (nested) configuration, refusing unknown fields by name."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: {values!r} given, where fields with values are expected")
    hints = typing.get_type_hints(kind)
    fields = {}
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{where}: {_unknown(name, hints)}")
        nested = dataclasses.is_dataclass(hints[name])
        fields[name] = _dataclass_of(hints[name], value, where) if nested else value
    try:
        return kind(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def _unknown(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known)
    return f"unknown field {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def with_settings(config: DualEncoderConfig, settings: Iterable[str]) -> DualEncoderConfig:
    """Replace fields given as `vision.temporal=rotary`.

    Raises:
        ValueError: a setting is malformed, or its field unknown.
    """
    for setting in settings:
        name, separator, value = setting.partition("=")
        if not separator:
            raise ValueError(f"setting {setting!r} must read FIELD=VALUE")
        content = dataclasses.asdict(config)
        parts = name.split(".")
        place = content
        for part in parts[:-1]:
            place = place.get(part, {}) if isinstance(place.get(part), dict) else {}
        if parts[-1] not in place or isinstance(place[parts[-1]], dict):
            fields = [*content["vision"], *content["text"], *content]
            raise ValueError(
                f"setting {setting!r}: {_unknown(parts[-1], fields)} Fields lie under `vision.`, "
                "`text.`, or at the top, as in the JSON that `eva02-at convert` writes."
            )
        place[parts[-1]] = _parse(value, place[parts[-1]], setting)
        config = _dataclass_of(DualEncoderConfig, content, f"setting {setting!r}")
    return config


def _parse(value: str, current: Any, setting: str) -> Any:
    if isinstance(current, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError(f"setting {setting!r}: {value!r} is no number, true, false or null") from (
            None
        )


def for_inference(config: DualEncoderConfig) -> DualEncoderConfig:
    """Drop what only matters in training, and let the machine at hand choose its attention."""
    vision = dataclasses.replace(config.vision, patch_dropout=0.0, drop_path=0.0)
    return dataclasses.replace(
        config, vision=vision, attention_backend="auto", activation_checkpointing=False
    )


def guess_config(
    tensors: Mapping[str, Tensor], settings: Mapping[str, str | float] | None = None
) -> tuple[DualEncoderConfig, list[str]]:
    """Tell the architecture from the shapes of a published checkpoint.

    Shapes do not tell the number of heads, the activation or rotary time: they are those of the
    preset of this size, but for what the layout itself tells.

    Args:
        tensors: In this project's keys, as `checkpoints.layouts.translate` returns them.
        settings: What the layout tells, of the same source.

    Returns:
        The configuration, and what had to be assumed.

    Raises:
        ValueError: a tower is missing, or no preset has this size.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    try:
        size = _size_of(shapes)
        found = next((p for p in PRESETS.values() if _size_of_config(p) == size), None)
        if found is None:
            described = ", ".join(f"{name} {value}" for name, value in size.items())
            raise ValueError(
                f"no preset has its size ({described}); name its configuration with --config "
                "(a run's config.yaml, or a JSON as `eva02-at convert` writes it)"
            )
        return _fill(found, shapes, settings or {})
    except KeyError as error:
        raise ValueError(
            f"it lacks {error.args[0]}; a whole dual encoder (video and text tower) is expected"
        ) from None


def _size_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    width, _, patch, _ = shapes["visual.patch_embed.weight"]
    return {
        "architecture": "eva02" if "visual.blocks.0.attn.norm.weight" in shapes else "clip",
        "patch": patch,
        "width": width,
        "depth": _depth(shapes, "visual"),
        "text width": shapes["text.token_embedding.weight"][1],
        "text depth": _depth(shapes, "text"),
    }


def _size_of_config(config: DualEncoderConfig) -> dict[str, Any]:
    vision, text = config.vision, config.text
    return {
        "architecture": vision.architecture,
        "patch": vision.patch_size,
        "width": vision.width,
        "depth": vision.depth,
        "text width": text.width,
        "text depth": text.depth,
    }


def _depth(shapes: Mapping[str, tuple[int, ...]], tower: str) -> int:
    return len({key.split(".")[2] for key in shapes if key.startswith(f"{tower}.blocks.")})


def _fill(
    preset: DualEncoderConfig,
    shapes: Mapping[str, tuple[int, ...]],
    settings: Mapping[str, str | float],
) -> tuple[DualEncoderConfig, list[str]]:
    """Give a preset the resolution, frames and shared dimension of the file."""
    assumed = []
    vision: VisionConfig = preset.vision
    side = round((shapes["visual.pos_embed"][1] - 1) ** 0.5)
    frames = shapes.get("visual.temporal_embed", (vision.num_frames,))[0]
    temporal = vision.temporal
    if "visual.temporal_embed" in shapes:
        if vision.architecture == "eva02":
            assumed.append(
                f"vision.temporal={temporal} (shapes do not tell whether time rotates too)"
            )
    else:
        assumed.append(
            f"vision.temporal={temporal} with a temporal embedding of zero (the file has none), "
            f"vision.num_frames={frames}"
        )
    if settings:
        told = ", ".join(f"{name}={value}" for name, value in settings.items())
        assumed.append(f"{told}, which come with the file's layout")
    elif vision.activation == "quick_gelu":
        assumed.append(f"vision.activation and text.activation are {_QUICK_GELU_NOTE}")
    vision = dataclasses.replace(vision, image_size=side * vision.patch_size, num_frames=frames)
    text: TextConfig = dataclasses.replace(
        preset.text,
        vocab_size=shapes["text.token_embedding.weight"][0],
        context_length=shapes["text.positional_embedding"][0],
    )
    embed_dim = shapes["text.head.weight"][0]
    config = dataclasses.replace(preset, vision=vision, text=text, embed_dim=embed_dim)
    return with_settings(config, [f"{name}={value}" for name, value in settings.items()]), assumed


def warn_of_frames(vision: VisionConfig, num_frames: int, trained: int) -> None:
    """Say where a model meets frame indices that it was not trained on.

    Four frames' model takes sixteen for a longer clip, not for a finer one, and most of what it
    knew of verbs and nouns is lost (docs/long_clips.md). An image model knows no indices at all.

    Args:
        vision: The tower as it will run.
        num_frames: Frames of the clips that it will see.
        trained: Frames that it was made for.
    """
    turned = vision.rotation in ("rotary", "split") and vision.reference_frames is None
    if turned and num_frames != trained > 1:
        log.warning(
            "a model of %d frames gets %d at frame indices, as if the clip were longer: "
            "--set vision.reference_frames=%d --set vision.time_scaling=centred fits them",
            *(trained, num_frames, trained),
        )
