"""Floating-point operations of a dual encoder, by the dimensions of its matrix products.

A multiply and an add count as two. Norms, activations and rotations are left out: they are
limited by memory, not by arithmetic. Attention is counted in full, masked or not. The last block
of a tower works on the one token that is pooled: it needs the others' keys and values only.
"""

from __future__ import annotations

import re

from lightning_modules.models import DualEncoderConfig, TextConfig, VisionConfig

# bf16 with fp32 accumulation, dense, TFLOP/s (vendors' data sheets; V100 and T4 have fp16 alone),
# by whole words of the device's name; the first that fits counts, so what says more stands first
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 836.0,
    "H200": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A40": 150.0,
    "A30": 165.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX PRO 6000 Blackwell Max-Q": 439.0,
    "RTX PRO 6000": 504.0,
    "RTX 6000 Ada": 364.0,
    "A6000": 155.0,
    "A5000": 111.0,
    "A4000": 77.0,
    "RTX 5090": 210.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}


def video_flops(config: VisionConfig, embed_dim: int, num_frames: int | None = None) -> float:
    """Forward FLOPs of the video tower for one clip.

    Args:
        config: The tower.
        embed_dim: E.
        num_frames: T; the config's by default.
    """
    frames = config.num_frames if num_frames is None else num_frames
    kept = max(1, round(config.num_patches * (1 - config.patch_dropout)))
    tokens = 1 + frames * kept
    matrices = 3 if config.architecture == "eva02" else 2  # of the MLP: SwiGLU has a gate
    blocks = _tower_flops(config.depth, tokens, config.width, matrices * config.mlp_hidden)
    patches = 2 * frames * config.num_patches * 3 * config.patch_size**2 * config.width
    return blocks + patches + 2 * config.width * embed_dim


def text_flops(config: TextConfig, embed_dim: int, num_tokens: int | None = None) -> float:
    """Forward FLOPs of the text tower for one sentence of `num_tokens`, by default the longest."""
    columns = 2 * int(config.width * config.mlp_ratio)
    blocks = _tower_flops(config.depth, num_tokens or config.context_length, config.width, columns)
    return blocks + 2 * config.width * embed_dim


def pair_flops(config: DualEncoderConfig, num_tokens: int | None = None) -> float:
    """Forward FLOPs of one (clip, sentence) pair; the backward pass takes twice as many."""
    text = text_flops(config.text, config.embed_dim, num_tokens)
    return video_flops(config.vision, config.embed_dim) + text


def _tower_flops(depth: int, tokens: int, width: int, mlp_columns: int) -> float:
    whole = _block_flops(tokens, tokens, width, mlp_columns)
    return (depth - 1) * whole + _block_flops(1, tokens, width, mlp_columns)


def _block_flops(queries: int, tokens: int, width: int, mlp_columns: int) -> float:
    projections = 2 * (2 * queries + 2 * tokens) * width * width  # q and output; k and v
    attention = 2 * 2 * queries * tokens * width  # scores, and their mean of the values
    return projections + attention + 2 * queries * width * mlp_columns


def peak_tflops(device_name: str) -> float | None:
    """Peak of a device by its name, or None where it is not known."""
    for name, peak in PEAK_TFLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return peak
    return None
