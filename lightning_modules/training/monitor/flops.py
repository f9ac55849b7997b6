"""Floating-point operations of a dual encoder, by the dimensions of its matrix products.

A multiply and an add count as two. Norms, activations and rotations are left out: they are
limited by memory, not by arithmetic. Attention is counted in full, masked or not. The last block
of a tower works on the one token that is pooled: it needs the others' keys and values only.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from lightning_modules.models import DualEncoderConfig, TextConfig, VisionConfig


class Gpu(NamedTuple):
    """What a vendor's data sheet says.

    Attributes:
        tflops: bf16 with fp32 accumulation, dense; V100 and T4 have fp16 alone.
        memory_gib: Memory; of the smaller one, where two of the name are sold.
    """

    tflops: float
    memory_gib: float


# By whole words of the device's name; the first that fits counts, so what says more stands first.
GPUS = {
    "GB200": Gpu(2500.0, 186),
    "B200": Gpu(2250.0, 180),
    "GH200": Gpu(989.0, 96),
    "H200 NVL": Gpu(836.0, 141),
    "H200": Gpu(989.0, 141),
    "H100 NVL": Gpu(835.0, 94),
    "H100 PCIe": Gpu(756.0, 80),
    "H100": Gpu(989.0, 80),
    "H800": Gpu(989.0, 80),
    "H20": Gpu(148.0, 96),
    "A100": Gpu(312.0, 40),
    "A800": Gpu(312.0, 40),
    "L40S": Gpu(362.0, 48),
    "L40": Gpu(181.0, 48),
    "L4": Gpu(121.0, 24),
    "A40": Gpu(150.0, 48),
    "A30": Gpu(165.0, 24),
    "A10G": Gpu(70.0, 24),
    "A10": Gpu(125.0, 24),
    "RTX PRO 6000 Blackwell Max-Q": Gpu(439.0, 96),
    "RTX PRO 6000": Gpu(504.0, 96),
    "RTX 6000 Ada": Gpu(364.0, 48),
    "A6000": Gpu(155.0, 48),
    "A5000": Gpu(111.0, 24),
    "A4000": Gpu(77.0, 16),
    "RTX 5090": Gpu(210.0, 32),
    "RTX 4090": Gpu(165.0, 24),
    "RTX 3090": Gpu(71.0, 24),
    "V100": Gpu(125.0, 16),
    "T4": Gpu(65.0, 16),
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


def known_gpu(device_name: str) -> Gpu | None:
    """What is known of a device by its name, or None."""
    for name, gpu in GPUS.items():
        if re.search(rf"\b{name}\b", device_name):
            return gpu
    return None


def peak_tflops(device_name: str) -> float | None:
    """Peak of a device by its name, or None where it is not known."""
    gpu = known_gpu(device_name)
    return gpu.tflops if gpu else None
