"""A model on a benchmark, from shards to figures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from datamodules.manifest import load_records
from datamodules.stream.reader import Corpus
from lightning_modules.evaluation.benchmarks import BENCHMARKS
from lightning_modules.evaluation.embed import EmbedOptions, embed_clips, embed_texts
from lightning_modules.evaluation.interface import Benchmark, BenchmarkData, Measured
from lightning_modules.models import DualEncoder
from lightning_modules.models.dual_encoder import MAX_LOG_SCALE


@dataclass(frozen=True)
class Evaluation:
    """What came out.

    Attributes:
        benchmark: The benchmark, with its data.
        prediction: What was measured: similarities or logits.
        present: (clips,) bool, which of the benchmark's clips could be embedded.
        measured: The figures.
    """

    benchmark: Benchmark
    prediction: Tensor
    present: Tensor
    measured: Measured


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
    data = BenchmarkData(
        load_records(corpus.manifests[0]), annotations, split, template, dual_softmax
    )
    return BENCHMARKS[name](data), corpus


def evaluate(
    model: DualEncoder,
    benchmark: Benchmark,
    corpus: Corpus,
    options: EmbedOptions,
    on_progress: Callable[[int], object] = lambda done: None,
) -> Evaluation:
    """Evaluate a model; on several ranks each does its share and all return the same.

    Args:
        model: In evaluation mode, on its device.
        benchmark: From `open_benchmark`, as is `corpus`.
        corpus: The shards.
        options: How clips become embeddings.
        on_progress: Called with the number of this rank's clips just finished.

    Raises:
        ValueError: None of the benchmark's clips is in the shards.
    """
    video, present = _in_order(benchmark, corpus, *embed_clips(model, corpus, options, on_progress))
    text = embed_texts(model, benchmark.prompts, options.batch_size)
    logit_scale = model.logit_scale.detach().float().clamp(0, MAX_LOG_SCALE).exp().item()
    prediction = benchmark.predict(video, text, logit_scale)
    return Evaluation(benchmark, prediction, present, benchmark.measure(prediction, present))


def _in_order(
    benchmark: Benchmark, corpus: Corpus, embeddings: Tensor, intact: Tensor
) -> tuple[Tensor, Tensor]:
    """Bring the shards' embeddings into the benchmark's order; what is missing is zero."""
    records = load_records(corpus.manifests[0])
    place = {record.clip_id: row for row, record in enumerate(records)}
    rows = torch.tensor([place.get(clip_id, -1) for clip_id in benchmark.clip_ids])
    present = rows >= 0
    present[present.clone()] = intact[rows[present]]
    if not present.any():
        raise ValueError(
            f"none of the {len(rows)} clips of benchmark {benchmark.name} (such as "
            f"{benchmark.clip_ids[0]!r}) is in the shards, whose clips are called "
            f"{records[0].clip_id!r} and the like; build the shards from the same annotations"
        )
    video = embeddings[rows.clamp(min=0)] * present[:, None]
    return video, present
