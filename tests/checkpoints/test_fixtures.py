"""Random-weight outputs of timm's and open_clip's own classes, reproduced from their files.

Tolerances are those of fp32 arithmetic in another order (1e-5) and, in fp64, of rotary tables
that the other side had rounded to fp32 (1e-6).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoints import load_clip_checkpoint
from lightning_modules.models import DualEncoder, DualEncoderConfig, TextConfig, VisionConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
TINY_TEXT = TextConfig(context_length=8, vocab_size=16, width=16, depth=1, num_heads=1)
TINY_VISION = VisionConfig(
    image_size=8, patch_size=4, width=16, depth=1, num_heads=1, mlp_hidden=16, num_frames=1
)


def load_fixture(name: str) -> dict:
    return torch.load(FIXTURES / name, weights_only=True)


def as_still_clip(image: torch.Tensor) -> torch.Tensor:
    return image[:, :, None]


def renamed(state: dict, key_map: dict) -> dict:
    return {key_map[key]: tensor for key, tensor in state.items()}


@pytest.fixture(scope="module")
def timm_cases() -> dict:
    cases = load_fixture("eva02_micro_timm.pt")["cases"]
    large, other = cases["large_flags"], cases["large336_flags"]
    other["state_dict"] = {**large["state_dict"], **other["state_dict"]}
    return cases


@pytest.mark.parametrize("layout", ["timm", "baai"])
@pytest.mark.parametrize("name", ["base_flags", "large_flags", "large336_flags"])
def test_eva02_vision_tower(timm_cases: dict, name: str, layout: str) -> None:
    case = timm_cases[name]
    c = case["config"]
    vision = VisionConfig(
        image_size=c["img_size"],
        patch_size=c["patch_size"],
        width=c["embed_dim"],
        depth=c["depth"],
        num_heads=c["num_heads"],
        mlp_hidden=c["mlp_hidden"],
        num_frames=4,
    )
    model = DualEncoder(DualEncoderConfig(vision, TINY_TEXT, c["num_classes"])).eval()
    state = case["state_dict"]
    if layout == "baai":
        state = {
            "rope.freqs_cos": torch.ones(1),
            "blocks.0.attn.rope.freqs_sin": torch.ones(1),
            **renamed(state, case["key_map_timm_to_baai"]),
        }
    report = load_clip_checkpoint(state, model)
    assert not report.interpolated and not report.reinitialised
    assert all("rope" in key for key in report.ignored)
    assert "visual.temporal_embed" in report.missing
    video = as_still_clip(case["input"])
    torch.testing.assert_close(model.visual(video), case["output"], rtol=0, atol=1e-5)
    exact = model.double().visual(video.double())
    torch.testing.assert_close(exact, case["output_fp64"], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "output"), [("gelu", "output"), ("quick_gelu", "output_quickgelu")]
)
def test_text_tower(activation: str, output: str) -> None:
    fixture = load_fixture("clip_text_micro_openclip.pt")
    c = fixture["config"]
    text = TextConfig(
        context_length=c["context_length"],
        vocab_size=c["vocab_size"],
        width=c["width"],
        depth=c["layers"],
        num_heads=c["heads"],
        mlp_ratio=c["mlp_ratio"],
        activation=activation,
        norm_eps=c["ln_eps"],
    )
    model = DualEncoder(DualEncoderConfig(TINY_VISION, text, c["output_dim"])).eval()
    report = load_clip_checkpoint(fixture["state_dict"], model)
    assert not report.ignored
    features = model.text(fixture["tokens"])
    torch.testing.assert_close(features, fixture[output], rtol=0, atol=1e-5)
    if activation == "gelu":
        exact = model.double().text(fixture["tokens"])
        torch.testing.assert_close(exact, fixture["output_fp64"], rtol=0, atol=1e-9)


def dual_encoder_of(fixture: dict) -> DualEncoder:
    v, t = fixture["vision_cfg"], fixture["text_cfg"]
    vision = VisionConfig(
        image_size=v["image_size"],
        patch_size=v["patch_size"],
        width=v["embed_dim"],
        depth=v["depth"],
        num_heads=v["num_heads"],
        mlp_hidden=v["mlp_hidden"],
        num_frames=1,
    )
    text = TextConfig(
        context_length=t["context_length"],
        vocab_size=t["vocab_size"],
        width=t["width"],
        depth=t["layers"],
        num_heads=t["heads"],
    )
    return DualEncoder(DualEncoderConfig(vision, text, fixture["embed_dim"])).eval()


@pytest.mark.parametrize("layout", ["open_clip", "baai"])
def test_dual_encoder(layout: str) -> None:
    fixture = load_fixture("clip_micro_openclip.pt")
    state = fixture["state_dict"]
    if layout == "baai":
        state = renamed(state, fixture["key_map_openclip_to_baai"])
    model = dual_encoder_of(fixture)
    report = load_clip_checkpoint(state, model)
    assert sorted(report.used) == sorted(state)
    assert report.missing == ["visual.temporal_embed"]
    video = as_still_clip(fixture["image"])
    torch.testing.assert_close(model.visual(video), fixture["image_features"], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        model.text(fixture["tokens"]), fixture["text_features"], rtol=0, atol=1e-5
    )
    video_embedding, text_embedding, scale = model(video, fixture["tokens"])
    torch.testing.assert_close(video_embedding, fixture["image_features_norm"], rtol=0, atol=1e-5)
    torch.testing.assert_close(text_embedding, fixture["text_features_norm"], rtol=0, atol=1e-5)
    logits = scale * video_embedding @ text_embedding.t()
    torch.testing.assert_close(logits, fixture["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "visual."])
@pytest.mark.parametrize(
    ("output", "activation", "eps"),
    [
        ("gelu_eps1e-5", "gelu", 1e-5),
        ("quickgelu_eps1e-5", "quick_gelu", 1e-5),
        ("gelu_eps1e-6", "gelu", 1e-6),
    ],
)
def test_clip_vit(output: str, activation: str, eps: float, prefix: str) -> None:
    fixture = load_fixture("vit_micro_openclip.pt")
    c = fixture["config"]
    vision = VisionConfig(
        image_size=c["image_size"],
        patch_size=c["patch_size"],
        width=c["width"],
        depth=c["layers"],
        num_heads=c["heads"],
        mlp_hidden=int(c["width"] * c["mlp_ratio"]),
        architecture="clip",
        activation=activation,
        norm_eps=eps,
        temporal="learnable",
        num_frames=1,
    )
    model = DualEncoder(DualEncoderConfig(vision, TINY_TEXT, c["output_dim"])).eval()
    state = {prefix + key: tensor for key, tensor in fixture["state_dict"].items()}
    report = load_clip_checkpoint(state, model)
    assert not report.ignored
    features = model.visual(as_still_clip(fixture["input"]))
    torch.testing.assert_close(features, fixture["outputs"][output], rtol=0, atol=1e-5)


def test_more_frames_of_one_image_model(timm_cases: dict) -> None:
    """At T = 1 every temporal mode is the image model, because P_t starts at zero and t is 0."""
    case = timm_cases["base_flags"]
    c = case["config"]
    base = VisionConfig(
        image_size=c["img_size"],
        patch_size=c["patch_size"],
        width=c["embed_dim"],
        depth=c["depth"],
        num_heads=c["num_heads"],
        mlp_hidden=c["mlp_hidden"],
    )
    video = as_still_clip(case["input"])
    for temporal in ("none", "learnable", "rotary", "both"):
        vision = replace(base, temporal=temporal, num_frames=3)
        model = DualEncoder(DualEncoderConfig(vision, TINY_TEXT, c["num_classes"])).eval()
        load_clip_checkpoint(case["state_dict"], model)
        torch.testing.assert_close(model.visual(video), case["output"], rtol=0, atol=1e-5)
