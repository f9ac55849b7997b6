"""What shapes tell of a checkpoint's architecture, and what is assumed beside them, in words."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_modules.checkpoints.model_config import guess_config
from lightning_modules.models import DualEncoder, DualEncoderConfig
from lightning_modules.models.config import PRESETS

QUICK = "vision.activation and text.activation are "


def tensors_of(config: DualEncoderConfig, *, temporal: bool) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        tensors = DualEncoder(config).state_dict()
    if not temporal:
        tensors.pop("visual.temporal_embed", None)
    return tensors


@pytest.mark.parametrize("temporal", [True, False])
@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_is_told_by_its_shapes(name: str, temporal: bool) -> None:
    preset = PRESETS[name]
    vision = replace(preset.vision, image_size=preset.vision.patch_size)
    vision = replace(vision, num_frames=7 if temporal else vision.num_frames)
    text = replace(preset.text, vocab_size=1000, context_length=33)
    config = replace(preset, vision=vision, text=text, embed_dim=24)
    found, assumed = guess_config(tensors_of(config, temporal=temporal))
    assert found == config
    kind = vision.temporal
    if not temporal:
        wanted = [
            f"vision.temporal={kind} with a temporal embedding of zero (the file has none), "
            f"vision.num_frames={vision.num_frames}"
        ]
    elif vision.architecture == "eva02":
        wanted = [f"vision.temporal={kind} (shapes do not tell whether time rotates too)"]
    else:
        wanted = []
    if vision.activation == "quick_gelu":
        assert assumed.pop().startswith(QUICK)
    assert assumed == wanted


def test_what_the_layout_tells_goes_before() -> None:
    preset = next(p for p in PRESETS.values() if p.vision.activation == "quick_gelu")
    told = {"vision.activation": "gelu", "vision.norm_eps": 1e-6}
    found, assumed = guess_config(tensors_of(preset, temporal=True), told)
    assert found == replace(preset, vision=replace(preset.vision, activation="gelu", norm_eps=1e-6))
    assert assumed == [
        "vision.activation=gelu, vision.norm_eps=1e-06, which come with the file's layout"
    ]


def test_no_preset_of_that_size() -> None:
    preset = PRESETS["eva02_at_base_16"]
    tensors = tensors_of(preset, temporal=True)
    last = {key: tensors.pop(key) for key in list(tensors) if ".blocks.11." in key}
    with pytest.raises(
        ValueError, match=r"\(architecture eva02, patch 16, width 768, depth 11, .*--config"
    ):
        guess_config(tensors)
    del tensors["text.head.weight"]
    tensors |= last
    with pytest.raises(ValueError, match=r"it lacks text\.head\.weight; a whole dual encoder"):
        guess_config(tensors)
