"""Resampling of learnable positions to another number of frames or another grid.

Shape legend: T frames, N patches of a square grid, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def interpolate_temporal(embedding: Tensor, num_frames: int) -> Tensor:
    """Resample (T, D) to (num_frames, D), linearly with half-pixel centres.

    From 4 to 16 frames the source points are 0, 0, .125, .375, ..., 2.875, 3, 3: frame t stands
    for the middle of the t-th of T equal segments of the clip, at both lengths.
    """
    if embedding.shape[0] == num_frames:
        return embedding
    resampled = F.interpolate(
        embedding.t()[None], size=num_frames, mode="linear", align_corners=False
    )
    return resampled[0].t()


def interpolate_spatial(pos_embed: Tensor, num_patches: int) -> Tensor:
    """Resample (1, 1 + N, D) to (1, 1 + num_patches, D), bicubically; the CLS row stays.

    Raises:
        ValueError: if either number of patches is not a square.
    """
    cls_row, rows = pos_embed[:, :1], pos_embed[:, 1:]
    source, target = (math.isqrt(n) for n in (rows.shape[1], num_patches))
    if source**2 != rows.shape[1] or target**2 != num_patches:
        raise ValueError(
            f"the position embedding has {rows.shape[1]} patches and the model {num_patches}; "
            "only square grids can be resampled"
        )
    image = rows.unflatten(1, (source, source)).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(target, target), mode="bicubic", align_corners=False)
    return torch.cat((cls_row, image.permute(0, 2, 3, 1).flatten(1, 2)), dim=1)
