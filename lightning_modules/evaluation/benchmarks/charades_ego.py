"""Charades-Ego: actions of whole first-person videos."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from datamodules.annotations.charades_ego import (
    CLASSES_NAME,
    read_charades_classes,
    read_charades_tests,
)
from lightning_modules.evaluation.interface import Benchmark, BenchmarkData, Measured
from lightning_modules.metrics.functional.average_precision import charades_map


class CharadesEgo(Benchmark):
    """Mean average precision over the 157 classes, by cosine similarity to the classes' texts.

    Prompts are the lines of `Charades_v1_classes.txt` after the code. A video that is missing is
    left out and counted; one without any label ranks last; a class without a positive is left out
    of the mean and counted.

    Args:
        data: Its annotations are the folder of `CharadesEgo_v1_SPLIT_only1st.csv` and
            `Charades_v1_classes.txt`; split `test` by default.
    """

    name = "charades_ego"
    columns: ClassVar = {"mAP": "map"}

    def __init__(self, data: BenchmarkData) -> None:
        what = f"the folder of CharadesEgo_v1_test_only1st.csv and {CLASSES_NAME}"
        folder = data.annotation_path(self.name, what)
        classes = read_charades_classes(folder / CLASSES_NAME)
        split = data.split or "test"
        videos = read_charades_tests(folder / f"CharadesEgo_v1_{split}_only1st.csv")
        self.clip_ids = [video.clip_id for video in videos]
        self.prompts = [data.template.format(text) for text in classes]
        self.targets = torch.zeros(len(videos), len(classes), dtype=torch.uint8)
        for row, video in zip(self.targets, videos, strict=True):
            row[list(video.verb_classes)] = 1

    def predict(self, video: Tensor, text: Tensor, logit_scale: float) -> Tensor:
        """(videos, classes) cosine similarities."""
        return video @ text.T

    def measure(self, prediction: Tensor, present: Tensor) -> Measured:
        """`map`, and what was left out of it."""
        result = charades_map(prediction[present], self.targets[present])
        return Measured(
            {
                "map": 100 * result.map,
                "num_videos": int(present.sum()),
                "num_missing_clips": int((~present).sum()),
                "num_unlabelled": result.num_unlabelled,
                "num_excluded_classes": result.num_excluded_classes,
            }
        )
