"""Configurations of the encoders, the presets, and the typed model section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

ARCHITECTURES = ("eva02", "clip")
ACTIVATIONS = ("gelu", "quick_gelu")
TEMPORAL_MODES = ("none", "learnable", "rotary", "both", "split")
TIME_SCALINGS = ("linear", "centred", "ntk")

# RGB mean and standard deviation of CLIP's training images, on the scale 0..1.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class VisionConfig:
    """The video tower.

    Attributes:
        image_size: Height and width of a frame in pixels.
        patch_size: Side of a patch in pixels; divides `image_size`.
        width: Channels D.
        depth: Number of blocks.
        num_heads: Heads; D / num_heads is the head dim.
        mlp_hidden: Hidden channels of the MLP (of each branch of SwiGLU).
        architecture: "eva02" (rotary space, SwiGLU, inner norms, no key bias) or "clip" (the ViT
            of OpenAI's CLIP, AVION's model).
        activation: "gelu" (erf) or "quick_gelu"; of the "clip" architecture only.
        norm_eps: Epsilon of every LayerNorm.
        num_frames: Frames T that the temporal embedding is made for.
        temporal: How time enters: "none"; "learnable" (P_t of eq. 7); "rotary" (R_t of eqs. 8-10);
            "both" (the paper's); "split" (as "both", but the head is divided between time, height
            and width as 1/4 : 3/8 : 3/8, CogVideoX's 3D-RoPE).
        reference_grid: Grid to which rotary spatial positions are rescaled.
        reference_frames: Number of frames to which rotary time is fitted, by `time_scaling`; None
            leaves frame indices.
        time_scaling: How a clip of T frames is fitted to `reference_frames` = r: "linear" (t
            becomes t * r / T), "centred" ((t + 1/2) * r / T - 1/2: as "linear", but the clip's
            middle stays where it was, which the CLS, at time 0, sees) or "ntk" (frame indices stay,
            and where T is larger the slowest frequencies become T / r times as slow, the fastest
            stay).
        temporal_init_std: Standard deviation that P_t starts with, where no checkpoint has it. 0
            leaves an image checkpoint's features at T = 1; the authors' code has 0.02.
        patch_dropout: Share of patches dropped in training, the same ones in all frames of a clip.
        drop_path: Stochastic depth of the last block; it rises linearly from 0 at the first.
    """

    image_size: int = 224
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_hidden: int = 2048
    architecture: str = "eva02"
    activation: str = "gelu"
    norm_eps: float = 1e-6
    num_frames: int = 4
    temporal: str = "both"
    reference_grid: int = 16
    reference_frames: int | None = None
    time_scaling: str = "linear"
    temporal_init_std: float = 0.0
    patch_dropout: float = 0.0
    drop_path: float = 0.0

    def __post_init__(self) -> None:
        _require(
            self.architecture in ARCHITECTURES,
            f"architecture is {self.architecture!r}; one of: {', '.join(ARCHITECTURES)}",
        )
        _require(
            self.activation in ACTIVATIONS,
            f"activation is {self.activation!r}; one of: {', '.join(ACTIVATIONS)}",
        )
        _require(
            self.temporal in TEMPORAL_MODES,
            f"temporal is {self.temporal!r}; one of: {', '.join(TEMPORAL_MODES)}",
        )
        _require(
            self.architecture == "eva02" or self.temporal in ("none", "learnable"),
            f"temporal is {self.temporal!r}, but a CLIP ViT has no rotary positions; "
            "set temporal to 'none' or 'learnable'",
        )
        _require(
            self.image_size >= self.patch_size and self.image_size % self.patch_size == 0,
            f"image_size {self.image_size} is no multiple of patch_size {self.patch_size}",
        )
        _require(
            self.width % self.num_heads == 0,
            f"width {self.width} is no multiple of num_heads {self.num_heads}",
        )
        _require(self.num_frames >= 1, f"num_frames is {self.num_frames}; it must be at least 1")
        _require(
            self.time_scaling in TIME_SCALINGS,
            f"time_scaling is {self.time_scaling!r}; one of: {', '.join(TIME_SCALINGS)}",
        )
        _require(
            self.temporal_init_std >= 0,
            f"temporal_init_std is {self.temporal_init_std}; it may not be negative",
        )
        for name in ("patch_dropout", "drop_path"):
            value = getattr(self, name)
            _require(0.0 <= value < 1.0, f"{name} is {value}; it must be in [0, 1)")

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in a frame."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def num_patches(self) -> int:
        """Patches N of a frame."""
        return self.grid[0] * self.grid[1]

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.width // self.num_heads

    @property
    def has_temporal_embedding(self) -> bool:
        """True where P_t of eq. 7 is a parameter."""
        return self.temporal in ("learnable", "both", "split")

    @property
    def rotation(self) -> str | None:
        """Mode of `st_rope_tables`, or None for the CLIP ViT, which has no rotary positions."""
        if self.architecture != "eva02":
            return None
        return {"rotary": "rotary", "both": "rotary", "split": "split"}.get(self.temporal, "none")


@dataclass(frozen=True)
class TextConfig:
    """The text tower: CLIP's causal transformer, pooled at the end-of-text token.

    Attributes:
        context_length: Tokens of a sentence, padding included.
        vocab_size: Size of the vocabulary; the highest id must be the end-of-text token.
        width: Channels.
        depth: Number of blocks.
        num_heads: Attention heads.
        mlp_ratio: Hidden channels of the MLP over `width`.
        activation: "gelu" (erf) or "quick_gelu".
        norm_eps: Epsilon of every LayerNorm.
    """

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    depth: int = 12
    num_heads: int = 8
    mlp_ratio: float = 4.0
    activation: str = "gelu"
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _require(
            self.activation in ACTIVATIONS,
            f"activation is {self.activation!r}; one of: {', '.join(ACTIVATIONS)}",
        )
        _require(
            self.width % self.num_heads == 0,
            f"text width {self.width} is no multiple of num_heads {self.num_heads}",
        )


@dataclass(frozen=True)
class DualEncoderConfig:
    """Both towers and the space they share.

    Attributes:
        vision: The video tower.
        text: The text tower.
        embed_dim: Dimension E of the shared space (the paper trains 256; the image checkpoints
            have 512 for B and 768 for L).
        attention_backend: Of `kernels.attention.st_rope_attention`, in both towers.
        activation_checkpointing: Recompute each block in the backward pass.
        compile_blocks: Compile each block with torch.compile (docs/performance.md says what it
            gains); the first step then takes minutes.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 512
    attention_backend: str = "auto"
    activation_checkpointing: bool = False
    compile_blocks: bool = False


_TEXT_BASE = TextConfig()
_TEXT_LARGE = TextConfig(width=768, num_heads=12)
_EVA_LARGE = VisionConfig(patch_size=14, width=1024, depth=24, num_heads=16, mlp_hidden=2730)
# OpenAI's weights were trained with QuickGELU and epsilon 1e-5 in both towers.
_CLIP_BASE = VisionConfig(
    mlp_hidden=3072,
    architecture="clip",
    activation="quick_gelu",
    norm_eps=1e-5,
    temporal="learnable",
)
_CLIP_LARGE = replace(
    _CLIP_BASE, patch_size=14, width=1024, depth=24, num_heads=16, mlp_hidden=4096
)

PRESETS: dict[str, DualEncoderConfig] = {
    "eva02_at_base_16": DualEncoderConfig(VisionConfig(), _TEXT_BASE, 512),
    "eva02_at_large_14": DualEncoderConfig(_EVA_LARGE, _TEXT_LARGE, 768),
    "eva02_at_large_14_336": DualEncoderConfig(
        replace(_EVA_LARGE, image_size=336), _TEXT_LARGE, 768
    ),
    "clip_vit_base_16": DualEncoderConfig(
        _CLIP_BASE, replace(_TEXT_BASE, activation="quick_gelu"), 512
    ),
    "clip_vit_large_14": DualEncoderConfig(
        _CLIP_LARGE, replace(_TEXT_LARGE, activation="quick_gelu"), 768
    ),
    # The demo's: small enough to learn from scratch on two CPU cores within minutes.
    "eva02_at_tiny": DualEncoderConfig(
        VisionConfig(image_size=64, patch_size=16, width=96, depth=4, num_heads=3, mlp_hidden=256),
        TextConfig(width=64, depth=2, num_heads=2),
        64,
    ),
}


def resolve_config(
    preset: str | DualEncoderConfig,
    *,
    embed_dim: int | None = None,
    num_frames: int | None = None,
    image_size: int | None = None,
    temporal: str | None = None,
    reference_frames: int | None = None,
    time_scaling: str | None = None,
    temporal_init_std: float | None = None,
    activation: str | None = None,
    norm_eps: float | None = None,
    attention_backend: str | None = None,
    activation_checkpointing: bool | None = None,
    compile_blocks: bool | None = None,
    patch_dropout: float | None = None,
    drop_path: float | None = None,
) -> DualEncoderConfig:
    """Return a preset or config with the given fields replaced; None keeps a field.

    `activation` is both towers' (EVA-02's video tower has SwiGLU whatever it says), `norm_eps` the
    video tower's.

    Raises:
        ValueError: for an unknown preset or an impossible combination.
    """
    if isinstance(preset, str):
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}; one of: {', '.join(PRESETS)}")
        config = PRESETS[preset]
    else:
        config = preset
    vision = {
        "image_size": image_size,
        "num_frames": num_frames,
        "temporal": temporal,
        "reference_frames": reference_frames,
        "time_scaling": time_scaling,
        "temporal_init_std": temporal_init_std,
        "activation": activation,
        "norm_eps": norm_eps,
        "patch_dropout": patch_dropout,
        "drop_path": drop_path,
    }
    shared = {
        "embed_dim": embed_dim,
        "attention_backend": attention_backend,
        "activation_checkpointing": activation_checkpointing,
        "compile_blocks": compile_blocks,
    }
    return replace(
        config,
        vision=replace(config.vision, **_given(vision)),
        text=replace(config.text, **_given({"activation": activation})),
        **_given(shared),
    )


