"""Metrics as torchmetrics classes over ranks; the pure functions are in `.functional`."""

from lightning_modules.metrics.benchmarks import (
    ActionAccuracy,
    CharadesMAP,
    EgoMCQAccuracy,
    TextVideoRecall,
)
from lightning_modules.metrics.multi_instance import MultiInstanceMAP, MultiInstanceNDCG

__all__ = [
    "ActionAccuracy",
    "CharadesMAP",
    "EgoMCQAccuracy",
    "MultiInstanceMAP",
    "MultiInstanceNDCG",
    "TextVideoRecall",
]
