"""Our random models written the way others publish theirs: the inverse of the loaders' tables."""

from __future__ import annotations

import argparse
import re

import torch
from torch import Tensor

from lightning_modules.models import DualEncoder, DualEncoderConfig, TextConfig, VisionConfig

TEXT = TextConfig(context_length=77, vocab_size=49408, width=16, depth=2, num_heads=2)
EVA = DualEncoderConfig(
    VisionConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2, mlp_hidden=40),
    TEXT,
    embed_dim=12,
)
VIT = DualEncoderConfig(
    VisionConfig(
        image_size=16,
        patch_size=8,
        width=32,
        depth=2,
        num_heads=2,
        mlp_hidden=64,
        architecture="clip",
        activation="quick_gelu",
        temporal="learnable",
        norm_eps=1e-5,
    ),
    TEXT,
    embed_dim=12,
)


def random_model(config: DualEncoderConfig, seed: int = 1) -> DualEncoder:
    """Every parameter away from the value it is initialised with."""
    torch.manual_seed(seed)
    model = DualEncoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()


def example() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    video = torch.randn(2, 3, 4, 16, 16, generator=generator)
    return video, torch.randint(1, 49408, (2, 77), generator=generator)


def _state(model: DualEncoder) -> dict[str, Tensor]:
    return _rename(dict(model.state_dict()), [(r"\.attn\.qkv\.([qkv]_bias)$", r".attn.\1")])


def _rename(state: dict[str, Tensor], rules: list[tuple[str, str]]) -> dict[str, Tensor]:
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


def _fused_biases(state: dict[str, Tensor], tower: str, name: str) -> dict[str, Tensor]:
    """q_bias, k_bias, v_bias -> one bias."""
    fused = {k: v for k, v in state.items() if not (k.startswith(tower) and k[-6:] in _BIASES)}
    for key in [k for k in state if k.startswith(tower) and k.endswith("q_bias")]:
        stem = key.removesuffix("q_bias")
        parts = [state[stem + bias] for bias in _BIASES]
        fused[stem + name] = torch.cat(parts)
    return fused


_BIASES = ("q_bias", "k_bias", "v_bias")
_TEXT_TO_OPENAI = [
    (r"^text\.blocks\.", "text.transformer.resblocks."),
    (r"^(text\..*)\.norm([12])\.", r"\1.ln_\2."),
    (r"^(text\..*)\.attn\.qkv\.weight", r"\1.attn.in_proj_weight"),
    (r"^(text\..*)\.attn\.proj\.", r"\1.attn.out_proj."),
    (r"^(text\..*)\.mlp\.fc1\.", r"\1.mlp.c_fc."),
    (r"^(text\..*)\.mlp\.fc2\.", r"\1.mlp.c_proj."),
    (r"^text\.norm\.", "text.ln_final."),
    (r"^text\.head\.weight", "text.text_projection"),
]
_VISUAL_TO_OPENAI = [
    (r"^visual\.blocks\.", "visual.transformer.resblocks."),
    (r"^(visual\..*)\.norm([12])\.", r"\1.ln_\2."),
    (r"^(visual\..*)\.attn\.qkv\.weight", r"\1.attn.in_proj_weight"),
    (r"^(visual\..*)\.attn\.proj\.", r"\1.attn.out_proj."),
    (r"^(visual\..*)\.mlp\.fc1\.", r"\1.mlp.c_fc."),
    (r"^(visual\..*)\.mlp\.fc2\.", r"\1.mlp.c_proj."),
    (r"^visual\.norm\.", "visual.ln_post."),
    (r"^visual\.norm_pre\.", "visual.ln_pre."),
    (r"^visual\.head\.weight", "visual.proj"),
    (r"^visual\.cls_token", "visual.class_embedding"),
    (r"^visual\.pos_embed", "visual.positional_embedding"),
    (r"^visual\.patch_embed\.weight", "visual.conv1.weight"),
]


