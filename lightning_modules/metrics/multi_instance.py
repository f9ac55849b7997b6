"""Multi-instance retrieval over ranks and batches: mAP and nDCG from embeddings and class ids."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lightning_modules.metrics.functional import (
    DirectionScores,
    MultiInstanceScores,
    class_sets,
    multi_instance_scores_from_embeddings,
)
from lightning_modules.metrics.sample_store import SampleStore, first_of_each, kept

Modality = Literal["video", "text"]
MODALITIES: tuple[Modality, ...] = ("video", "text")


class _MultiInstanceMetric(SampleStore):
    """Embeddings, ids and class ids of videos and texts; subclasses pick the score.

    All subclasses have the same state, so that a `MetricCollection` keeps it once.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for modality in MODALITIES:
            self.add_rows(f"{modality}_embeddings", torch.float32, ndim=2)
            self.add_rows(f"{modality}_index", torch.int64)
            # Class ids as (sample id, class id) pairs: rows of ids would be as wide as the widest
            # sample of each batch, and could not be concatenated.
            self.add_rows(f"{modality}_verbs", torch.int64, ndim=2)
            self.add_rows(f"{modality}_nouns", torch.int64, ndim=2)

    def update(
        self,
        embeddings: Tensor,
        index: Tensor,
        verb_classes: Tensor,
        noun_classes: Tensor,
        modality: Modality,
        mask: Tensor | None = None,
    ) -> None:
        """Add a batch of one modality.

        Args:
            embeddings: (B, E), L2-normalised; kept as float32.
            index: (B,) the samples' identities; of equal ones the first counts.
            verb_classes: (B, V) class ids, rows padded with -1.
            noun_classes: (B, N) class ids, rows padded with -1.
            modality: "video" or "text": which side these are.
            mask: (B,) bool, False for rows that only pad the batch.

        Raises:
            ValueError: Unknown modality, or the numbers of rows differ.
        """
        if modality not in MODALITIES:
            raise ValueError(f"modality {modality!r} given; it must be 'video' or 'text'")
        sizes = [len(rows) for rows in (embeddings, index, verb_classes, noun_classes)]
        if embeddings.ndim != 2 or len(set(sizes)) != 1:
            raise ValueError(
                f"embeddings have shape {tuple(embeddings.shape)}, index, verb_classes and "
                f"noun_classes {sizes[1:]} rows; all must have B rows, and embeddings be (B, E)"
            )
        embeddings, index, verb_classes, noun_classes = kept(
            mask, embeddings, index, verb_classes, noun_classes
        )
        self.append(f"{modality}_embeddings", embeddings)
        self.append(f"{modality}_index", index)
        self.append(f"{modality}_verbs", _class_pairs(index, verb_classes))
        self.append(f"{modality}_nouns", _class_pairs(index, noun_classes))

    def scores(self) -> MultiInstanceScores:
        """Both scores of both directions with the numbers of queries left out, as fractions.

        Of this process's samples only: `compute` is what gathers over ranks.

        Raises:
            ValueError: There are no videos or no texts, or an embedding is NaN.
        """
        embeddings, verbs, nouns = {}, {}, {}
        for modality in MODALITIES:
            ids, places = first_of_each(self.rows(f"{modality}_index"))
            embeddings[modality] = self.rows(f"{modality}_embeddings")[places]
            verbs[modality] = _padded_ids(ids, self.rows(f"{modality}_verbs"))
            nouns[modality] = _padded_ids(ids, self.rows(f"{modality}_nouns"))
        video_classes, text_classes = class_sets(
            (verbs["video"], verbs["text"]), (nouns["video"], nouns["text"])
        )
        return multi_instance_scores_from_embeddings(
            embeddings["video"], embeddings["text"], video_classes, text_classes
        )

    def compute(self) -> dict[str, Tensor]:
        """Return `v2t`, `t2v` and their mean `avg` in percent, 0-dim float64.

        NaN where every query is left out; `num_excluded` of the functional says how many are.

        Raises:
            ValueError: There are no videos or no texts, or an embedding is NaN.
        """
        scores = self.scores()
        values = torch.tensor(
            [self._score(scores.v2t), self._score(scores.t2v)], dtype=torch.float64
        ).mul_(100)
        return {"v2t": values[0], "t2v": values[1], "avg": values.mean()}

    def _score(self, direction: DirectionScores) -> float:
        raise NotImplementedError


class MultiInstanceMAP(_MultiInstanceMetric):
    """Mean average precision of EK-100 multi-instance retrieval, in percent.

    Graded relevance c = 1/2 [verb class equal] + 1/2 IoU(noun classes), cumulated, taken at the
    places of relevance exactly 1: see `functional.multi_instance_map`. Holds embeddings, ids and
    class ids, gathers them over ranks, counts each sample once by its id, and computes in row
    blocks from the embeddings, so that no matrix of all pairs exists.

    Example:
        >>> import torch
        >>> from lightning_modules.metrics import MultiInstanceMAP
        >>> metric = MultiInstanceMAP()
        >>> verbs, nouns = torch.tensor([[0], [1]]), torch.tensor([[3], [3]])
        >>> video = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        >>> text = torch.tensor([[0.0, 1.0], [1.0, 0.0]])  # swapped
        >>> metric.update(video, torch.tensor([10, 11]), verbs, nouns, modality="video")
        >>> metric.update(text, torch.tensor([0, 1]), verbs, nouns, modality="text")
        >>> {name: round(value.item(), 2) for name, value in metric.compute().items()}
        {'v2t': 75.0, 't2v': 75.0, 'avg': 75.0}
    """

    def _score(self, direction: DirectionScores) -> float:
        return direction.map


class MultiInstanceNDCG(_MultiInstanceMetric):
    """Normalised discounted cumulative gain of EK-100 multi-instance retrieval, in percent.

    See `functional.multi_instance_ndcg`; state and protocol as `MultiInstanceMAP`, with which it
    shares one state in a `MetricCollection`.

    Example:
        >>> import torch
        >>> from lightning_modules.metrics import MultiInstanceNDCG
        >>> metric = MultiInstanceNDCG()
        >>> verbs, nouns = torch.tensor([[0], [1]]), torch.tensor([[3], [3]])
        >>> for modality in ("video", "text"):
        ...     metric.update(torch.eye(2), torch.arange(2), verbs, nouns, modality=modality)
        >>> metric.compute()["avg"].item()
        100.0
    """

    def _score(self, direction: DirectionScores) -> float:
        return direction.ndcg


def _class_pairs(index: Tensor, classes: Tensor) -> Tensor:
    """(B, V) class ids padded with -1 as (pairs, 2) rows of (sample id, class id)."""
    index, classes = index.to(torch.int64), classes.to(torch.int64)
    pairs = torch.stack([index[:, None].expand_as(classes), classes], dim=-1)
    return pairs[classes >= 0]


def _padded_ids(ids: Tensor, pairs: Tensor) -> Tensor:
    """(pairs, 2) rows of (sample id, class id) as (len(ids), widest) class ids padded with -1."""
    pairs = torch.unique(pairs.reshape(-1, 2), dim=0)  # sorted by sample, then class
    row = torch.searchsorted(ids, pairs[:, 0].contiguous())
    counts = row.bincount(minlength=len(ids))
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    width = int(counts.max()) if len(counts) else 0
    padded = pairs.new_full((len(ids), max(1, width)), -1)
    padded[row, place] = pairs[:, 1]
    return padded
