"""A contrastive batch larger than the activations that fit (GradCache, Gao et al. 2021).

Gradient accumulation over micro-batches would shrink the contrastive batch. GradCache embeds the
micro-batches without keeping activations, computes the loss over all embeddings, and then embeds
each micro-batch again to push its embeddings' gradients through. Non-reentrant checkpointing of
the whole encoder, a micro-batch at a time, is exactly that, in one backward pass: so DDP and ZeRO
reduce each gradient once, and random numbers are replayed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Encode = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def encode_in_micro_batches(
    encode: Encode, video: Tensor, tokens: Tensor, micro_batch: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Embed a batch such that the backward pass holds one micro-batch's activations at a time.

    Values and gradients are those of `encode(video, tokens)` up to rounding (random dropping
    aside, which is drawn for each micro-batch); the price is one more forward pass.

    Args:
        encode: The dual encoder: (b, ...) videos and (b, 77) tokens to (b, E), (b, E) and the
            logit scale.
        video: (B, ...).
        tokens: (B, 77).
        micro_batch: Pairs at a time; None, or at least B, embeds in one piece.

    Returns:
        (B, E) video embeddings, (B, E) text embeddings, and the logit scale.
    """
    if micro_batch is None or micro_batch >= len(video) or not torch.is_grad_enabled():
        return encode(video, tokens)
    parts = [
        checkpoint(encode, *pair, use_reentrant=False)
        for pair in zip(video.split(micro_batch), tokens.split(micro_batch), strict=True)
    ]
    videos, texts, scales = zip(*parts, strict=True)
    return torch.cat(videos), torch.cat(texts), scales[0]
