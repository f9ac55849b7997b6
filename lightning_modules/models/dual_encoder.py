"""The dual encoder: video tower, text tower and their shared, L2-normalised space."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from lightning_modules.models.config import (
    DualEncoderConfig,
    TextConfig,
    VisionConfig,
    resolve_config,
)
from lightning_modules.models.text import TextEncoder
from lightning_modules.models.towers import Towers
from lightning_modules.models.vision import VideoEncoder

MAX_LOG_SCALE = math.log(100.0)  # CLIP's bound on the inverse temperature


class _ClampInward(torch.autograd.Function):
    """Clamp to [0, ln 100]; beyond a bound only gradients that lead back in pass.

    CLIP clamps the parameter after each step. Under ZeRO the parameter is one rank's shard of a
    float32 copy that the optimiser owns, out of reach of the module; the clamp in the forward pass
    trains alike (the parameter oversteps a bound by one step at most) under every strategy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(0.0, MAX_LOG_SCALE)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        outward = ((x > MAX_LOG_SCALE) & (grad < 0)) | ((x < 0.0) & (grad > 0))
        return grad.masked_fill(outward, 0.0)


class DualEncoder(
    Towers,
    PyTorchModelHubMixin,
    library_name="eva02-at",
    paper_url="https://arxiv.org/abs/2506.14356",
    tags=["video", "egocentric", "clip"],
):
    """EVA02-AT, or a CLIP ViT baseline: clips and sentences into one space.

    `save_pretrained`, `from_pretrained` and `push_to_hub` are the Hub's own; what `eva02-at
    convert --push` uploads is read too. `checkpoints.load_clip_checkpoint` and `convert` read
    everything else.

    Attributes:
        visual: The video tower.
        text: The text tower.
        logit_scale: (1,) log of the inverse temperature, starting at ln(1/0.07). Not 0-dim: ZeRO
            cannot partition 0-dim parameters.
    """

    def __init__(self, config: DualEncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.visual = VideoEncoder(
            config.vision,
            config.embed_dim,
            attention_backend=config.attention_backend,
            activation_checkpointing=config.activation_checkpointing,
        )
        self.text = TextEncoder(
            config.text,
            config.embed_dim,
            attention_backend=config.attention_backend,
            activation_checkpointing=config.activation_checkpointing,
        )
        if config.compile_blocks:
            self.compile_blocks()
        self.logit_scale = nn.Parameter(torch.empty(1))
        self._init_logit_scale()

    @classmethod
    def _from_pretrained(cls, *, config: Any = None, **how: Any) -> DualEncoder:
        """Build the model of a repository's `config.json`, then let the mixin read its weights."""
        if isinstance(config, dict):
            config = _config_of(config)
        if not isinstance(config, DualEncoderConfig):
            raise ValueError(
                f"{how.get('model_id')} has no config.json of this project; other checkpoints are "
                "read with `eva02-at convert --input hf:ORG/NAME/FILE`"
            )
        return super()._from_pretrained(config=config, **how)

    def init_weights(self) -> None:
        """Initialise every parameter anew."""
        self.visual.init_weights()
        self.text.init_weights()
        self._init_logit_scale()

    def _init_logit_scale(self) -> None:
        nn.init.constant_(self.logit_scale, math.log(1 / 0.07))

    def encode_video(self, video: Tensor) -> Tensor:
        """Embed clips.

        Args:
            video: (B, 3, T, H, W), normalised float or uint8 (normalised inside).

        Returns:
            (B, E), L2-normalised, at least float32.
        """
        return _normalize(self.visual(video))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed sentences.

        Args:
            tokens: (B, L) int64.

        Returns:
            (B, E), L2-normalised, at least float32.
        """
        return _normalize(self.text(tokens))

    def encode_video_with_patches(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """`encode_video`, to the bit, and the patches (B, T, N, D): `VideoEncoder.with_patches`."""
        embedding, patches = self.visual.with_patches(video)
        return _normalize(embedding), patches

    def encode_text_with_words(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`encode_text`, to the bit, and the words (B, L, D): `TextEncoder.with_words`."""
        embedding, words = self.text.with_words(tokens)
        return _normalize(embedding), words

    def forward(self, video: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Embed pairs.

        Returns:
            Video embeddings (B, E), text embeddings (B, E), and the inverse temperature (1,),
            clamped to [1, 100].
        """
        scale = _ClampInward.apply(self.logit_scale).exp()
        return self.encode_video(video), self.encode_text(tokens), scale


def _config_of(content: dict[str, Any]) -> DualEncoderConfig:
    """What `save_pretrained` wrote as `config.json`, or `eva02-at convert`."""
    fields = dict(content.get("model", content))
    try:
        vision, text = VisionConfig(**fields.pop("vision")), TextConfig(**fields.pop("text"))
        return DualEncoderConfig(vision, text, **fields)
    except (KeyError, TypeError) as error:
        raise ValueError(f"config.json describes no DualEncoder: {error}") from None


def _normalize(features: Tensor) -> Tensor:
    # In float32 at least: similarities of bf16 embeddings tie by the dozen.
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def build_dual_encoder(preset: str | DualEncoderConfig, **overrides: Any) -> DualEncoder:
    """Build a model with freshly initialised parameters.

    Args:
        preset: A name in `PRESETS`, or a config.
        **overrides: embed_dim, num_frames, image_size, temporal, activation, norm_eps,
            attention_backend, activation_checkpointing, compile_blocks, patch_dropout, drop_path;
            None keeps the preset's value.

    Raises:
        ValueError: for an unknown preset or override, or an impossible combination.
    """
    allowed = {name for name in resolve_config.__annotations__ if name not in ("preset", "return")}
    unknown = sorted(set(overrides) - allowed)
    if unknown:
        raise ValueError(
            f"unknown override {', '.join(unknown)}; one of: {', '.join(sorted(allowed))}"
        )
    return DualEncoder(resolve_config(preset, **overrides))
