"""Crops and sizes of decoded frames, on uint8."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Box = tuple[int, int, int, int]  # top, left, height, width


def random_crop_box(
    height: int,
    width: int,
    generator: random.Random,
    scale: tuple[float, float],
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """Draw the box of a random resized crop.

    Args:
        height: Of the frame.
        width: Of the frame.
        generator: Where the draw comes from.
        scale: Least and greatest share of the frame's area.
        ratio: Least and greatest width / height, drawn log-uniformly.

    Returns:
        A box within the frame; after ten draws that do not fit, the largest central box whose
        ratio is allowed.
    """
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_h, box_w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_h <= height and 0 < box_w <= width:
            top = generator.randrange(height - box_h + 1)
            return top, generator.randrange(width - box_w + 1), box_h, box_w
    box_w = min(width, round(height * ratio[1]))
    box_h = min(height, round(width / ratio[0]))
    return (height - box_h) // 2, (width - box_w) // 2, box_h, box_w


def crop_and_resize(frames: NDArray[np.uint8], box: Box, size: int) -> Tensor:
    """Cut the same box from all frames and resize it to a square.

    Works on uint8 in channels-last memory, 11-17 times faster than on float.

    Args:
        frames: (T, H, W, 3) uint8.
        box: Top, left, height, width.
        size: Side of the result.

    Returns:
        (3, T, size, size) uint8.
    """
    top, left, height, width = box
    part = _channels_first(frames[:, top : top + height, left : left + width])
    return _resize(part, (size, size)).transpose(0, 1)


def resize_and_centre_crop(frames: NDArray[np.uint8], size: int) -> Tensor:
    """Resize the shorter side to `size`, then cut the central square: the evaluation protocol.

    Args:
        frames: (T, H, W, 3) uint8.
        size: Side of the result.

    Returns:
        (3, T, size, size) uint8.
    """
    height, width = frames.shape[1:3]
    short = min(height, width)
    target = (size * height // short, size * width // short)
    resized = _resize(_channels_first(frames), target)
    top, left = ((side - size) // 2 for side in target)
    return resized[:, :, top : top + size, left : left + size].transpose(0, 1)


def _channels_first(frames: NDArray[np.uint8]) -> Tensor:
    """(T, H, W, 3) to (T, 3, H, W) without a copy: in memory the channels stay last."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def _resize(video: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(video, size, mode="bilinear", antialias=True, align_corners=False)
