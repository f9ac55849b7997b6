"""SMS with a share of InfoNCE: graded relevance, and the confusions that are few but hard."""

from __future__ import annotations

from torch import Tensor

from lightning_modules.losses.contrastive import InfoNCELoss
from lightning_modules.losses.margin import SymmetricMultiSimilarityLoss


class ContrastiveMultiSimilarityLoss(SymmetricMultiSimilarityLoss):
    """L = L_SMS + weight * L_InfoNCE, both over the same global batch.

    SMS is the mean of hinges over all pairs of the batch: a confusion that few pairs show (two
    objects of one colour, say) weighs no more than its share of them. InfoNCE's softmax gives the
    weight to just those. docs/demo.md has what that changes on the demo world. Ours, not the
    paper's. InfoNCE takes the training pairs for the only matches: choose them by a high
    `min_relevance`.

    Args:
        margin: SMS's gamma.
        relaxation: SMS's tau.
        threshold: SMS's lambda.
        weight: Of InfoNCE.
        temperature: Of InfoNCE.
        gather: `False` compares within each rank's own batch only.

    Raises:
        ValueError: A value is out of its range.
    """

    def __init__(
        self,
        margin: float = 0.6,
        relaxation: float = 0.1,
        threshold: float = 0.1,
        weight: float = 0.05,
        temperature: float = 0.07,
        gather: bool = True,
    ) -> None:
        super().__init__(margin, relaxation, threshold, gather)
        if not weight >= 0:
            raise ValueError(f"weight {weight} of InfoNCE given; it may not be negative")
        self.weight = weight
        self.info_nce = InfoNCELoss(temperature, gather)

    def forward(
        self, video: Tensor, text: Tensor, relevance: Tensor, *, even: bool = False
    ) -> Tensor:
        """As `SymmetricMultiSimilarityLoss`."""
        graded = super().forward(video, text, relevance, even=even)
        return graded + self.weight * self.info_nce(video, text, even=even)
