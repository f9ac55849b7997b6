"""Image-text matching on relevance, with hard negatives mined over the global batch.

For the pairs (i, i) of the batch, and for each of them one text k(i) and one clip m(i) that the
dual encoder takes for near,

    L = 1/|P| sum over (i, j) in P of BCE(l_ij, c_ij),  P = {(i, i)} + {(i, k(i))} + {(m(i), i)}

l being the re-ranker's logit and c the relevance. k(i) is drawn among the texts with c_ik < below,
with probability proportional to exp(S_ik / temperature), S being the dual encoder's cosines; m(i)
among the clips likewise (ALBEF, arXiv 2107.07651, draws from the softmax of a rank's own batch).
The target is the relevance itself: a text that shares the verb alone is neither a match nor none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.losses.gather import GlobalBatch


@dataclass(frozen=True)
class Pairs:
    """Pairs of a global batch of B, in an order that every rank has alike.

    Attributes:
        clips: (P,) int64, places in the global batch.
        texts: (P,) int64.
    """

    clips: Tensor
    texts: Tensor

    def __len__(self) -> int:
        return len(self.clips)

    def of_clips(self, first: int, count: int) -> Pairs:
        """The pairs whose clips are `first`, ... : a rank's own."""
        own = (self.clips >= first) & (self.clips < first + count)
        return Pairs(self.clips[own], self.texts[own])


def mine_pairs(
    similarity: Tensor, relevance: Tensor, seed: int, *, temperature: float, below: float
) -> Pairs:
    """Choose P: the same on every rank, for the same arguments.

    Args:
        similarity: (B, B) cosines of clips (rows) and texts, on the CPU.
        relevance: (B, B) c, on the CPU.
        seed: Of the draws.
        temperature: Of the draws; towards 0 the hardest is taken.
        below: Relevance from which on an item is no negative.

    Returns:
        The B pairs of the batch, then at most one mined text a clip, then at most one mined clip a
        text: none where nothing in the batch is irrelevant enough.
    """
    size = len(similarity)
    own = torch.arange(size)
    generator = torch.Generator().manual_seed(seed)
    allowed = relevance < below
    allowed[own, own] = False
    clips, texts = [own], [own]
    for side in (0, 1):  # texts of clips, clips of texts
        noise = torch.rand(size, size, generator=generator, dtype=torch.float64)
        gumbel = -(-noise.clamp_min(1e-300).log()).clamp_min(1e-300).log()
        score, may = similarity.double(), allowed
        if side:
            score, may = score.T, may.T
        drawn = (score / temperature + gumbel).masked_fill(~may, -torch.inf).argmax(dim=1)
        anchors = may.any(dim=1).nonzero().squeeze(1)
        pair = (anchors, drawn[anchors])
        clips.append(pair[side])
        texts.append(pair[1 - side])
    return Pairs(torch.cat(clips), torch.cat(texts))


def matching_loss(logits: Tensor, relevance: Tensor, num_pairs: int, batch: GlobalBatch) -> Tensor:
    """L of the module: of all ranks' pairs, on every rank.

    Args:
        logits: (P_local,) of this rank's pairs.
        relevance: (P_local,) their c.
        num_pairs: |P|, over all ranks.
        batch: How the clips lie over the ranks.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    with torch.autocast(logits.device.type, enabled=False):
        targets = relevance.to(logits.dtype)
        share = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return batch.sum(share / num_pairs)
