"""The one way from batches to figures: `fit`, `validate`, `test`, `evaluate` and `sweep` take it.

Batches come in any order and on any rank; rows are gathered by identity, so what pads the last
batches never counts, and brought into the benchmark's own order. From there on everything is
computed on the CPU, from the same numbers whoever asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.batch import ClipBatch, TextBatch
from datamodules.manifest import ClipRecord
from lightning_modules.evaluation.interface import Benchmark, Measured
from lightning_modules.evaluation.missing import MAX_MISSING, Coverage
from lightning_modules.evaluation.predictors import Predictor, SecondStage
from lightning_modules.losses.gather import gather_no_gradient


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        benchmark: The benchmark, with its data.
        prediction: What was measured: similarities or logits; NaN where a clip is missing. With a
            second stage, both directions' in one matrix.
        present: (clips,) bool, which of the benchmark's clips could be embedded.
        measured: The figures.
        second_stage: Of a re-ranker, what it looked at.
    """

    benchmark: Benchmark
    prediction: Tensor
    present: Tensor
    measured: Measured
    second_stage: SecondStage | None = None

    @property
    def coverage(self) -> Coverage:
        """How much of the benchmark was measured."""
        return self.benchmark.coverage(self.present)

    @property
    def headline(self) -> str:
        """The main figures, and what they leave out."""
        row = self.benchmark.row(self.measured.metrics)
        return self.coverage.headline(", ".join(f"{k} {value:.2f}" for k, value in row.items()))


class Engine:
    """One measurement of one model.

    Args:
        benchmark: What to measure.
        records: The clips of the shards, in the order of their `clip_index`.
        predictor: The model; the same on every rank.
        max_missing: Greatest share of the benchmark that may be missing.
        views: Clips of T frames in each batch's videos, interleaved in time, to average.
        flip: Average with the horizontally flipped clip.

    Raises:
        ValueError: The benchmark is not one for this model, or the shards lack too much of it.
    """

    def __init__(
        self,
        benchmark: Benchmark,
        records: Sequence[ClipRecord],
        predictor: Predictor,
        *,
        max_missing: float = MAX_MISSING,
        views: int = 1,
        flip: bool = False,
    ) -> None:
        predictor.check(benchmark)
        self.benchmark, self.predictor, self.max_missing = benchmark, predictor, max_missing
        self.views, self.flip = views, flip
        self._place = rows_in_shards(benchmark, records)
        check_coverage(benchmark, self._place >= 0, max_missing)  # before hours of work
        self.clips = GatheredRows(len(records), predictor)
        self.texts = GatheredRows(len(benchmark.prompts), predictor)

    @torch.no_grad()
    def take(self, batch: ClipBatch | TextBatch) -> None:
        """Take one batch, of clips or of texts; a model without texts passes over the latter."""
        if isinstance(batch, ClipBatch):
            encoded = self._encode_views(batch.video.to(self.predictor.device))
            self.clips.add(encoded, batch.clip_index, batch.mask)
            self.predictor.keep_clips(batch.clip_index, batch.mask)
        elif self.predictor.has_texts:
            encoded = self.predictor.encode_texts(batch.tokens.to(self.predictor.device))
            self.texts.add(encoded, batch.text_index, batch.mask)
            self.predictor.keep_texts(batch.text_index, batch.mask)

    @torch.autocast("cpu", enabled=False)
    def finish(self) -> Evaluation:
        """Measure what was taken, on all ranks together; each returns the same.

        Raises:
            ValueError: Too much is missing, or a prediction is NaN.
        """
        clips, intact = self.clips.gather()
        texts, complete = self.texts.gather()
        assert complete.all() or not self.predictor.has_texts, "texts were left out"
        present = (self._place >= 0) & intact[self._place]
        check_coverage(self.benchmark, present, self.max_missing)
        # what is missing must not look like a zero
        rows = torch.where(present[:, None], clips[self._place], torch.nan)
        prediction = self.predictor.predict(self.benchmark, rows, texts)
        prediction, second = self.predictor.refine(prediction, self._place)
        if second is None:
            measured = self.benchmark.measure(prediction, present)
        else:
            matrices = second.by_clip, second.by_text
            measured = self.benchmark.measure_directions(*matrices, present)
        return Evaluation(self.benchmark, prediction, present, measured, second)

    def _encode_views(self, video: Tensor) -> Tensor:
        """(B, 3, views * T, H, W) to (B, W)."""
        # view k shows frames k, k + views, ...: each spans the whole segment
        clips = [video[:, :, view :: self.views] for view in range(self.views)]
        if self.flip:
            clips += [clip.flip(-1) for clip in clips]
        encoded = [self.predictor.encode_clips(clip) for clip in clips]
        return encoded[0] if len(encoded) == 1 else self.predictor.mean(encoded)


class GatheredRows:
    """Rows of a table that ranks fill in batches.

    Args:
        total: Rows that there are.
        predictor: Knows their width and where they are made.
    """

    def __init__(self, total: int, predictor: Predictor) -> None:
        self.total, self.predictor = total, predictor
        self._rows: list[Tensor] = []
        self._index: list[Tensor] = []

    def add(self, rows: Tensor, index: Tensor, mask: Tensor) -> None:
        """Add the rows that a (B,) mask keeps, at the places (B,) that `index` says."""
        mask = mask.to(rows.device)
        self._rows.append(rows.detach().float()[mask])
        self._index.append(index.to(rows.device)[mask])

    def gather(self) -> tuple[Tensor, Tensor]:
        """All ranks' rows on the CPU: (total, W) fp32, and (total,) bool which of them came."""
        device, width = self.predictor.device, self.predictor.width
        rows = torch.cat([torch.empty(0, width, device=device), *self._rows])
        index = torch.cat([torch.empty(0, dtype=torch.int64, device=device), *self._index])
        rows, index = gather_no_gradient(rows).cpu(), gather_no_gradient(index).cpu()
        table, present = torch.full((self.total, width), torch.nan), torch.zeros(self.total) > 0
        table[index], present[index] = rows, True
        return table, present


def rows_in_shards(benchmark: Benchmark, records: Sequence[ClipRecord]) -> Tensor:
    """Where each of the benchmark's clips lies in the shards: (clips,) int64, -1 where nowhere.

    Raises:
        ValueError: None of them is there.
    """
    place = {record.clip_id: row for row, record in enumerate(records)}
    rows = torch.tensor([place.get(clip_id, -1) for clip_id in benchmark.clip_ids])
    if not (rows >= 0).any():
        raise ValueError(
            f"none of the {len(rows)} clips of benchmark {benchmark.name} (such as "
            f"{benchmark.clip_ids[0]!r}) is in the shards, whose clips are called "
            f"{records[0].clip_id!r} and the like; build the shards from the same annotations"
        )
    return rows


def check_coverage(benchmark: Benchmark, present: Tensor, max_missing: float) -> None:
    """Refuse a part of a benchmark that is too small to stand for it.

    Raises:
        TooMuchMissing: It is; the message has the names of some clips that are missing.
    """
    missing = (~present).nonzero().flatten().tolist()
    shown = ", ".join(repr(benchmark.clip_ids[row]) for row in missing[:3])
    benchmark.coverage(present).check(
        max_missing,
        f"Of benchmark {benchmark.name}, {shown} and the like are not in the shards or cannot be "
        "read: build them (`eva02-at shards build`), or raise the limit to have the figures of a "
        "part, marked as such.",
    )
