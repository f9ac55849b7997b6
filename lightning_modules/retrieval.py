"""Multi-instance retrieval: fine-tuning with soft labels, and its evaluation."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from datamodules.batch import ClipBatch
from datamodules.relevance import relevance_matrix
from lightning_modules.base import DualEncoderModule
from lightning_modules.losses import gather_ids


class RetrievalModule(DualEncoderModule):
    """Fine-tune a dual encoder for multi-instance retrieval with a relevance-aware loss.

    The soft labels of the global batch are computed on the device from the class ids that each
    sample carries, so that no process holds the training set's relevance matrix.
    The arguments are `DualEncoderModule`'s; `loss` takes (video, text, relevance).
    """

    def loss_takes(self) -> Sequence[str] | None:
        """The losses of relevance."""
        return "video", "text", "relevance"

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        """Return the retrieval loss over the global batch."""
        texts = gather_ids(  # on their way while the towers run
            (batch.text_verb_classes, batch.text_noun_classes),
            even=batch.even,
            same_widths=batch.same_text_widths,
        )
        video, text, logit_scale = self(batch)
        # (B_local, B_global): this rank's clips, everybody's texts
        relevance = relevance_matrix(batch.verb_classes, batch.noun_classes, *texts())
        loss = self.call_loss(video, text, relevance, even=batch.even)
        return self.log_loss(loss, logit_scale, len(batch))
