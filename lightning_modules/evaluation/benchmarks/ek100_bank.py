"""The test clips against the training sentences: the bank of `score --bank`, and its hubs."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_modules.evaluation.benchmarks.ek100_mir import RetrievalAnnotations
from lightning_modules.evaluation.interface import Benchmark, BenchmarkData, Measured

_FIRST = 10


class EK100Bank(Benchmark):
    """Similarities of EK-100's retrieval clips to the training sentences, for their normalisation.

    Its figure is hubness: how skewed is the number of sentences that have a clip among their first
    ten (0: all clips alike; the more, the fewer clips are everybody's nearest). No percentage.

    Args:
        data: Its annotations are the folder of the retrieval CSVs; the split (`test` by default)
            says which clips.
    """

    name = "ek100_bank"
    columns: ClassVar = {"hubness": "hubness"}

    def __init__(self, data: BenchmarkData) -> None:
        directory = data.annotation_path(self.name, "the folder of EPIC_100_retrieval_*.csv")
        self.clip_ids = RetrievalAnnotations(directory, data.split or "test").ids[0]
        bank = RetrievalAnnotations(directory, "train").sentences
        self.prompts = [data.template.format(row.text) for row in bank]

    def predict(self, video: Tensor, text: Tensor, logit_scale: float) -> Tensor:
        """(clips, training sentences) cosine similarities."""
        return video @ text.T

    def measure(self, prediction: Tensor, present: Tensor) -> Measured:
        """`hubness`, and how many sentences there are."""
        known = prediction[present].double()
        first = known.topk(min(_FIRST, len(known)), dim=0).indices
        times = torch.bincount(first.flatten(), minlength=len(known)).double()
        spread = times - times.mean()
        deviation = spread.square().mean().sqrt()
        hubness = (spread**3).mean() / deviation**3 if deviation > 0 else torch.zeros(())
        return Measured(
            {
                "hubness": hubness.item(),
                "num_sentences": prediction.shape[1],
                "num_missing_clips": int((~present).sum()),
            }
        )
