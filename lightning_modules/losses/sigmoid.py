"""SigLIP's loss: each pair of the global batch on its own, texts passed round the ranks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.losses.blockwise import checked_pairs
from lightning_modules.losses.gather import GlobalBatch
from lightning_modules.losses.ring import ring_sum


class SigLIPLoss(nn.Module):
    """SigLIP (Zhai et al., arXiv 2303.15343): a sigmoid for each pair instead of a softmax.

        L = -1/B sum_i sum_j log sigmoid(z_ij (t x_i . y_j + b)),   z_ii = 1, else -1

    with t = exp(t') and b learnable, starting at t' = ln 10 and b = -10: nearly all pairs are
    negatives, and the first steps must not begin with pushing all of them apart. Pairs need no
    normalisation over the batch, so texts are passed round the ranks and no rank holds more than
    another's (B_local, E) beside its own (the paper's chunked form, section 3.3).

    Values and gradients over ranks as in `InfoNCELoss`; computed in fp32. t and b belong to the
    loss, not to the model: an exported model has neither, and its `logit_scale` stays as it was.

    Args:
        temperature: 1/t at the start.
        bias: b at the start.
        gather: `False` contrasts within each rank's own batch only.

    Attributes:
        log_scale: (1,) t'. Not 0-dim, as `DualEncoder.logit_scale`.
        bias: (1,) b.
    """

    def __init__(self, temperature: float = 0.1, bias: float = -10.0, gather: bool = True) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature {temperature} given; it must be positive")
        self.log_scale = nn.Parameter(torch.tensor([-math.log(temperature)]))
        self.bias = nn.Parameter(torch.tensor([float(bias)]))
        self.gather = gather

    def forward(self, video: Tensor, text: Tensor, *, even: bool = False) -> Tensor:
        """Return the scalar loss.

        Args:
            video: (B_local, E), L2-normalised.
            text: (B_local, E), L2-normalised; row b is the partner of video b.
            even: Every rank's batch has this one's size (see `lightning_modules.losses.gather`).

        Raises:
            ValueError: Shapes do not match.
        """
        video, text = checked_pairs(video, text)
        batch = GlobalBatch.of(video, self.gather, even)

        def block_loss(similarity: Tensor, start: int, owner: int, bias: Tensor) -> Tensor:
            sign = torch.full_like(similarity, -1)
            if owner == batch.rank:
                sign.diagonal(start).fill_(1)
            return -F.logsigmoid(sign * (similarity + bias)).sum()

        scale = self.log_scale.to(video.dtype).exp()
        share = ring_sum(block_loss, batch, video * scale, text, self.bias.to(video.dtype))
        return batch.sum(share) / max(1, len(batch))
