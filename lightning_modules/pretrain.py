"""Contrastive pretraining on narrated clips."""

from __future__ import annotations

from torch import Tensor

from datamodules.batch import ClipBatch
from lightning_modules.base import DualEncoderModule
from lightning_modules.losses import EgoNCELoss, SigLIPLoss


class PretrainModule(DualEncoderModule):
    """Pretrain a dual encoder with InfoNCE (EVA02-AT, AVION, LaViLa), EgoNCE or SigLIP.

    The arguments are `DualEncoderModule`'s.
    """

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        """Return the contrastive loss over the global batch."""
        video, text, logit_scale = self(batch)
        if isinstance(self.loss, EgoNCELoss):
            classes = batch.verb_classes, batch.noun_classes
            loss = self.loss(video, text, *classes, logit_scale=logit_scale, even=batch.even)
        elif isinstance(self.loss, SigLIPLoss):
            loss = self.loss(video, text, even=batch.even)
        else:
            loss = self.loss(video, text, logit_scale=logit_scale, even=batch.even)
        return self.log_loss(loss, logit_scale, len(batch))
