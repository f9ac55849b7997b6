"""Contrastive pretraining on narrated clips."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules.batch import ClipBatch
from lightning_modules.base import DualEncoderModule
from lightning_modules.losses import EgoNCELoss, EgoNCEPlusPlusLoss


class PretrainModule(DualEncoderModule):
    """Pretrain a dual encoder: InfoNCE (EVA02-AT, AVION, LaViLa), EgoNCE, EgoNCE++ or SigLIP.

    The arguments are `DualEncoderModule`'s.
    """

    def loss_takes(self) -> Sequence[str] | None:
        """A loss of pairs; some of ours take more, which the step knows."""
        return None if isinstance(self.loss, EgoNCEPlusPlusLoss | EgoNCELoss) else ("video", "text")

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        """Return the contrastive loss over the global batch."""
        if isinstance(self.loss, EgoNCEPlusPlusLoss):
            return self._step_with_negatives(batch, self.loss)
        video, text, logit_scale = self(batch)
        if isinstance(self.loss, EgoNCELoss):
            classes = batch.verb_classes, batch.noun_classes
            loss = self.loss(video, text, *classes, logit_scale=logit_scale, even=batch.even)
        else:
            loss = self.call_loss(video, text, logit_scale=logit_scale, even=batch.even)
        return self.log_loss(loss, logit_scale, len(batch))

    def _step_with_negatives(self, batch: ClipBatch, criterion: EgoNCEPlusPlusLoss) -> Tensor:
        """Captions and their negatives go through the text tower together."""
        if batch.negative_tokens is None:
            raise ValueError(
                "EgoNCEPlusPlusLoss needs captions that are false: set data.hard_negatives with a "
                "vocabulary and num_verbs or num_nouns above 0"
            )
        tokens = torch.cat([batch.tokens[:, None], batch.negative_tokens], dim=1)

        def encode(video: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return self.model(video, tokens.flatten(0, 1))

        video, texts, logit_scale = self.embed(encode, batch, tokens)
        text, *_ = rows = texts.unflatten(0, tokens.shape[:2]).unbind(1)
        negatives, is_negative = torch.stack(rows[1:], dim=1), batch.negative_tokens.any(dim=2)
        loss = criterion(
            video, text, negatives, is_negative, batch.noun_classes, logit_scale, even=batch.even
        )
        # a caption that names no word of its classes has none, without which little is learnt
        share = is_negative.float().mean()
        self.log("train/negatives", share, batch_size=len(batch))
        return self.log_loss(loss, logit_scale, len(batch))
