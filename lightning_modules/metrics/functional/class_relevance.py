"""Relevance of multi-instance retrieval from class ids, block by block, in fp64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Incidence:
    """Which of C classes each of n items has; the classes are shared by all sides compared.

    Attributes:
        ids: (n, widest) int64, each class of an item once, rows padded with C.
        items: (C + 1, n) uint8, 1 where an item has a class; the last row is zero.
        counts: (n,) int16, the number of classes of each item.
    """

    ids: Tensor
    items: Tensor
    counts: Tensor

    def shared_with(self, items: Incidence, rows: slice) -> Tensor:
        """Number of classes that some of these have in common with each item, (rows, n) uint8.

        An item has one or two classes of hundreds: adding the rows of those few is a hundredth of
        the work of a product of indicator matrices.
        """
        columns = self.ids[rows].T
        shared = items.items[columns[0]]
        for column in columns[1:]:
            shared += items.items[column]
        return shared


@dataclass(frozen=True)
class ClassSets:
    """The verb and noun classes of n items; make them for both sides at once, with `class_sets`."""

    verbs: Incidence
    nouns: Incidence

    def __len__(self) -> int:
        return len(self.verbs.ids)


def class_sets(
    verb_classes: tuple[Tensor, Tensor], noun_classes: tuple[Tensor, Tensor]
) -> tuple[ClassSets, ClassSets]:
    """Index the class ids of two sides (videos, texts) that are to be compared.

    Args:
        verb_classes: (n, V) integer ids of each side, rows padded with -1.
        noun_classes: (n, N) integer ids of each side, rows padded with -1. Fewer than 256 distinct
            ones an item.

    Raises:
        ValueError: A side's verb and noun ids differ in their number of rows.
    """
    for side, verbs, nouns in zip(("videos", "texts"), verb_classes, noun_classes, strict=True):
        if verbs.ndim != 2 or nouns.ndim != 2 or len(verbs) != len(nouns):
            raise ValueError(
                f"class ids of {side} have shapes {tuple(verbs.shape)} (verbs) and "
                f"{tuple(nouns.shape)} (nouns); both must be (n, ids) with the same n"
            )
    verbs_of, nouns_of = _incidence(verb_classes), _incidence(noun_classes)
    return ClassSets(verbs_of[0], nouns_of[0]), ClassSets(verbs_of[1], nouns_of[1])


def relevance_block(queries: ClassSets, items: ClassSets, rows: slice) -> Tensor:
    """c = 1/2 [a verb class shared] + 1/2 IoU(noun classes) of some queries and all items.

    The formula of `datamodules.relevance` in fp64: a float32 third would shift a metric by more
    than the 1e-9 to which two implementations of the protocol should agree.

    Args:
        queries: m items.
        items: n items.
        rows: Which queries.

    Returns:
        (rows, n) float64, exactly 1 where the verb and all nouns agree; 0 IoU without nouns.
    """
    shared = queries.nouns.shared_with(items.nouns, rows)
    union = queries.nouns.counts[rows, None] + items.nouns.counts - shared
    iou = shared.double().div_(union.clamp_(min=1))
    return iou.add_(queries.verbs.shared_with(items.verbs, rows) > 0).mul_(0.5)


def _incidence(sides: tuple[Tensor, Tensor]) -> tuple[Incidence, Incidence]:
    """Index both sides over the classes that occur, so that ids may be as large as they like."""
    classes = torch.unique(torch.cat([side.flatten() for side in sides]))
    classes = classes[classes >= 0]
    result = []
    for side in sides:
        # an id below 0 or seen before in its row becomes C, the zero row
        ids = torch.searchsorted(classes, side).masked_fill(side < 0, len(classes)).sort(1).values
        ids[:, 1:][ids[:, 1:] == ids[:, :-1]] = len(classes)
        items = torch.zeros(len(classes) + 1, len(side), dtype=torch.uint8, device=side.device)
        items[ids, torch.arange(len(side), device=side.device)[:, None]] = 1
        items[-1] = 0
        result.append(Incidence(ids, items, items.sum(0, dtype=torch.int16)))
    return result[0], result[1]