def _openai_text(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = _rename(_fused_biases(state, "text", "in_proj_bias"), _TEXT_TO_OPENAI)
    renamed["text.text_projection"] = renamed["text.text_projection"].t()
    renamed["logit_scale"] = renamed["logit_scale"].reshape(())
    return renamed


def _split(state: dict[str, Tensor], names: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """One packed matrix -> the parts that others store."""
    split = {}
    for key, value in state.items():
        packed = next((p for p in names if key.startswith("visual") and key.endswith(p)), None)
        if packed is None:
            split[key] = value
            continue
        stem = key.removesuffix(packed)
        parts = value.chunk(len(names[packed]))
        split |= {stem + n: part for n, part in zip(names[packed], parts, strict=True)}
    return split


def baai(model: DualEncoder) -> dict:
    state = _split(
        _openai_text(_state(model)),
        {
            "attn.qkv.weight": ("attn.q_proj.weight", "attn.k_proj.weight", "attn.v_proj.weight"),
            "mlp.w12.weight": ("mlp.w1.weight", "mlp.w2.weight"),
            "mlp.w12.bias": ("mlp.w1.bias", "mlp.w2.bias"),
        },
    )
    state = _rename(
        state,
        [
            (r"^visual\.patch_embed\.", "visual.patch_embed.proj."),
            (r"^(visual\..*)\.attn\.norm\.", r"\1.attn.inner_attn_ln."),
            (r"^(visual\..*)\.mlp\.norm\.", r"\1.mlp.ffn_ln."),
            (r"^(visual\..*)\.mlp\.fc2\.", r"\1.mlp.w3."),
        ],
    )
    state.pop("visual.temporal_embed")  # an image model
    state["visual.rope.freqs_cos"] = torch.ones(4, 4)
    state["visual.blocks.0.attn.rope.freqs_sin"] = torch.ones(4, 4)
    return state


def open_clip(model: DualEncoder) -> dict:
    state = _rename(
        baai(model),
        [
            (r"^visual\.", "visual.trunk."),
            (r"\.attn\.q_bias", ".attn.q_proj.bias"),
            (r"\.attn\.v_bias", ".attn.v_proj.bias"),
            (r"\.attn\.inner_attn_ln\.", ".attn.norm."),
            (r"\.mlp\.w1\.", ".mlp.fc1_g."),
            (r"\.mlp\.w2\.", ".mlp.fc1_x."),
            (r"\.mlp\.ffn_ln\.", ".mlp.norm."),
            (r"\.mlp\.w3\.", ".mlp.fc2."),
        ],
    )
    return {key: value for key, value in state.items() if "rope" not in key}


def openai(model: DualEncoder) -> dict:
    state = _rename(
        _fused_biases(_openai_text(_state(model)), "visual", "in_proj_bias"),
        _VISUAL_TO_OPENAI,
    )
    state.pop("visual.temporal_embed")
    state["visual.proj"] = state["visual.proj"].t()
    state["visual.class_embedding"] = state["visual.class_embedding"].flatten()
    state["visual.positional_embedding"] = state["visual.positional_embedding"][0]
    state = _rename(state, [(r"^text\.", "")])
    return {**state, "input_resolution": torch.tensor(16), "vocab_size": torch.tensor(49408)}


def avion(model: DualEncoder) -> dict:
    state = _state(model)
    time = state["visual.temporal_embed"]
    state = _rename(
        _fused_biases(_openai_text(state), "visual", "Wqkv.bias"),
        [
            *_VISUAL_TO_OPENAI,
            (r"^(visual\..*)in_proj_weight", r"\1Wqkv.weight"),
            (r"^(visual\..*)\.mlp\.c_fc\.", r"\1.mlp.fc1."),
            (r"^(visual\..*)\.mlp\.c_proj\.", r"\1.mlp.fc2."),
            (r"^visual\.proj", "visual.image_projection"),
            (r"^text\.", "textual."),
        ],
    )
    state["visual.image_projection"] = state["visual.image_projection"].t()
    state["visual.conv1.weight"] = state["visual.conv1.weight"].flatten(1)
    state["visual.class_embedding"] = state["visual.class_embedding"].flatten()
    state["visual.positional_embedding"] = state["visual.positional_embedding"][0]
    state.pop("visual.temporal_embed")
    state["visual.temporal_embedding"] = time
    state = {f"module.{key}": value for key, value in state.items()}
    return {"epoch": 4, "state_dict": state, "args": argparse.Namespace(lr=3e-5, model="CLIP")}


def lavila(model: DualEncoder) -> dict:
    """LaViLa's TimeSformer: timm's names, and in each block an attention over time."""
    state = _fused_biases(_openai_text(_state(model)), "visual", "qkv.bias")
    state = _rename(
        state,
        [
            (r"^visual\.patch_embed\.", "visual.patch_embed.proj."),
            (r"^visual\.norm_pre\.", "visual.ln_pre."),
            (r"^visual\.head\.weight", "image_projection"),
            (r"^text\.", ""),
        ],
    )
    state["image_projection"] = state["image_projection"].t()
    state["visual.temporal_embed"] = state["visual.temporal_embed"][None]
    for i in range(2):
        state[f"visual.blocks.{i}.timeattn.qkv.weight"] = torch.ones(96, 32)
        state[f"visual.blocks.{i}.norm3.weight"] = torch.ones(32)
    state = {f"module.{key}": value for key, value in state.items()}
    return {"epoch": 4, "state_dict": state, "args": argparse.Namespace(num_frames=4)}
