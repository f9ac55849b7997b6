"""EK-100 multi-instance retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from datamodules.annotations.epic import (
    RetrievalClip,
    Sentence,
    read_retrieval_clips,
    read_sentences,
    retrieval_files,
)
from datamodules.batch import pad_class_ids
from lightning_modules.evaluation.interface import Benchmark, BenchmarkData, Measured
from lightning_modules.evaluation.similarity import dual_softmax
from lightning_modules.metrics.functional import (
    MultiInstanceScores,
    class_sets,
    multi_instance_scores_from_classes,
)


@dataclass(frozen=True)
class ClassIds:
    """Class ids of clips, or of sentences, one list each."""

    verbs: list[list[int]]
    nouns: list[list[int]]

    def __getitem__(self, kept: list[int]) -> ClassIds:
        return ClassIds([self.verbs[row] for row in kept], [self.nouns[row] for row in kept])

    def __len__(self) -> int:
        return len(self.verbs)


def score_classes(
    similarity: Tensor, clips: ClassIds, sentences: ClassIds, present: Tensor | None = None
) -> MultiInstanceScores:
    """Measure a (clips, sentences) similarity matrix.

    Args:
        similarity: Rows of clips, columns of sentences.
        clips: Classes of the rows.
        sentences: Classes of the columns.
        present: (clips,) bool: rows that count; all of them by default.

    Raises:
        ValueError: Wrong shape, or a NaN.
    """
    expected = (len(clips), len(sentences))
    if tuple(similarity.shape) != expected:
        raise ValueError(
            f"the similarity matrix has shape {tuple(similarity.shape)}; it must be "
            f"{expected}: {expected[0]} clips (rows) and {expected[1]} sentences (columns)"
        )
    if present is not None and not present.all():
        similarity = similarity[present]
        clips = clips[present.nonzero().flatten().tolist()]
    videos, texts = class_sets(
        (pad_class_ids(clips.verbs), pad_class_ids(sentences.verbs)),
        (pad_class_ids(clips.nouns), pad_class_ids(sentences.nouns)),
    )
    return multi_instance_scores_from_classes(similarity, videos, texts)


class RetrievalAnnotations:
    """The clips and sentences of a split, in their files' order.

    Args:
        directory: Folder with `EPIC_100_retrieval_SPLIT.csv` and its sentence file.
        split: `train` or `test`.

    Raises:
        ValueError: A file is missing or malformed.
    """

    def __init__(self, directory: Path, split: str) -> None:
        clip_file, sentence_file = retrieval_files(directory, split)
        self.clips: list[RetrievalClip] = read_retrieval_clips(clip_file)
        self.sentences: list[Sentence] = read_sentences(sentence_file, self.clips)

    @property
    def ids(self) -> tuple[list[str], list[str]]:
        """The narration ids of clips and of sentences, as a submission names them."""
        clips = [clip.narration_id for clip in self.clips]
        return clips, [sentence.narration_id for sentence in self.sentences]

    @property
    def classes(self) -> tuple[ClassIds, ClassIds]:
        """The classes of clips and of sentences."""
        sides: tuple[Sequence[RetrievalClip | Sentence], ...] = (self.clips, self.sentences)
        clips, sentences = (
            ClassIds([[x.verb_class] for x in side], [list(x.all_noun_classes) for x in side])
            for side in sides
        )
        return clips, sentences

    def score(self, similarity: Tensor, present: Tensor | None = None) -> MultiInstanceScores:
        """Measure a matrix of these clips and sentences: see `score_classes`."""
        return score_classes(similarity, *self.classes, present)


def refuse_undefined(scores: MultiInstanceScores) -> None:
    """Refuse scores that are an average of nothing.

    Raises:
        ValueError: Every query of a direction is left out.
    """
    for name, side in (("v2t", scores.v2t), ("t2v", scores.t2v)):
        if side.num_excluded_map == side.num_queries:
            raise ValueError(
                f"none of the {side.num_queries} queries of {name} has an item of relevance 1, so "
                "there is no mean average precision; are clips and sentences of the same split?"
            )


def scores_as_metrics(scores: MultiInstanceScores) -> dict[str, Any]:
    """Percentages of both scores, and how many queries there were and were left out."""
    sides = {"v2t": scores.v2t, "t2v": scores.t2v}

    def percent(v2t: float, t2v: float) -> dict[str, float]:
        return {"v2t": 100 * v2t, "t2v": 100 * t2v, "avg": 50 * (v2t + t2v)}

    return {
        "map": percent(scores.v2t.map, scores.t2v.map),
        "ndcg": percent(scores.v2t.ndcg, scores.t2v.ndcg),
        "num_queries": {name: side.num_queries for name, side in sides.items()},
        "num_excluded_map": {name: side.num_excluded_map for name, side in sides.items()},
        "num_excluded_ndcg": {name: side.num_excluded_ndcg for name, side in sides.items()},
    }


class MultiInstanceRetrieval(Benchmark):
    """Clips and sentences retrieve each other; mAP and nDCG with graded relevance.

    Prompts are the sentences, the prediction is the matrix of cosine similarities. Clips that are
    missing take part neither as queries nor as items, and are counted.

    Args:
        clip_ids: The clips.
        clips: Their classes.
        prompts: The sentences.
        sentences: Their classes.
        dual_softmax: Its scale; None for plain similarities.
    """

    name = "retrieval"
    columns: ClassVar = {
        "mAP V-T": "map.v2t",
        "mAP T-V": "map.t2v",
        "mAP": "map.avg",
        "nDCG V-T": "ndcg.v2t",
        "nDCG T-V": "ndcg.t2v",
        "nDCG": "ndcg.avg",
    }
    compares_all: ClassVar[bool] = True
    may_be_undefined: ClassVar[bool] = True  # shards of a user's own may have no classes

    def __init__(
        self,
        clip_ids: Sequence[str],
        clips: ClassIds,
        prompts: Sequence[str],
        sentences: ClassIds,
        dual_softmax: float | None = None,
    ) -> None:
        self.clip_ids, self.prompts = clip_ids, prompts
        self.clips, self.sentences = clips, sentences
        self.dual_softmax = dual_softmax

    def predict(self, video: Tensor, text: Tensor, logit_scale: float) -> Tensor:
        """(clips, sentences) cosine similarities."""
        return video @ text.T

    def measure(self, prediction: Tensor, present: Tensor) -> Measured:
        """`map` and `ndcg`, each `v2t`, `t2v` and `avg`, with what was left out."""
        return self._measured(self._scores(prediction, present), present)

    def measure_directions(self, by_clip: Tensor, by_text: Tensor, present: Tensor) -> Measured:
        """The same, `v2t` by the first matrix and `t2v` by the second."""
        first, second = (self._scores(matrix, present) for matrix in (by_clip, by_text))
        return self._measured(replace(first, t2v=second.t2v), present)

    def _scores(self, prediction: Tensor, present: Tensor) -> MultiInstanceScores:
        if self.dual_softmax is not None:
            rows = dual_softmax(prediction[present], self.dual_softmax)
            prediction = prediction.double().index_put((present.nonzero().squeeze(1),), rows)
        return score_classes(prediction, self.clips, self.sentences, present)

    def _measured(self, scores: MultiInstanceScores, present: Tensor) -> Measured:
        if not self.may_be_undefined:
            refuse_undefined(scores)
        sides = {"v2t": scores.v2t, "t2v": scores.t2v}
        return Measured(
            {**scores_as_metrics(scores), "num_missing_clips": int((~present).sum())},
            {
                "map": {name: side.query_map.tolist() for name, side in sides.items()},
                "ndcg": {name: side.query_ndcg.tolist() for name, side in sides.items()},
            },
        )


class EK100Retrieval(MultiInstanceRetrieval):
    """EK-100's clips and sentences, in the order of the published files.

    Args:
        data: Its annotations are the folder of the retrieval CSVs; split `test` by default.
    """

    name = "ek100_mir"
    may_be_undefined = False

    def __init__(self, data: BenchmarkData) -> None:
        directory = data.annotation_path(self.name, "the folder of EPIC_100_retrieval_*.csv")
        self.annotations = RetrievalAnnotations(directory, data.split or "test")
        clips, sentences = self.annotations.classes
        prompts = [data.template.format(row.text) for row in self.annotations.sentences]
        clip_ids = self.annotations.ids[0]
        super().__init__(clip_ids, clips, prompts, sentences, data.dual_softmax)
