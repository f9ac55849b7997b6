"""EgoHOIBench: is a clip's caption told from those that differ in its verb, or in its noun?"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from datamodules.annotations.egohoi import MOST_NEGATIVES, HOIQuestion, read_egohoi
from datamodules.manifest import ClipRecord
from datamodules.stream.captions import CaptionNegatives, Vocabulary
from datamodules.stream.clips import own_text
from datamodules.vocabulary import read_vocabulary
from lightning_modules.evaluation.interface import Benchmark, BenchmarkData, Measured


class EgoHOIBench(Benchmark):
    """Accuracies of choosing the caption among those with another verb, another noun, and both.

    The protocol of EgoNCE++ (arXiv 2405.17719): the cosine similarity of a clip to its caption and
    to ten captions of each kind; the verb is right where the caption is the most similar of the
    first eleven, the noun of the second, the action where both are. One that is only as similar as
    a false one is wrong here, where the published code, with the caption in first place, counts it
    as right: a model that sees no difference would be perfect.

    The choices are the published table's, or made from a vocabulary for the captions of any shards
    whose clips have classes: ten draws at most of each kind, seeded by the clip's name.

    Args:
        data: Its annotations are the published table, or a vocabulary as `HardNegatives` has it.
    """

    name = "egohoi"
    columns: ClassVar = {"verb": "verb", "noun": "noun", "action": "action"}

    def __init__(self, data: BenchmarkData) -> None:
        path = data.annotation_path(self.name, "EgoHOIBench's table, or a vocabulary (JSON)")
        if path.is_dir() or path.suffix == ".json":
            questions = questions_of(data.records, read_vocabulary(path))
        else:
            questions = read_egohoi(path)
        self.questions = [q for q in questions if q.verb_negatives and q.noun_negatives]
        self.num_without = len(questions) - len(self.questions)
        if not self.questions:
            raise ValueError(
                f"no caption has choices of both kinds by {path}; are these its captions, and do "
                "the clips have verb and noun classes?"
            )
        self.clip_ids = list(dict.fromkeys(q.clip_id for q in self.questions))
        place = {clip_id: number for number, clip_id in enumerate(self.clip_ids)}
        self.rows = torch.tensor([place[q.clip_id] for q in self.questions])
        texts: dict[str, int] = {}
        rows = [
            [texts.setdefault(text, len(texts)) for text in (q.text, *q.verb_negatives)]
            + [-1] * (MOST_NEGATIVES - len(q.verb_negatives))
            + [texts.setdefault(text, len(texts)) for text in q.noun_negatives]
            + [-1] * (MOST_NEGATIVES - len(q.noun_negatives))
            for q in self.questions
        ]
        self.choices = torch.tensor(rows)  # caption, ten with another verb, ten with another noun
        self.prompts = [data.template.format(text) for text in texts]

    def predict(self, video: Tensor, text: Tensor, logit_scale: float) -> Tensor:
        """(questions, 1 + 10 + 10) cosine similarities; -inf where there is no such choice."""
        clips = video[self.rows]
        columns = []
        for choice in self.choices.T:
            similarity = (clips * text[choice]).sum(1)
            no_choice = (choice < 0) & ~similarity.isnan()
            columns.append(similarity.masked_fill(no_choice, -torch.inf))
        return torch.stack(columns, dim=1)

    def measure(self, prediction: Tensor, present: Tensor) -> Measured:
        """`verb`, `noun` and `action`, and what was left out."""
        asked = prediction[present[self.rows]]
        caption = asked[:, 0]
        verb = caption > asked[:, 1 : 1 + MOST_NEGATIVES].amax(1)
        noun = caption > asked[:, 1 + MOST_NEGATIVES :].amax(1)
        right = {"verb": verb, "noun": noun, "action": verb & noun}
        return Measured(
            {
                **{name: 100 * hits.double().mean().item() for name, hits in right.items()},
                "num_questions": len(asked),
                "num_questions_without_choices": self.num_without,
                "num_missing_clips": int((~present).sum()),
            },
            {name: hits.double().tolist() for name, hits in right.items()},
        )


def questions_of(records: Sequence[ClipRecord], vocabulary: Vocabulary) -> list[HOIQuestion]:
    """A question for each clip, its first text being the caption."""
    make = CaptionNegatives(vocabulary, MOST_NEGATIVES, MOST_NEGATIVES)
    questions = []
    for record in records:
        narration = own_text(record)
        captions = make.captions(narration, random.Random(record.clip_id))
        verbs, nouns = (
            tuple(dict.fromkeys(text for text in part if text))
            for part in (captions[:MOST_NEGATIVES], captions[MOST_NEGATIVES:])
        )
        questions.append(HOIQuestion(record.clip_id, narration.text, verbs, nouns))
    return questions
