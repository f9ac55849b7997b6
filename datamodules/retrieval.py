"""The DataModule of multi-instance retrieval: clips paired with relevant narrations."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from datamodules.manifest import ClipRecord
from datamodules.module import RetrievalSplit, StreamDataModule
from datamodules.stream.clips import ChooseText, Narration
from datamodules.stream.order import IntArray


class NarrationMiner:
    """Pairs a clip with any narration whose relevance is high enough ("hard mining").

    Relevance is c = 1/2 [verb class equal] + 1/2 IoU(noun classes). The candidates of a clip are
    found through indexes from class to sentences in some tens of microseconds; the training set's
    relevance matrix (67,217 x 15,989) is never formed.

    Args:
        sentences: The sentence list.
        min_relevance: Least c of a pair.
    """

    def __init__(self, sentences: Sequence[Narration], min_relevance: float) -> None:
        if not 0 < min_relevance <= 1:
            raise ValueError(f"min_relevance is {min_relevance}; it must be in (0, 1]")
        self.sentences, self.min_relevance = sentences, min_relevance
        self._sizes = np.array([len(set(s.noun_classes)) for s in sentences])
        self._by_verb = _rows_by_class([s.verb_classes for s in sentences])
        self._by_noun = _rows_by_class([s.noun_classes for s in sentences])

    @property
    def text_widths(self) -> tuple[int, int]:
        """Most verb classes and most noun classes of a sentence, at least 1."""
        verbs = max((len(s.verb_classes) for s in self.sentences), default=1)
        nouns = max((len(s.noun_classes) for s in self.sentences), default=1)
        return max(1, verbs), max(1, nouns)

    def candidates(self, record: ClipRecord) -> IntArray:
        """Rows of the sentences that are relevant enough for a clip, ascending."""
        same_verb = self._count(self._by_verb, record.verb_classes) > 0
        shared = self._count(self._by_noun, record.noun_classes)
        union = self._sizes + len(set(record.noun_classes)) - shared
        relevance = 0.5 * same_verb + 0.5 * shared / np.maximum(union, 1)
        return np.flatnonzero(relevance >= self.min_relevance)

    def _count(self, rows_by_class: dict[int, IntArray], classes: Sequence[int]) -> IntArray:
        """For each sentence, how many of the classes it has."""
        hits = [rows_by_class[c] for c in set(classes) if c in rows_by_class]
        rows = np.concatenate(hits) if hits else np.zeros(0, dtype=np.int64)
        return np.bincount(rows, minlength=len(self.sentences))

    def __call__(self, record: ClipRecord, generator: random.Random) -> Narration:
        """Return one of the relevant narrations, each equally likely.

        Raises:
            ValueError: There is none, so that clips and sentences cannot belong together.
        """
        rows = self.candidates(record)
        if len(rows) == 0:
            raise ValueError(
                f"clip {record.clip_id!r} has no narration with relevance >= {self.min_relevance}; "
                "the sentence list must be the one of the training clips"
            )
        return self.sentences[int(rows[generator.randrange(len(rows))])]


def _rows_by_class(classes: Sequence[Sequence[int]]) -> dict[int, IntArray]:
    rows: dict[int, list[int]] = {}
    for number, ids in enumerate(classes):
        for class_id in set(ids):
            rows.setdefault(class_id, []).append(number)
    return {class_id: np.array(numbers) for class_id, numbers in rows.items()}


class RetrievalDataModule(StreamDataModule):
    """Clips and narrations for multi-instance retrieval (EK-100 MIR).

    Validation and test yield two loaders, clips and sentences.

    Args:
        train: Training clips and sentences.
        val: What to validate on.
        test: What `test` runs on; `val` by default.
        min_relevance: Least relevance of a training pair of clip and narration.
        global_batch_size: Pairs a step over all ranks. It belongs to the recipe; each rank's share
            follows from the number of ranks, so that a run may move to more or fewer GPUs.
        eval_batch_size: Clips, or sentences, a rank and batch in evaluation.
        num_frames: Frames a clip.
        **options: As `StreamDataModule`.
    """

    def __init__(
        self,
        train: RetrievalSplit | None = None,
        val: RetrievalSplit | None = None,
        test: RetrievalSplit | None = None,
        min_relevance: float = 0.1,
        global_batch_size: int = 256,
        eval_batch_size: int = 32,
        num_frames: int = 16,
        **options: Any,
    ) -> None:
        super().__init__(
            global_batch_size=global_batch_size,
            eval_batch_size=eval_batch_size,
            num_frames=num_frames,
            **options,
        )
        self.min_relevance = min_relevance
        self.train_split, self.val_split, self.test_split = train, val, test
        self.train_manifests = [train.manifest] if train is not None else []

    def choose_text(self) -> ChooseText:
        """Any narration that is relevant enough, at random."""
        assert self.train_split is not None
        return NarrationMiner(self.train_split.sentences(self.allow_pipe), self.min_relevance)
