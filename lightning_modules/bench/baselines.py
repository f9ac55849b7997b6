"""The same model as the field writes it, on the same parameters: what the benches compare against.

Written from timm's published formulation of EVA-02 (materialised sine and cosine tables, a rotated
copy of q and of k, three projections, scores and softmax spelled out) and from how AVION's recipes
train (float video normalised pixel by pixel, a convolution for the patches, every block
recomputed). The parameters are this project's, so that outputs and losses must agree.

Shape legend: B clips, S = 1 + T*N tokens, H heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.st_rope import StRopeTables
from lightning_modules.models import DualEncoder, VideoEncoder
from lightning_modules.models.config import CLIP_MEAN, CLIP_STD
from lightning_modules.models.layers import Attention, Block, Mlp, SwiGlu

Rotation = tuple[Tensor, Tensor] | None


def materialised_tables(tables: StRopeTables, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Sine and cosine of every token and channel, (T*N, D) each."""
    space, time = (torch.view_as_complex(table.float()) for table in tables)
    factor = (time[:, None] * space[None]).flatten(0, 1)
    sin, cos = (part.repeat_interleave(2, dim=-1) for part in (factor.imag, factor.real))
    return sin.to(dtype), cos.to(dtype)


def rotate_tokens(x_BHSD: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """timm's way: x cos + rot(x) sin, rot(x) being a permuted copy, and the CLS put back."""
    cls, x = x_BHSD[:, :, :1], x_BHSD[:, :, 1:]
    turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).reshape(x.shape)
    return torch.cat([cls, x * cos + turned * sin], dim=2).type_as(x_BHSD)


def attend(q: Tensor, k: Tensor, v: Tensor, *, explicit: bool, causal: bool = False) -> Tensor:
    """(B, H, S, D) each; scores and softmax spelled out, or SDPA."""
    if not explicit:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    if causal:
        future = torch.full_like(scores[0, 0], -torch.inf).triu_(1)
        scores = scores + future
    return scores.softmax(dim=-1) @ v


def attention(
    module: Attention, x: Tensor, rotation: Rotation, *, explicit: bool, causal: bool = False
) -> Tensor:
    """Three projections, rotated copies, heads in front."""
    weights = module.qkv.weight.chunk(3)
    biases = (module.qkv.q_bias, module.qkv.k_bias, module.qkv.v_bias)
    heads = (
        F.linear(x, w, b).unflatten(-1, (module.num_heads, -1)).transpose(1, 2)
        for w, b in zip(weights, biases, strict=True)
    )
    q, k, v = heads
    if rotation is not None:
        q, k = rotate_tokens(q, *rotation), rotate_tokens(k, *rotation)
    out = attend(q, k, v, explicit=explicit, causal=causal)
    out = out.transpose(1, 2).reshape(x.shape)
    if isinstance(module.norm, nn.LayerNorm):
        out = layer_norm(module.norm, out)
    return module.proj(out)


def mlp(module: SwiGlu | Mlp, x: Tensor) -> Tensor:
    """SwiGLU with two separate projections; CLIP's MLP is the same in both."""
    if isinstance(module, Mlp):
        return module(x)
    gate_weight, value_weight = module.w12.weight.chunk(2)
    gate_bias, value_bias = module.w12.bias.chunk(2)
    gate, value = F.linear(x, gate_weight, gate_bias), F.linear(x, value_weight, value_bias)
    return module.fc2(layer_norm(module.norm, F.silu(gate) * value))


def layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """PyTorch's, whatever the module runs."""
    return F.layer_norm(x, module.normalized_shape, module.weight, module.bias, module.eps)


def block(
    module: Block, x: Tensor, rotation: Rotation, explicit: bool = True, causal: bool = False
) -> Tensor:
    """One pre-norm block."""
    normed = layer_norm(module.norm1, x)
    x = x + attention(module.attn, normed, rotation, explicit=explicit, causal=causal)
    return x + mlp(module.mlp, layer_norm(module.norm2, x))


def encode_video(tower: VideoEncoder, video: Tensor, *, explicit: bool, recompute: bool) -> Tensor:
    """Normalise a float copy, convolve, and recompute every block in the backward pass."""
    mean, std = (video.new_tensor(v, dtype=torch.float32) for v in (CLIP_MEAN, CLIP_STD))
    mean, std = (v.view(3, 1, 1, 1) for v in (mean, std))
    normalised = (video.float() / 255.0 - mean) / std
    patch = tower.patch_embed
    size = (1, patch.patch_size, patch.patch_size)
    x = F.conv3d(normalised, patch.weight.unsqueeze(2), patch.bias, stride=size)
    x = x.flatten(3).permute(0, 2, 3, 1) + tower.pos_embed[:, None, 1:]  # (B, T, N, D)
    if tower.temporal_embed is not None:
        x = x + tower.temporal_embed[:, None]
    cls = (tower.cls_token + tower.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
    tables = tower._rotation_tables(x)
    rotation = None if tables is None else materialised_tables(tables, x.dtype)
    x = tower.norm_pre(torch.cat((cls, x.flatten(1, 2)), dim=1))
    for module in tower.blocks:
        x = _run(module, x, rotation, explicit, False, recompute)
    return tower.head(layer_norm(tower.norm, x[:, 0]))


def encode_text(model: DualEncoder, tokens: Tensor, *, explicit: bool, recompute: bool) -> Tensor:
    """CLIP's text tower with every block recomputed in the backward pass."""
    tower = model.text
    x = tower.token_embedding(tokens) + tower.positional_embedding
    for module in tower.blocks:
        x = _run(module, x, None, explicit, True, recompute)
    ends = tokens.argmax(dim=-1)
    pooled = layer_norm(tower.norm, x)[torch.arange(x.shape[0], device=x.device), ends]
    return tower.head(pooled)


def _run(
    module: nn.Module,
    x: Tensor,
    rotation: Rotation,
    explicit: bool,
    causal: bool,
    recompute: bool,
) -> Tensor:
    if recompute:
        return checkpoint(block, module, x, rotation, explicit, causal, use_reentrant=False)
    return block(module, x, rotation, explicit, causal)  # type: ignore[arg-type]
