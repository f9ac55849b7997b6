"""What a benchmark is: which clips, which texts, what is predicted from them, how it is measured.

A benchmark never sees pixels or a model. It names its clips and its prompts; somebody embeds both
(`embed`); it turns embeddings into a prediction and a prediction into figures.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from datamodules.manifest import ClipRecord
from lightning_modules.evaluation.missing import Coverage


@dataclass(frozen=True)
class BenchmarkData:
    """Where a benchmark's data lie, and the choices that its protocol leaves open.

    Attributes:
        records: The clips of the shards, in their order.
        annotations: The benchmark's annotation file or folder; None where the shards say it all.
        split: Which part of the data; None for the benchmark's usual one.
        template: Each prompt is set in here: `{}` or, say, `#C C {}`.
        dual_softmax: Scale of `similarity.dual_softmax`, for retrieval; None for plain
            similarities.
        rejected: Names of clips that the build of the shards rejected.
    """

    records: Sequence[ClipRecord]
    annotations: Path | None = None
    split: str | None = None
    template: str = "{}"
    dual_softmax: float | None = None
    rejected: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.template.count("{}") != 1:
            raise ValueError(f"template {self.template!r} given; it must contain {{}} once")

    def annotation_path(self, benchmark: str, what: str) -> Path:
        """The annotations, for a benchmark that cannot do without.

        Raises:
            ValueError: None were given, or they do not exist.
        """
        if self.annotations is None:
            raise ValueError(f"benchmark {benchmark} needs its annotations: {what}")
        if not self.annotations.exists():
            raise ValueError(f"annotations {self.annotations} do not exist; needed: {what}")
        return self.annotations


@dataclass(frozen=True)
class Measured:
    """A benchmark's result.

    Attributes:
        metrics: Figures in percent and counts (`num_...`), at any depth; what was left out is
            among the counts.
        per_query: Under the names of the metrics, the values of the single queries whose mean
            each is, as fractions; NaN where a query was left out.
    """

    metrics: dict[str, Any]
    per_query: dict[str, Any] = field(default_factory=dict)

    @property
    def flat(self) -> dict[str, float | int]:
        """The metrics by one name each: `{"map": {"v2t": 1.0}}` as `map_v2t`."""
        return dict(_flat(self.metrics))


def _flat(metrics: Mapping[str, Any], stem: str = "") -> Iterator[tuple[str, float | int]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{stem}{name}_")
        else:
            yield f"{stem}{name}", value


class Benchmark(ABC):
    """One evaluation protocol.

    Attributes:
        name: On the command line.
        columns: Metrics of a table row: title -> dotted name in `Measured.metrics`.
        needs_scale: Whether `predict` wants the model's own logit scale.
        compares_all: Whether the prediction is a matrix of every clip and every text.
        num_classes: Classes of a head that may be measured instead, its logits being the
            prediction; None where there is nothing of the kind.
        clip_ids: Data: the clips it needs, in the order of its predictions.
        prompts: The texts it needs, in its own order.
    """

    name: ClassVar[str]
    columns: ClassVar[Mapping[str, str]]
    needs_scale: ClassVar[bool] = False
    compares_all: ClassVar[bool] = False
    num_classes: int | None = None
    clip_ids: Sequence[str]
    prompts: Sequence[str]

    @abstractmethod
    def predict(self, video: Tensor, text: Tensor, logit_scale: float) -> Tensor:
        """Turn embeddings into what is measured.

        Args:
            video: (clips, E), L2-normalised; NaN for a clip that is missing.
            text: (prompts, E), L2-normalised.
            logit_scale: The model's inverse temperature; 1 where `needs_scale` is not set.

        Returns:
            A matrix that is NaN wherever a missing clip has a part in it.
        """

    @abstractmethod
    def measure(self, prediction: Tensor, present: Tensor) -> Measured:
        """Measure a prediction.

        Args:
            prediction: As `predict` gives it.
            present: (clips,) bool, False for clips that are not in the shards or unreadable.
        """

    def measure_directions(self, by_clip: Tensor, by_text: Tensor, present: Tensor) -> Measured:
        """Measure where each direction has a matrix of its own; only where `compares_all` is set.

        Args:
            by_clip: What clips rank the texts by.
            by_text: What texts rank the clips by, rows and columns as there.
            present: As in `measure`.
        """
        raise NotImplementedError

    def coverage(self, present: Tensor) -> Coverage:
        """How much of the benchmark these clips are; a benchmark may count something else."""
        return Coverage.of(present)

    def row(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """The figures of a table row: title -> value."""
        values = {}
        for title, dotted in self.columns.items():
            value: Any = metrics
            for part in dotted.split("."):
                value = value[part]
            values[title] = value
        return values
