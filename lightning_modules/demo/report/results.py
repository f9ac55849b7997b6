"""What the report shows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class DemoResults:
    """What the demo has found out, V test clips by S sentences.

    Attributes:
        metrics: What `metrics.json` holds. All scores are in percent. A missing section, and None
            or NaN in place of a number, is shown as missing.
        pretrain_log: CSV of the pretraining run, with columns `step` and `train/loss`; None where
            nothing was logged.
        fine_tune_log: CSV of fine-tuning, which may also have `val/map_avg` and `val/ndcg_avg`.
        similarity: (V, S) float32, of the fine-tuned model.
        relevance: (V, S) float32 in [0, 1].
        narrations: V texts, what the clips show.
        sentences: S texts, the queries.
        frames: Row of a clip -> (T, H, W, 3) uint8, for the clips that
            `gallery_rows(similarity, relevance)` names.
        configs: Name -> resolved YAML text.
    """

    metrics: dict[str, Any]
    pretrain_log: Path | None
    fine_tune_log: Path | None
    similarity: np.ndarray
    relevance: np.ndarray
    narrations: list[str]
    sentences: list[str]
    frames: dict[int, np.ndarray]
    configs: dict[str, str]

    def __post_init__(self) -> None:
        shape = (len(self.narrations), len(self.sentences))
        for name in ("similarity", "relevance"):
            given = getattr(self, name).shape
            if given != shape:
                raise ValueError(
                    f"{name} has shape {given}; with {shape[0]} narrations and {shape[1]} "
                    f"sentences it must be {shape}: a row for each clip, a column for each sentence"
                )
