"""Contrastive losses: InfoNCE and EgoNCE over the global batch.

Each rank takes its own videos as anchors against the texts of all ranks, and its own texts against
all videos: (B_local, B_global) work, a block of anchors at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_modules.losses.blockwise import blockwise_sum, checked_pairs
from lightning_modules.losses.gather import GlobalBatch, gather_ids

# (logits (block, B_global), place of the block's first anchor in the global batch) -> summed loss
AnchorLoss = Callable[[Tensor, int], Tensor]


class _ContrastiveLoss(nn.Module):
    """Temperature, gathering and the mean over both directions; subclasses give the positives.

    Args:
        temperature: Divides the cosine similarities. `None` takes the model's learnable
            `logit_scale` at each call instead.
        gather: Contrast with the batches of all ranks.
    """

    def __init__(self, temperature: float | None = 0.05, gather: bool = True) -> None:
        super().__init__()
        if temperature is not None and not temperature > 0:
            raise ValueError(
                f"temperature {temperature} given; it must be positive, or null to use the model's "
                "learnable logit scale"
            )
        self.temperature = temperature
        self.gather = gather

    def _mean_over_anchors(
        self,
        video: Tensor,
        text: Tensor,
        logit_scale: Tensor | None,
        even: bool,
        anchor_loss: AnchorLoss,
    ) -> Tensor:
        video, text = checked_pairs(video, text)
        scale = self._scale(logit_scale)
        batch = GlobalBatch.of(video, self.gather, even)
        every_video, every_text = batch.gather(torch.cat([video, text], dim=1)).chunk(2, dim=1)

        def block_loss(logits: Tensor, start: int) -> Tensor:
            return anchor_loss(logits, batch.first + start)

        share = blockwise_sum(block_loss, video * scale, every_text)
        share = share + blockwise_sum(block_loss, text * scale, every_video)
        return batch.sum(share) / (2 * max(1, len(batch)))

    def _scale(self, logit_scale: Tensor | None) -> Tensor | float:
        if self.temperature is not None:
            return 1 / self.temperature
        if logit_scale is None:
            raise ValueError("the temperature is null, so the loss needs the model's logit_scale")
        return logit_scale.float()


class InfoNCELoss(_ContrastiveLoss):
    """Bidirectional InfoNCE (CLIP's loss; the pretraining loss of EVA02-AT, AVION and LaViLa).

    Mean over both directions of -log softmax(S / temperature) at the anchor's own partner, over the
    global batch. In a distributed run every rank returns the loss of the global batch, and
    averaging gradients over ranks, as DDP, FSDP and DeepSpeed do, gives the gradient of one process
    with the whole batch; ranks may hold batches of different sizes. Computed in fp32.

    Args:
        temperature: Fixed temperature (EVA02-AT: 0.05; AVION and LaViLa: 0.07), or `None` to use
            the `logit_scale` of each call, with gradient.
        gather: `False` contrasts within each rank's own batch only.
    """

    def forward(
        self,
        video: Tensor,
        text: Tensor,
        logit_scale: Tensor | None = None,
        *,
        even: bool = False,
    ) -> Tensor:
        """Return the scalar loss.

        Args:
            video: (B_local, E), L2-normalised.
            text: (B_local, E), L2-normalised; row b is the partner of video b.
            logit_scale: exp of the learnable scale, 1/temperature; one element. Not used where
                the temperature is fixed.
            even: Every rank's batch has this one's size (see `lightning_modules.losses.gather`).

        Raises:
            ValueError: Shapes do not match, or there is no temperature at all.
        """

        def own_partner(logits: Tensor, first: int) -> Tensor:
            partners = torch.arange(first, first + len(logits), device=logits.device)
            return F.cross_entropy(logits, partners, reduction="sum")

        return self._mean_over_anchors(video, text, logit_scale, even, own_partner)


class EgoNCELoss(_ContrastiveLoss):
    """EgoNCE (EgoVLP, arXiv 2206.01670): InfoNCE with several positives an anchor.

    Positives of an anchor are its partner and every item that shares at least one verb *and* one
    noun class with it; the loss is -log of the probability that falls on any of them. EgoVLP's
    scene-aware negatives are a matter of sampling and not done here. Values and gradients over
    ranks as in `InfoNCELoss`.

    Args:
        temperature: Fixed temperature (EgoVLP: 0.05), or `None` as in `InfoNCELoss`.
        gather: `False` contrasts within each rank's own batch only.
    """

    def forward(
        self,
        video: Tensor,
        text: Tensor,
        verb_classes: Tensor,
        noun_classes: Tensor,
        logit_scale: Tensor | None = None,
        *,
        even: bool = False,
    ) -> Tensor:
        """Return the scalar loss.

        Args:
            video: (B_local, E), L2-normalised.
            text: (B_local, E), L2-normalised; row b is the partner of video b.
            verb_classes: (B_local, V) verb class ids of the pairs, padded with -1; V may differ
                between ranks.
            noun_classes: (B_local, N) noun class ids of the pairs, padded with -1.
            logit_scale: As in `InfoNCELoss`.
            even: As in `InfoNCELoss`. The widths of the ids are exchanged all the same.

        Raises:
            ValueError: Shapes do not match, or there is no temperature at all.
        """
        for name, ids in (("verb_classes", verb_classes), ("noun_classes", noun_classes)):
            if ids.ndim != 2 or len(ids) != len(video):
                raise ValueError(
                    f"{name} has shape {tuple(ids.shape)}; it must be (B, ids) with the batch's "
                    f"B = {len(video)}, rows padded with -1"
                )
        if self.gather:
            verb_classes, noun_classes = gather_ids((verb_classes, noun_classes), even=even)()
        share_verb, share_noun = _sharing(verb_classes), _sharing(noun_classes)

        def any_positive(logits: Tensor, first: int) -> Tensor:
            block = slice(first, first + len(logits))
            return _missed(logits, share_verb(block) & share_noun(block), first)

        return self._mean_over_anchors(video, text, logit_scale, even, any_positive)


class EgoNCEPlusPlusLoss(_ContrastiveLoss):
    """EgoNCE++ (Xu et al., arXiv 2405.17719): each direction has a task of its own.

    With s the cosine similarity over the temperature, video i and caption i partners:

        v2t_i = -log( e^s(v_i, t_i) / (sum_j e^s(v_i, t_j) + sum_k e^s(v_i, n_ik)) )
        t2v_i = -log( sum_{p in P_i} e^s(t_i, v_p) / sum_j e^s(t_i, v_j) )
        L = mean_i v2t_i + mean_i t2v_i

    Video to text, the captions n_ik differ from t_i in their verb or their noun, so that the video
    must tell them apart; a video meets its own alone. Text to video, P_i are the partner and all
    videos that share a noun class with it: objects keep their place. The paper has the negatives
    from a language model, or from the vocabulary, as `HardNegatives` makes them. Values and
    gradients over ranks as in `InfoNCELoss`; of negatives nothing is gathered.

    Args:
        temperature: Fixed temperature (the paper: 0.05), or `None` as in `InfoNCELoss`.
        gather: `False` contrasts within each rank's own batch only.
    """

    def forward(
        self,
        video: Tensor,
        text: Tensor,
        negatives: Tensor,
        is_negative: Tensor,
        noun_classes: Tensor,
        logit_scale: Tensor | None = None,
        *,
        even: bool = False,
    ) -> Tensor:
        """Return the scalar loss.

        Args:
            video: (B_local, E), L2-normalised.
            text: (B_local, E), L2-normalised; row b is the partner of video b.
            negatives: (B_local, K, E), L2-normalised; row b belongs to video b.
            is_negative: (B_local, K) bool, False where there is none.
            noun_classes: (B_local, N) noun class ids of the pairs, padded with -1.
            logit_scale: As in `InfoNCELoss`.
            even: As in `InfoNCELoss`. The widths of the ids are exchanged all the same.

        Raises:
            ValueError: Shapes do not match, or there is no temperature at all.
        """
        video, text = checked_pairs(video, text)
        if negatives.shape[::2] != video.shape or is_negative.shape != negatives.shape[:2]:
            raise ValueError(
                f"negatives have shape {tuple(negatives.shape)} and is_negative "
                f"{tuple(is_negative.shape)}; they must be (B, K, E) and (B, K), with the batch's "
                f"B = {len(video)} and E = {video.shape[1]}"
            )
        scale = self._scale(logit_scale)
        batch = GlobalBatch.of(video, self.gather, even)
        every_video, every_text = batch.gather(torch.cat([video, text], dim=1)).chunk(2, dim=1)
        if self.gather:
            (noun_classes,) = gather_ids((noun_classes,), even=even)()
        share_noun = _sharing(noun_classes)
        with torch.autocast(video.device.type, enabled=False):
            own = torch.einsum("be,bke->bk", video, negatives.to(video.dtype)) * scale
        own = own.masked_fill(~is_negative, -torch.inf)

        def to_text(logits: Tensor, start: int, own: Tensor) -> Tensor:
            block = slice(start, start + len(logits))
            partner = logits.diagonal(batch.first + start)
            return (torch.cat([logits, own[block]], dim=1).logsumexp(1) - partner).sum()

        def to_video(logits: Tensor, start: int) -> Tensor:
            first = batch.first + start
            return _missed(logits, share_noun(slice(first, first + len(logits))), first)

        share = blockwise_sum(to_text, video * scale, every_text, own)
        share = share + blockwise_sum(to_video, text * scale, every_video)
        return batch.sum(share) / max(1, len(batch))


def _missed(logits: Tensor, positive: Tensor, first: int) -> Tensor:
    """Sum over anchors of -log of the probability that falls on any of their positives.

    Args:
        logits: (block, B).
        positive: (block, B) bool; the partners are added to it, whatever their classes.
        first: Column of the first anchor's partner.
    """
    positive.diagonal(first).fill_(True)
    of_positives = logits.masked_fill(~positive, -torch.inf).logsumexp(1)
    return (logits.logsumexp(1) - of_positives).sum()


def _sharing(ids: Tensor) -> Callable[[slice], Tensor]:
    """From (B, V) ids padded with -1: rows -> (rows, B) bool, whether any class is shared.

    An item has one or two classes of hundreds, so the rows of those few in a (classes, B) table
    are far less work than a product of indicator matrices. On a GPU ids are compared instead: how
    many classes occur is a number that the host would have to wait for.
    """
    if ids.is_cuda:
        return compared_sharing(ids)
    classes, columns = torch.unique(ids, return_inverse=True)
    members = torch.zeros(len(classes), len(ids), dtype=torch.bool, device=ids.device)
    members[columns, torch.arange(len(ids), device=ids.device)[:, None]] = True
    members[classes < 0] = False
    return lambda rows: members[columns[rows]].any(dim=1)


def compared_sharing(ids: Tensor) -> Callable[[slice], Tensor]:
    """`_sharing` by comparing ids."""
    own = ids.masked_fill(ids < 0, -2)  # padding shares nothing

    def rows_sharing(rows: slice) -> Tensor:
        shared = torch.zeros(len(own[rows]), len(ids), dtype=torch.bool, device=ids.device)
        for column in own[rows].unbind(1):
            shared |= (column[:, None, None] == ids).any(dim=2)
        return shared

    return rows_sharing
