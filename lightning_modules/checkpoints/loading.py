"""Loading of published and own checkpoints into a `DualEncoder`."""

from __future__ import annotations

import argparse
import errno
import logging
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from lightning_modules.checkpoints.layouts import Translation, translate, unwrap
from lightning_modules.checkpoints.plain_data import first_line, foreign_content
from lightning_modules.models import DualEncoderConfig
from lightning_modules.models.interpolate import interpolate_spatial, interpolate_temporal
from lightning_modules.models.towers import Towers
from lightning_modules.training.run.checkpoint_store import read_safetensors

_log = logging.getLogger(__name__)
_BLOCK = re.compile(r"^(visual|text)\.blocks\.(\d+)\.")
_HEADS = ("visual.head.weight", "visual.head.bias", "text.head.weight")
# Image checkpoints have no time, and towers without a projection are published too.
_MAY_BE_MISSING = ("visual.temporal_embed", *_HEADS)


@dataclass
class LoadReport:
    """What became of a checkpoint.

    Attributes:
        used: Keys of the checkpoint whose tensors were loaded.
        ignored: Keys of the checkpoint that mean nothing to this model.
        missing: Parameters of the model that the checkpoint does not hold; they keep their values.
        interpolated: Parameters resampled to the model's frames or grid, with both shapes.
        reinitialised: Projections that keep the model's fresh values, because the checkpoint's
            are for another shared dimension.
        differs: What the checkpoint's layout says of the model and the model does not do, such as
            another activation. Nothing fails by it, and features are not the publisher's.
    """

    used: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    interpolated: dict[str, str] = field(default_factory=dict)
    reinitialised: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """One line for a run's log."""
        parts = [f"{len(self.used)} tensors loaded"]
        if self.interpolated:
            changes = (f"{name} {change}" for name, change in self.interpolated.items())
            parts.append("resampled: " + ", ".join(changes))
        for title, names in (
            ("fresh, for the new shared dimension", self.reinitialised),
            ("not in the checkpoint", self.missing),
            ("ignored", self.ignored),
            ("NOT as the checkpoint was trained", self.differs),
        ):
            if names:
                parts.append(f"{title}: {_some(names)}")
        return "; ".join(parts)


def load_clip_checkpoint(
    source: str | PathLike[str] | Mapping[str, object], model: Towers
) -> LoadReport:
    """Load a CLIP-like checkpoint into a model, in place.

    BAAI's, open_clip's and timm's EVA02, OpenAI's and open_clip's ViT, AVION's ViT, and this
    project's own; whole models or one tower; wrapped in `state_dict`, `model` or `module` and with
    a `module.` prefix or without; any float type. Rotary tables are rebuilt, never loaded.
    Positions of another grid are resampled bicubically, those of another number of frames
    linearly. Projections to another shared dimension are left fresh.

    Args:
        source: A .pt/.pth/.bin/.ckpt file (read with weights_only=True; `argparse.Namespace`,
            which AVION and LaViLa store beside the weights, is allowed and dropped), a
            .safetensors file, or the content of one.
        model: Changed only if everything fits.

    Returns:
        What was used, ignored, missing, interpolated and reinitialised.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no checkpoint, is unsafe to read, or does not fit the model.
    """
    name = "the given mapping" if isinstance(source, Mapping) else f"checkpoint {source}"
    content = source if isinstance(source, Mapping) else read_checkpoint(source)
    try:
        found = translate(unwrap(content))
        loaded, report = _fit(found, model)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for key, tensor in loaded.items():
            parameters[key].copy_(tensor)
    report.differs = _differences(found.settings, model.config)
    for difference in report.differs:
        _log.warning("%s was trained otherwise: %s", name, difference)
    _log.info("%s: %s", name, report.summary())
    return report


def _differences(settings: Mapping[str, str | float], config: DualEncoderConfig) -> list[str]:
    """What a layout tells of a model (`vision.activation`) and this model has otherwise."""
    told = []
    for name, expected in settings.items():
        tower, field_name = name.split(".")
        found = getattr(getattr(config, tower), field_name)
        if found != expected:
            told.append(f"{name} is {found} here, {expected} there")
    return told


