"""Margin losses for multi-instance retrieval: MI-MM, adaptive MI-MM, SMS and its Charades form.

Notation of eq. 16: anchor i, its partner j (the diagonal) and every other item k of the global
batch; c is relevance, S cosine similarity; both directions, video to text and text to video.

Both directions live in the same matrix: element (i, k) of S is a negative of video i (compare with
S_ii) and of text k (compare with S_kk). So a rank needs only the rows of its own videos, and the
diagonals of all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lightning_modules.losses.blockwise import blockwise_sum, checked_pairs
from lightning_modules.losses.gather import GlobalBatch


class _MarginLoss(nn.Module, ABC):
    """Mean of a penalty over the off-diagonal pairs of both directions; subclasses give it.

    In a distributed run every rank returns the loss of the global batch, and averaging gradients
    over ranks, as DDP, FSDP and DeepSpeed do, gives the gradient of one process with the whole
    batch; ranks may hold batches of different sizes. Computed in fp32. A global batch of one pair
    has no negatives: its loss is 0.

    Args:
        margin: gamma of the equations.
        gather: Compare with the batches of all ranks; `False` stays within each rank's own.
    """

    def __init__(self, margin: float, gather: bool = True) -> None:
        super().__init__()
        self.margin = margin
        self.gather = gather

    @abstractmethod
    def penalty(self, gap: Tensor, relevance: Tensor, other_relevance: Tensor) -> Tensor:
        """Elementwise penalty of the equation.

        Args:
            gap: S_ij - S_ik.
            relevance: c_ij, broadcast over the anchor's negatives.
            other_relevance: c_ik.

        Returns:
            Penalties of the shape of `gap`.
        """

    def forward(
        self, video: Tensor, text: Tensor, relevance: Tensor, *, even: bool = False
    ) -> Tensor:
        """Return the scalar loss.

        Args:
            video: (B_local, E), L2-normalised.
            text: (B_local, E), L2-normalised; row b is the partner of video b.
            relevance: c of videos (rows) against texts (columns), constant in the loss and not
                necessarily symmetric. (B_local, B_global) with the rows of this rank's videos, or
                the whole (B_global, B_global) on every rank; global order is that of ranks. With
                class ids: `relevance_matrix(verbs, nouns, gather_no_gradient(text_verbs),
                gather_no_gradient(text_nouns))`.
            even: Every rank's batch has this one's size (see `lightning_modules.losses.gather`).

        Raises:
            ValueError: Shapes do not match.
        """
        video, text = checked_pairs(video, text)
        batch = GlobalBatch.of(video, self.gather, even)
        relevance = _own_rows(relevance, len(video), batch)
        partners = torch.stack([(video * text).sum(1), relevance.diagonal(batch.first)], dim=1)
        every_text, partners = batch.gather(torch.cat([text, partners], dim=1)).split(
            [text.shape[1], 2], dim=1
        )
        partner_relevance = partners[:, 1].detach()

        def block_loss(similarity: Tensor, start: int, partner: Tensor) -> Tensor:
            own = slice(batch.first + start, batch.first + start + len(similarity))
            other = relevance[start : start + len(similarity)].to(similarity.dtype)
            to_texts = self.penalty(
                partner[own, None] - similarity, partner_relevance[own, None], other
            )
            to_videos = self.penalty(partner - similarity, partner_relevance, other)
            penalties = to_texts + to_videos
            return penalties.sum() - penalties.diagonal(own.start).sum()

        share = blockwise_sum(block_loss, video, every_text, partners[:, 0])
        return batch.sum(share) / max(1, 2 * len(batch) * (len(batch) - 1))


def _own_rows(relevance: Tensor, num_own: int, batch: GlobalBatch) -> Tensor:
    """Rows of this rank's videos, (B_local, B_global), of either form of `relevance`."""
    if relevance.shape == (num_own, len(batch)):
        return relevance
    if relevance.shape == (len(batch), len(batch)):
        return relevance[batch.first : batch.first + num_own]
    raise ValueError(
        f"relevance has shape {tuple(relevance.shape)}; it must be (B_local, B_global) = "
        f"({num_own}, {len(batch)}) or (B_global, B_global) = ({len(batch)}, {len(batch)})"
    )


