"""The benchmark of a recipe's evaluation split."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from datamodules.manifest import ClipRecord
from datamodules.module import RetrievalSplit, own_sentences
from lightning_modules.evaluation.benchmarks.ek100_cls import EK100Recognition
from lightning_modules.evaluation.benchmarks.ek100_mir import (
    ClassIds,
    EK100Retrieval,
    MultiInstanceRetrieval,
)
from lightning_modules.evaluation.interface import Benchmark, BenchmarkData


def retrieval_benchmark(split: RetrievalSplit, records: Sequence[ClipRecord]) -> Benchmark:
    """Multi-instance retrieval on a split: EK-100's with its annotations, else what the shards say.

    Args:
        split: The recipe's.
        records: The clips of its shards.
    """
    if split.annotations is not None:
        return EK100Retrieval(BenchmarkData(records, Path(split.annotations), split.split))
    sentences = own_sentences(records)
    return MultiInstanceRetrieval(
        [record.clip_id for record in records],
        ClassIds(
            [list(record.verb_classes) for record in records],
            [list(record.noun_classes) for record in records],
        ),
        [sentence.text for sentence in sentences],
        ClassIds(
            [list(sentence.verb_classes) for sentence in sentences],
            [list(sentence.noun_classes) for sentence in sentences],
        ),
    )


def recognition_benchmark(
    split: RetrievalSplit, records: Sequence[ClipRecord], annotations: str
) -> Benchmark:
    """EK-100 recognition on a split: `train`, or else the validation file.

    Args:
        split: The recipe's.
        records: The clips of its shards.
        annotations: Folder of `EPIC_100_train.csv` and `EPIC_100_validation.csv`.
    """
    which = "train" if split.split == "train" else "validation"
    return EK100Recognition(BenchmarkData(records, Path(annotations), which))
