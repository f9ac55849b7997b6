"""A model on a benchmark, from shards to figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from datamodules.manifest import ClipRecord, Manifest, load_records
from datamodules.stream.reader import Corpus
from lightning_modules.evaluation.benchmarks import BENCHMARKS
from lightning_modules.evaluation.embed import EmbedOptions, embed_clips, embed_texts
from lightning_modules.evaluation.interface import Benchmark, BenchmarkData, Measured
from lightning_modules.evaluation.missing import MAX_MISSING, Coverage
from lightning_modules.models import DualEncoder
from lightning_modules.models.dual_encoder import MAX_LOG_SCALE


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        benchmark: The benchmark, with its data.
        prediction: What was measured: similarities or logits; NaN where a clip is missing.
        present: (clips,) bool, which of the benchmark's clips could be embedded.
        measured: The figures.
    """

    benchmark: Benchmark
    prediction: Tensor
    present: Tensor
    measured: Measured

    @property
    def coverage(self) -> Coverage:
        """How much of the benchmark was measured."""
        return self.benchmark.coverage(self.present)

    @property
    def headline(self) -> str:
        """The main figures, and what they leave out."""
        row = self.benchmark.row(self.measured.metrics)
        return self.coverage.headline(", ".join(f"{k} {value:.2f}" for k, value in row.items()))


def open_benchmark(
    name: str,
    manifest: str,
    *,
    annotations: Path | None = None,
    split: str | None = None,
    template: str = "{}",
    dual_softmax: float | None = None,
) -> tuple[Benchmark, Corpus]:
    """Read a benchmark's annotations and the manifest of its shards.

    Args:
        name: One of `BENCHMARKS`.
        manifest: File, folder or URL of the shards' manifest.
        annotations: See `BenchmarkData`, as are the rest.
        split: Which part of the data.
        template: Each prompt is set in here.
        dual_softmax: Its scale, for retrieval.

    Raises:
        ValueError: An unknown name, a missing or malformed file, or an option that the benchmark
            does not have.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; one of: {', '.join(BENCHMARKS)}")
    retrieval = ("ek100_mir", "text_video")
    if dual_softmax is not None and name not in retrieval:
        raise ValueError(f"dual softmax is for retrieval ({', '.join(retrieval)}), not for {name}")
    corpus = Corpus.load([manifest])
    (manifest_read,) = corpus.manifests
    records, rejected = load_records(manifest_read), _rejected(manifest_read)
    data = BenchmarkData(records, annotations, split, template, dual_softmax, rejected)
    return BENCHMARKS[name](data), corpus


def evaluate(
    model: DualEncoder,
    benchmark: Benchmark,
    corpus: Corpus,
    options: EmbedOptions,
    on_progress: Callable[[int], object] = lambda done: None,
    max_missing: float = MAX_MISSING,
) -> Evaluation:
    """Evaluate a model; on several ranks each does its share and all return the same.

    Args:
        model: In evaluation mode, on its device.
        benchmark: From `open_benchmark`, as is `corpus`.
        corpus: The shards.
        options: How clips become embeddings.
        on_progress: Called with the number of this rank's clips just finished.
        max_missing: Greatest share of the benchmark that may be missing.

    Raises:
        ValueError: None of the benchmark's clips is in the shards, or too few of them.
    """
    rows = rows_in_shards(benchmark, load_records(corpus.manifests[0]))
    check_coverage(benchmark, rows >= 0, max_missing)  # before hours of work
    embeddings, intact = embed_clips(model, corpus, options, on_progress)
    present = (rows >= 0) & intact[rows]
    check_coverage(benchmark, present, max_missing)
    video = torch.where(present[:, None], embeddings[rows], torch.nan)
    text = embed_texts(model, benchmark.prompts, options.batch_size)
    logit_scale = model.logit_scale.detach().float().clamp(0, MAX_LOG_SCALE).exp().item()
    prediction = benchmark.predict(video, text, logit_scale)
    return Evaluation(benchmark, prediction, present, benchmark.measure(prediction, present))


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
        ValueError: It is, with the names of some clips that are missing.
    """
    missing = (~present).nonzero().flatten().tolist()
    shown = ", ".join(repr(benchmark.clip_ids[row]) for row in missing[:3])
    benchmark.coverage(present).check(
        max_missing,
        f"Of benchmark {benchmark.name}, {shown} and the like are not in the shards or cannot be "
        "read: build them (`eva02-at shards build`), or raise --max-missing to have the figures of "
        "a part, marked as such.",
    )


def _rejected(manifest: Manifest) -> list[str]:
    """Names of the clips that the build of the shards rejected."""
    indexes = map(manifest.load_index, range(len(manifest.shards)))
    return [reject["clip_id"] for index in indexes for reject in index.rejects]
