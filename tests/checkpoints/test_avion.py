"""AVION's checkpoints compute what AVION computes: its layout's forward pass, written out here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "inference"))
import published_layouts as published

from lightning_modules.checkpoints import load_clip_checkpoint
from lightning_modules.checkpoints.conversion import load_model
from lightning_modules.checkpoints.loading import LoadReport
from lightning_modules.models import PRESETS, DualEncoder, DualEncoderConfig, ModelConfig

HEADS = 2


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention, head by head, (B, S, D)."""
    width = q.shape[-1] // HEADS
    heads = []
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        scores = q[..., part] @ k[..., part].transpose(1, 2) / width**0.5
        scores = scores if mask is None else scores.masked_fill(mask, float("-inf"))
        heads.append(scores.softmax(dim=-1) @ v[..., part])
    return torch.cat(heads, dim=-1)


class AvionForward:
    """What `avion/models/transformer.py` computes, by its keys (FlashAttention's in the video)."""

    def __init__(self, state: dict[str, Tensor], activation: Callable[[Tensor], Tensor]) -> None:
        self.state = {key.removeprefix("module."): value.double() for key, value in state.items()}
        self.activation = activation

    def norm(self, x: Tensor, key: str, eps: float) -> Tensor:
        weight = self.state[f"{key}.weight"]
        return F.layer_norm(x, weight.shape, weight, self.state[f"{key}.bias"], eps)

    def linear(self, x: Tensor, key: str) -> Tensor:
        return x @ self.state[f"{key}.weight"].t() + self.state[f"{key}.bias"]

    def blocks(self, x: Tensor, tower: str, qkv: str, eps: float, mask: Tensor | None) -> Tensor:
        for i in range(2):
            key = f"{tower}.transformer.resblocks.{i}"
            weight = self.state[f"{key}.attn.{qkv}weight"]
            bias = self.state[f"{key}.attn.{qkv}bias"]
            mixed = self.norm(x, f"{key}.ln_1", eps) @ weight.t() + bias
            attended = attention(*mixed.chunk(3, dim=-1), mask)
            x = x + self.linear(attended, f"{key}.attn.out_proj")
            fc1, fc2 = (
                ("c_fc", "c_proj") if f"{key}.mlp.c_fc.weight" in self.state else ("fc1", "fc2")
            )
            hidden = self.activation(
                self.linear(self.norm(x, f"{key}.ln_2", eps), f"{key}.mlp.{fc1}")
            )
            x = x + self.linear(hidden, f"{key}.mlp.{fc2}")
        return x

    def video(self, video: Tensor) -> Tensor:
        side, state = 8, self.state
        batch, _, frames, height, width = video.shape
        patches = [
            video[:, :, t, row : row + side, column : column + side].reshape(batch, -1)
            for t in range(frames)
            for row in range(0, height, side)
            for column in range(0, width, side)
        ]
        x = torch.stack(patches, dim=1) @ state["visual.conv1.weight"].t()
        spatial, temporal = (
            state["visual.positional_embedding"],
            state["visual.temporal_embedding"],
        )
        per_frame = len(patches) // frames
        x = x + spatial[1:].repeat(frames, 1) + temporal.repeat_interleave(per_frame, dim=0)
        first = (state["visual.class_embedding"] + spatial[0]).expand(batch, 1, -1)
        x = self.norm(torch.cat((first, x), dim=1), "visual.ln_pre", 1e-6)
        x = self.blocks(x, "visual", "Wqkv.", 1e-6, None)[:, 0]
        x = self.norm(x, "visual.ln_post", 1e-6) @ state["visual.image_projection"]
        return x / x.norm(dim=-1, keepdim=True)

    def text(self, tokens: Tensor) -> Tensor:
        state, length = self.state, tokens.shape[1]
        x = state["textual.token_embedding.weight"][tokens] + state["textual.positional_embedding"]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.blocks(x, "textual", "in_proj_", 1e-5, mask)
        x = self.norm(x, "textual.ln_final", 1e-5)[torch.arange(len(x)), tokens.argmax(dim=1)]
        x = x @ state["textual.text_projection"]
        return x / x.norm(dim=-1, keepdim=True)


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


@pytest.fixture
def published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint as AVION's trainer writes it, of a size that the presets know."""
    monkeypatch.setitem(PRESETS, "vit_for_this_test", published.VIT)
    path = tmp_path / "avion.pt"
    torch.save(published.avion(published.random_model(published.VIT)), path)
    return path


def features(model: DualEncoder) -> tuple[Tensor, Tensor]:
    video, tokens = published.example()
    model = model.double()
    with torch.inference_mode():
        return model.encode_video(video.double()), model.encode_text(tokens)


def test_features_are_those_of_avions_forward_pass(published_file: Path) -> None:
    state = torch.load(published_file, weights_only=False)["state_dict"]
    video, tokens = published.example()
    loaded = load_model(published_file)
    ours = features(loaded.model)
    theirs = AvionForward(state, F.gelu)
    # float64 on both sides; another epsilon (1e-5 for 1e-6) moves features by about 1e-6
    for found, expected in zip(
        ours, (theirs.video(video.double()), theirs.text(tokens)), strict=True
    ):
        assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    otherwise = AvionForward(state, quick_gelu)
    assert not torch.allclose(ours[0], otherwise.video(video.double()), rtol=0, atol=1e-4)
    assert not torch.allclose(ours[1], otherwise.text(tokens), rtol=0, atol=1e-4)
    assert any("vision.activation=gelu" in told for told in loaded.assumed)
    assert not any("quick_gelu" in told for told in loaded.assumed)


@pytest.mark.parametrize(
    ("layout", "is_told"),
    [(published.avion, True), (published.openai, False)],
    ids=["avion", "openai"],
)
def test_a_model_that_computes_otherwise_is_told(caplog, layout, is_told: bool) -> None:
    def load(config: DualEncoderConfig) -> LoadReport:
        return load_clip_checkpoint(
            layout(published.random_model(published.VIT)), DualEncoder(config)
        )

    report = load(published.VIT)
    assert bool(report.differs) == is_told
    assert ("vision.norm_eps is 1e-05 here, 1e-06 there" in caplog.text) == is_told
    assert ("NOT as the checkpoint was trained" in report.summary()) == is_told


def test_a_recipe_sets_activation_and_epsilon() -> None:
    config = ModelConfig(preset="clip_vit_base_16", activation="gelu", norm_eps=1e-6).resolve()
    assert (config.vision.activation, config.vision.norm_eps) == ("gelu", 1e-6)
    assert (config.text.activation, config.text.norm_eps) == ("gelu", 1e-5)
    preset = PRESETS["clip_vit_base_16"]
    kept = ModelConfig(preset="clip_vit_base_16", embed_dim=None).resolve()
    assert (kept.vision.activation, kept.text.activation) == ("quick_gelu", "quick_gelu")
    assert kept.vision.norm_eps == preset.vision.norm_eps
    with pytest.raises(ValueError, match="'relu'"):
        ModelConfig(activation="relu").resolve()


def test_avions_recipes_build_avions_model() -> None:
    from lightning_modules.checkpoints.model_config import read_config
    from lightning_modules.packaged import folder

    recipes = [
        *folder("configs").glob("*/avion_*.yaml"),
        folder("configs") / "mir/sms_code_base.yaml",
    ]
    assert len(recipes) >= 6
    for recipe in recipes:
        config = read_config(recipe)
        assert config.vision.activation == config.text.activation == "gelu", recipe
        assert config.vision.norm_eps == 1e-6, recipe
