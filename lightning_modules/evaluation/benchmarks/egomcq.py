"""EgoMCQ: which of five clips does a sentence describe?"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from datamodules.annotations.egomcq import read_egomcq
from lightning_modules.evaluation.interface import Benchmark, BenchmarkData, Measured
from lightning_modules.evaluation.missing import Coverage
from lightning_modules.metrics.functional.choice import (
    INTER_VIDEO,
    INTRA_VIDEO,
    choice_correct,
    egomcq_accuracy,
)


class EgoMCQ(Benchmark):
    """Accuracy of questions whose choices are of different videos (inter) or of one (intra).

    The prediction is the cosine similarity of a question's text to each of its five clips. A
    question that lacks a clip is left out and counted.

    Args:
        data: Its annotations are `egomcq.json`, or its folder.
    """

    name = "egomcq"
    columns: ClassVar = {"inter": "inter", "intra": "intra"}

    def __init__(self, data: BenchmarkData) -> None:
        path = data.annotation_path(self.name, "egomcq.json")
        questions = read_egomcq(path / "egomcq.json" if path.is_dir() else path)
        row = {clip_id: None for question in questions for clip_id in question.clip_ids}
        self.clip_ids = list(row)
        place = {clip_id: number for number, clip_id in enumerate(self.clip_ids)}
        self.prompts = [data.template.format(question.text) for question in questions]
        self.choices = torch.tensor([[place[c] for c in q.clip_ids] for q in questions])
        self.answer = torch.tensor([question.answer for question in questions])
        self.types = torch.tensor([question.kind for question in questions])

    def predict(self, video: Tensor, text: Tensor, logit_scale: float) -> Tensor:
        """(questions, 5) cosine similarities."""
        columns = [(video[column] * text).sum(1) for column in self.choices.T]
        return torch.stack(columns, dim=1)

    def coverage(self, present: Tensor) -> Coverage:
        """In questions: one falls with any of its five clips."""
        return Coverage.of(self._whole(present), "questions")

    def _whole(self, present: Tensor) -> Tensor:
        return present[self.choices].all(dim=1)

    def measure(self, prediction: Tensor, present: Tensor) -> Measured:
        """`inter` and `intra`, their numbers of questions, and the questions left out."""
        whole = self._whole(present)
        correct = choice_correct(prediction[whole], self.answer[whole])
        types = self.types[whole]
        accuracy = egomcq_accuracy(correct, types)
        return Measured(
            {
                "inter": 100 * accuracy["inter"],
                "intra": 100 * accuracy["intra"],
                "num_inter": accuracy["num_inter"],
                "num_intra": accuracy["num_intra"],
                "num_excluded_questions": int((~whole).sum()),
                "num_missing_clips": int((~present).sum()),
            },
            {
                name: correct[types == kind].double().tolist()
                for name, kind in (("inter", INTER_VIDEO), ("intra", INTRA_VIDEO))
            },
        )
