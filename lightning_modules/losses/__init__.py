"""Training losses over the global batch, as plain torch."""

from lightning_modules.losses.combined import ContrastiveMultiSimilarityLoss
from lightning_modules.losses.contrastive import EgoNCELoss, EgoNCEPlusPlusLoss, InfoNCELoss
from lightning_modules.losses.gather import gather_ids, gather_no_gradient, gather_with_gradient
from lightning_modules.losses.margin import (
    AdaptiveMaxMarginLoss,
    HardLabelMultiSimilarityLoss,
    MaxMarginLoss,
    SymmetricMultiSimilarityLoss,
)
from lightning_modules.losses.sigmoid import SigLIPLoss

__all__ = [
    "AdaptiveMaxMarginLoss",
    "ContrastiveMultiSimilarityLoss",
    "EgoNCELoss",
    "EgoNCEPlusPlusLoss",
    "HardLabelMultiSimilarityLoss",
    "InfoNCELoss",
    "MaxMarginLoss",
    "SigLIPLoss",
    "SymmetricMultiSimilarityLoss",
    "gather_ids",
    "gather_no_gradient",
    "gather_with_gradient",
]