def _given(fields: dict) -> dict:
    return {name: value for name, value in fields.items() if value is not None}


@dataclass
class ModelConfig:
    """The `model` section of a recipe, typed for the command line.

    Attributes:
        preset: A name in `PRESETS`.
        embed_dim: Shared dimension; null keeps the preset's (that of the image checkpoint).
        num_frames: Frames of a clip.
        image_size: Pixels; null keeps the preset's.
        temporal: "none", "learnable", "rotary", "both" or "split"; null keeps the preset's
            ("both" for EVA02-AT, "learnable" for the CLIP ViT baselines).
        reference_frames: Frames that rotary time is fitted to; null for frame indices.
        time_scaling: How: "linear", "centred" or "ntk".
        temporal_init_std: Standard deviation that P_t starts with; the authors' code has 0.02.
        activation: "gelu" or "quick_gelu" in both towers (EVA-02's video tower keeps SwiGLU); null
            keeps the preset's: the weights to start from were trained with it.
        norm_eps: Epsilon of the video tower's LayerNorms; null keeps the preset's.
        attention_backend: "auto", "reference", "sdpa", "xformers" or "triton".
        activation_checkpointing: Recompute each block in the backward pass.
        compile_blocks: Compile each block with torch.compile.
        patch_dropout: Share of patches dropped in training.
        drop_path: Stochastic depth of the last block.
    """

    preset: str = "eva02_at_base_16"
    embed_dim: int | None = 256
    num_frames: int = 4
    image_size: int | None = None
    temporal: str | None = None
    reference_frames: int | None = None
    time_scaling: str = "linear"
    temporal_init_std: float = 0.0
    activation: str | None = None
    norm_eps: float | None = None
    attention_backend: str = "auto"
    activation_checkpointing: bool = False
    compile_blocks: bool = False
    patch_dropout: float = 0.0
    drop_path: float = 0.0

    def resolve(self) -> DualEncoderConfig:
        """Return the preset with these fields.

        Raises:
            ValueError: for an unknown preset or an impossible combination.
        """
        overrides = {name: value for name, value in vars(self).items() if name != "preset"}
        return resolve_config(self.preset, **overrides)
