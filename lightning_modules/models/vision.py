"""The video tower: EVA-02 (or CLIP's ViT) with joint space-time attention.

Shape legend: B clips, T frames, H x W pixels, p patch size, N patches a frame, D width,
S = 1 + T*N tokens: one CLS, then the patches frame by frame, row by row.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.st_rope import StRopeTables, st_rope_tables
from lightning_modules.models.config import CLIP_MEAN, CLIP_STD, VisionConfig
from lightning_modules.models.interpolate import interpolate_temporal
from lightning_modules.models.layers import (
    ALIGNMENT,
    BlockConfig,
    BlockStack,
    Norm,
    compute_dtype,
    init_layers,
)


class PatchEmbed(nn.Module):
    """Patches to tokens: a 1 x p x p convolution written as one matrix product.

    uint8 pixels are normalised by CLIP's mean and standard deviation, folded into the weights:

        W (u/255 - m) / s + b  =  W' u + b',   W' = W / (255 s),   b' = b - W' (255 m)

    so that no float copy of the video is normalised pixel by pixel. bf16 holds 0..255 exactly.
    """

    def __init__(self, patch_size: int, width: int, *, bias: bool) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.weight = nn.Parameter(torch.empty(width, 3, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None

    def reset_parameters(self) -> None:
        """Initialise as a Linear over the pixels of a patch."""
        nn.init.trunc_normal_(self.weight, std=0.02)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) normalised float, or uint8 -> (B, T, N, D)."""
        p = self.patch_size
        pixels = video.unflatten(4, (-1, p)).unflatten(3, (-1, p))
        patches = pixels.permute(0, 2, 3, 5, 1, 4, 6)  # (B, T, rows, columns, 3, p, p)
        patches = patches.flatten(4).flatten(2, 3)  # uint8 is permuted before it grows to float
        dtype = compute_dtype(self.weight)
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if video.dtype == torch.uint8:
            weight, bias = self._folded(dtype)
        weight = weight.flatten(1).to(dtype)
        if padding := -weight.shape[1] % ALIGNMENT:  # 588 numbers of a 14 x 14 patch; see layers.py
            patches, weight = F.pad(patches, (0, padding)), F.pad(weight, (0, padding))
        return F.linear(patches.to(dtype), weight, bias)

    def _folded(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """W' of the given type, and b', formed in float32 at least.

        b' is formed from the rounded W', so that the mean pixel cancels exactly in bf16 too. Mean
        and standard deviation are numbers of the host: as tensors they would be copied to the
        device in every step, which waits for it, and as buffers `bfloat16()` would round them.
        """
        precision = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(self.weight.device.type, enabled=False):
            colours = self.weight.to(precision).unbind(1)
            scaled = [c / (255.0 * std) for c, std in zip(colours, CLIP_STD, strict=True)]
            weight = torch.stack(scaled, dim=1).to(dtype)
            red, green, blue = weight.to(precision).sum((2, 3)).unbind(1)
            mean = [255.0 * m for m in CLIP_MEAN]
            bias = -(red * mean[0] + green * mean[1] + blue * mean[2])
        if self.bias is not None:
            bias = bias + self.bias
        return weight, bias.to(dtype)


class VideoEncoder(nn.Module):
    """Clips to embeddings (not normalised).

    z0 = patches + P_xy + P_t (eq. 7); CLS carries row 0 of the spatial positions and no time.
    P_t starts at zero, so that at T = 1 the video model is the image model.
    """

    def __init__(
        self,
        config: VisionConfig,
        embed_dim: int,
        *,
        attention_backend: str = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        eva = config.architecture == "eva02"
        norm = partial(Norm, config.width, eps=config.norm_eps, backend=attention_backend)
        self.patch_embed = PatchEmbed(config.patch_size, config.width, bias=eva)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.num_patches, config.width))
        self.temporal_embed = (
            nn.Parameter(torch.empty(config.num_frames, config.width))
            if config.has_temporal_embedding
            else None
        )
        self.norm_pre = nn.Identity() if eva else norm()
        block = BlockConfig(
            width=config.width,
            num_heads=config.num_heads,
            mlp_hidden=config.mlp_hidden,
            mlp="swiglu" if eva else config.activation,
            norm_eps=config.norm_eps,
            key_bias=not eva,
            inner_norm=eva,
            attention_backend=attention_backend,
        )
        self.blocks = BlockStack(
            block, config.depth, drop_path=config.drop_path, checkpointing=activation_checkpointing
        )
        self.norm = norm()
        self.head = nn.Linear(config.width, embed_dim, bias=eva)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise every parameter of the tower; temporal positions start at zero by default."""
        init_layers(self)
        self.patch_embed.reset_parameters()
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.temporal_embed is not None:
            nn.init.zeros_(self.temporal_embed)
            if self.config.temporal_init_std:
                nn.init.trunc_normal_(self.temporal_embed, std=self.config.temporal_init_std)
        nn.init.normal_(self.head.weight, std=self.config.width**-0.5)

    def forward(self, video: Tensor) -> Tensor:
        """Encode clips.

        Args:
            video: (B, 3, T, H, W), normalised float or uint8 0..255. Any T: where it is not the
                config's, the temporal embedding is resampled as a checkpoint's would be.

        Returns:
            (B, E) in the parameters' dtype.

        Raises:
            ValueError: if the video's shape does not fit the config.
        """
        x, tables, cls_index = self._embed(video)
        return self.head(self.norm(self.blocks(x, tables, cls_index)))

    def with_patches(self, video: Tensor) -> tuple[Tensor, Tensor]:
        """Encode clips and their patches in one pass: what heads that attend to patches want.

        Args:
            video: As `forward`.

        Returns:
            (B, E) as `forward`, to the bit; and (B, T, N, D), the patches as the last block meets
            them. Behind it they are nobody's: training reads its CLS alone.
        """
        x, tables, cls_index = self._embed(video)
        x = self.blocks.all_but_last(x, tables)
        embedding = self.head(self.norm(self.blocks.pool(x, tables, cls_index)))
        return embedding, x[:, 1:].unflatten(1, (video.shape[2], -1))

    def _embed(self, video: Tensor) -> tuple[Tensor, StRopeTables | None, Tensor]:
        """Tokens (B, S, D) with their positions, their rotation, and where the CLS is."""
        self._check_video(video)
        x = self.patch_embed(video)  # (B, T, N, D)
        positions = self.pos_embed[:, None, 1:]
        if self.temporal_embed is not None:
            positions = positions + interpolate_temporal(self.temporal_embed, x.shape[1])[:, None]
        x = x + positions.to(x.dtype)
        tables = self._rotation_tables(x)
        x, tables = self._drop_patches(x, tables)
        cls = (self.cls_token + self.pos_embed[:, :1]).to(x.dtype).expand(x.shape[0], -1, -1)
        x = self.norm_pre(torch.cat((cls, x.flatten(1, 2)), dim=1))
        return x, tables, torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)

    def _rotation_tables(self, x: Tensor) -> StRopeTables | None:
        config = self.config
        if config.rotation is None:
            return None
        num_frames = x.shape[1]
        longer = num_frames / (config.reference_frames or num_frames)
        ntk = config.time_scaling == "ntk"
        step = 1.0 if ntk else 1 / longer
        first = (step - 1) / 2 if config.time_scaling == "centred" else 0.0
        return st_rope_tables(
            config.grid,
            num_frames,
            config.head_dim,
            mode=config.rotation,
            reference_grid=config.reference_grid,
            temporal_positions=[first + t * step for t in range(num_frames)],
            temporal_stretch=max(1.0, longer) if ntk else 1.0,
            device=x.device,
            dtype=x.dtype if x.dtype == torch.float64 else torch.float32,
        )

    def _drop_patches(
        self, x: Tensor, tables: StRopeTables | None
    ) -> tuple[Tensor, StRopeTables | None]:
        """Keep a random subset of patches of each clip, in training only.

        The same patches stay in all frames: neighbouring frames show nearly the same, so single
        tokens would leak, and the rotation keeps its two small factors.
        """
        if not self.training or self.config.patch_dropout == 0.0:
            return x, tables
        num_clips, num_frames, num_patches, width = x.shape
        num_kept = max(1, round(num_patches * (1.0 - self.config.patch_dropout)))
        order = torch.rand(num_clips, num_patches, device=x.device).argsort(dim=1)
        kept = order[:, :num_kept].sort(dim=1).values  # (B, K)
        index = kept[:, None, :, None].expand(-1, num_frames, -1, width)
        return x.gather(2, index), None if tables is None else tables.select(kept)

    def _check_video(self, video: Tensor) -> None:
        size = self.config.image_size
        if video.dim() != 5 or video.shape[1] != 3 or tuple(video.shape[3:]) != (size, size):
            raise ValueError(
                f"video has shape {tuple(video.shape)}; this model takes "
                f"(B, 3, T, {size}, {size}). Resize the frames, or set image_size."
            )
        if not (video.is_floating_point() or video.dtype == torch.uint8):
            raise ValueError(f"video is {video.dtype}; pass uint8 pixels or normalised floats")