class MaxMarginLoss(_MarginLoss):
    """MI-MM, the max-margin loss of multi-instance retrieval: relu(gamma - S_ij + S_ik).

    Relevance has no part in the penalty; it is accepted so that all losses of this family are
    called alike. Values and gradients over ranks as `SymmetricMultiSimilarityLoss` says.

    Args:
        margin: gamma; 0.2 in AVION, LaViLa and table V of EVA02-AT.
        gather: `False` compares within each rank's own batch only.
    """

    def __init__(self, margin: float = 0.2, gather: bool = True) -> None:
        super().__init__(margin, gather)

    def penalty(self, gap: Tensor, relevance: Tensor, other_relevance: Tensor) -> Tensor:
        """relu(gamma - (S_ij - S_ik))."""
        return (self.margin - gap).relu()


class AdaptiveMaxMarginLoss(_MarginLoss):
    """Adaptive MI-MM: relu(c_ij * gamma - S_ij + S_ik), the margin scaled by the partner's c.

    Args:
        margin: gamma; 0.4 in table V of EVA02-AT.
        gather: `False` compares within each rank's own batch only.
    """

    def __init__(self, margin: float = 0.4, gather: bool = True) -> None:
        super().__init__(margin, gather)

    def penalty(self, gap: Tensor, relevance: Tensor, other_relevance: Tensor) -> Tensor:
        """relu(c_ij * gamma - (S_ij - S_ik))."""
        return (relevance * self.margin - gap).relu()


class SymmetricMultiSimilarityLoss(_MarginLoss):
    """SMS (EVA02-AT, eq. 16): similarity differences follow relevance differences.

    With R = c_ij - c_ik:

    - R >= threshold: relu(R * margin - S_ij + S_ik)
    - R <= -threshold: relu(-R * margin + S_ij - S_ik)
    - otherwise: relu(|S_ij - S_ik| - relaxation)

    averaged over the off-diagonal pairs of both directions. Relevance is a constant.

    Args:
        margin: gamma, 0.6; 0.3 to 0.8 moves mAP by 1.2 at most.
        relaxation: tau, 0.1; 0 is table V's "SMS with tau = 0".
        threshold: lambda, the band of R that counts as equal relevance: 0.1. The authors' earlier
            public code has 1.1/240, because its relevance matrix is 8-bit.
        gather: `False` compares within each rank's own batch only.
    """

    def __init__(
        self,
        margin: float = 0.6,
        relaxation: float = 0.1,
        threshold: float = 0.1,
        gather: bool = True,
    ) -> None:
        super().__init__(margin, gather)
        if relaxation < 0 or threshold <= 0:
            raise ValueError(
                f"relaxation {relaxation} and threshold {threshold} given; the relaxation may not "
                "be negative and the threshold must be positive"
            )
        self.relaxation = relaxation
        self.threshold = threshold

    def penalty(self, gap: Tensor, relevance: Tensor, other_relevance: Tensor) -> Tensor:
        """The three cases of eq. 16."""
        difference = relevance - other_relevance
        target = difference * self.margin
        more = torch.where(difference >= self.threshold, target - gap, gap.abs() - self.relaxation)
        return torch.where(difference <= -self.threshold, gap - target, more).relu()


class HardLabelMultiSimilarityLoss(SymmetricMultiSimilarityLoss):
    """SMS for hard, possibly several labels a clip (EVA02-AT, eq. 17, Charades-Ego).

    R = 1 where text k describes none of clip i's actions: relu(margin - S_ij + S_ik); R = 0 where
    it does: relu(|S_ij - S_ik| - relaxation). This is eq. 16 on relevance that is 0 or 1; any
    positive relevance counts as 1, so that soft labels of clips without nouns (0 or 1/2) fit too.

    Args:
        margin: gamma, 0.3.
        relaxation: tau, 0.1.
        gather: `False` compares within each rank's own batch only.
    """

    def __init__(self, margin: float = 0.3, relaxation: float = 0.1, gather: bool = True) -> None:
        super().__init__(margin, relaxation, threshold=0.5, gather=gather)

    def forward(
        self, video: Tensor, text: Tensor, relevance: Tensor, *, even: bool = False
    ) -> Tensor:
        """As `SymmetricMultiSimilarityLoss`, with relevance > 0 meaning "is a label of"."""
        return super().forward(video, text, relevance > 0, even=even)