def read_checkpoint(path: str | PathLike[str]) -> object:
    """Read a file without running any code it may carry.

    Args:
        path: A .safetensors file, or whatever `torch.save` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read safely.
        OSError: if the storage fails.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "looks like a TorchScript archive": said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        told = foreign_content(path) or "is damaged"
        raise ValueError(
            f"checkpoint {path} {told}; it is not unpickled, because a pickle can run any code. If "
            "you trust where it comes from, save its state dict alone with torch.save or "
            "safetensors."
        ) from None
    except Exception as error:  # an unpickler's operations on any bytes raise anything
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise  # the storage's, which says nothing of the file; a bad seek is the file's
        if isinstance(error, MemoryError):
            raise
        told = f"{first_line(error)}. It may be cut short: compare its size with the publisher's."
        if "TorchScript" in str(error):  # torch's own words advise to read it unsafely
            told = (
                "it is a TorchScript program (OpenAI's original files are), which is not run "
                "here. If you trust where it comes from, take its weights out once: python -c "
                f"\"import torch; torch.save(torch.jit.load('{path}', 'cpu').state_dict(), "
                "'weights.pt')\""
            )
        raise ValueError(f"checkpoint {path} cannot be read: {told}") from None


def _fit(found: Translation, model: Towers) -> tuple[dict[str, Tensor], LoadReport]:
    """Fit the translated tensors to the model's parameters, or raise with everything wrong."""
    parameters = dict(model.named_parameters())
    _check_blocks(found, parameters)
    report = LoadReport(ignored=list(found.ignored))
    loaded: dict[str, Tensor] = {}
    wrong: list[str] = []
    for key, tensor in found.tensors.items():
        sources = found.sources[key]
        if key not in parameters:
            report.ignored.extend(s for s in sources if s not in report.ignored)
            continue
        target = parameters[key]
        if tensor.shape != target.shape:
            if _only_embed_dim_differs(key, tensor, target):
                report.reinitialised.append(key)
                report.ignored.extend(sources)
                continue
            resampled = _resample(key, tensor, target)
            if resampled is None:
                wrong.append(
                    f"{' + '.join(sources)} makes {key} {tuple(tensor.shape)}, "
                    f"the model has {tuple(target.shape)}"
                )
                continue
            report.interpolated[key] = f"{tuple(tensor.shape)} -> {tuple(target.shape)}"
            tensor = resampled
        loaded[key] = tensor
        report.used.extend(s for s in sources if s not in report.used)
    if wrong:
        raise ValueError(f"wrong shapes: {_some(wrong, '; ')}. Is it a checkpoint of this preset?")
    if not loaded:
        raise ValueError(f"no key fits this model; the file has {_some(report.ignored)}")
    report.missing = [k for k in parameters if k not in loaded and k not in report.reinitialised]
    _check_whole(found, report.missing)
    return loaded, report


def _check_whole(found: Translation, missing: list[str]) -> None:
    """A tower is in a checkpoint whole or not at all: a hole would be filled with noise."""
    for tower in ("visual", "text"):
        if not any(_BLOCK.match(key) for key in found.tensors if key.startswith(tower)):
            continue
        holes = [k for k in missing if k.startswith(tower) and k not in _MAY_BE_MISSING]
        if holes:
            raise ValueError(
                f"its {tower} tower lacks {_some(holes)}; the file is incomplete, or belongs to "
                "another architecture"
            )


def _check_blocks(found: Translation, parameters: Mapping[str, Tensor]) -> None:
    """Raise where a tower's blocks are of another number or another kind than the model's."""
    for tower in ("visual", "text"):
        theirs, ours = (
            {int(m[2]) for key in keys if (m := _BLOCK.match(key)) and m[1] == tower}
            for keys in (found.tensors, parameters)
        )
        if theirs and theirs != ours:
            raise ValueError(
                f"its {tower} tower has blocks {_ranges(theirs)}, the model's {_ranges(ours)}; "
                "build the preset this checkpoint belongs to"
            )
    unknown = [key for key in found.tensors if _BLOCK.match(key) and key not in parameters]
    if unknown:
        raise ValueError(
            f"its blocks hold {_some(unknown)}, which this model's do not have: it belongs to "
            "another architecture"
        )


def _ranges(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low}..{high}" + ("" if len(numbers) == high - low + 1 else " with gaps")


def _only_embed_dim_differs(key: str, tensor: Tensor, target: Tensor) -> bool:
    return key in _HEADS and tensor.dim() == target.dim() and tensor.shape[1:] == target.shape[1:]


def _resample(key: str, tensor: Tensor, target: Tensor) -> Tensor | None:
    """Resample positions in float32 at least; None where the shapes cannot be reconciled."""
    if tensor.shape[-1] != target.shape[-1]:
        return None
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if key == "visual.temporal_embed" and tensor.dim() == 2:
        return interpolate_temporal(tensor, target.shape[0])
    if key == "visual.pos_embed":
        rows = tensor.reshape(1, -1, tensor.shape[-1])
        return interpolate_spatial(rows, target.shape[1] - 1)
    return None


def _some(names: list[str], separator: str = ", ", limit: int = 6) -> str:
    shown = separator.join(names[:limit])
    return shown if len(names) <= limit else f"{shown}{separator}and {len(names) - limit} more"
