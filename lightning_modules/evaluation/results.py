"""What an evaluation writes: its figures, its prediction, a submission."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.files import write_atomically, write_whole
from lightning_modules.evaluation.benchmarks.ek100_mir import EK100Retrieval
from lightning_modules.evaluation.engine import Evaluation
from lightning_modules.evaluation.submission import write_submission


@dataclass(frozen=True)
class Outputs:
    """Files to write; None for those that are not.

    Attributes:
        json: The result, with each query's own value.
        prediction: The similarities or logits, as .npy.
        submission: The challenge's zip, of EK-100 retrieval alone.
        rerank_scores: A re-ranker's scores alone, as .npy.
    """

    json: Path | None = None
    prediction: Path | None = None
    submission: Path | None = None
    rerank_scores: Path | None = None

    def check(self, benchmark: str) -> None:
        """Refuse a submission of another benchmark.

        Raises:
            ValueError: It is one.
        """
        if self.submission is not None and benchmark != EK100Retrieval.name:
            raise ValueError(f"a submission is for {EK100Retrieval.name}, not {benchmark}")

    def write(self, done: Evaluation, protocol: str, checkpoint: str) -> str:
        """Write them.

        Args:
            done: What came out.
            protocol: What was done at test time, in words.
            checkpoint: What was evaluated.

        Returns:
            The result as JSON.
        """
        metrics = done.measured.metrics
        result: dict[str, Any] = {"benchmark": done.benchmark.name, "protocol": protocol, **metrics}
        if done.second_stage is not None:
            result["num_pairs_reranked"] = done.second_stage.num_pairs
        if self.json is not None:
            whole = result | {"checkpoint": checkpoint, "per_query": done.measured.per_query}
            write_atomically(self.json, json.dumps(_without_nan(whole)) + "\n")
        if self.prediction is not None:
            write_whole(self.prediction, lambda path: _save(path, done.prediction))
        if self.rerank_scores is not None:
            write_whole(self.rerank_scores, lambda path: _save(path, _scores_of(done)))
        if self.submission is not None and isinstance(done.benchmark, EK100Retrieval):
            ids = done.benchmark.annotations.ids
            write_submission(self.submission, done.prediction, *ids)
        return json.dumps(_without_nan(result), indent=2)


def _save(path: Path, matrix: Tensor) -> None:
    with path.open("wb") as file:
        np.save(file, matrix.numpy())


def _scores_of(done: Evaluation) -> Tensor:
    """The scores, NaN in the rows of missing clips as in the prediction."""
    stage, prediction = done.second_stage, done.prediction
    scores = torch.zeros_like(prediction) if stage is None else stage.scores
    return scores.masked_fill(prediction.isnan(), torch.nan)


def _without_nan(content: Any) -> Any:
    """The same with null for NaN (what was left out), which JSON does not know."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content
