"""A model on a benchmark outside any recipe, from shards to figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from datamodules.batch import ClipBatch, TextBatch
from datamodules.manifest import Manifest, load_records
from datamodules.stream.cache import FileCache
from datamodules.stream.clips import ClipOptions, EvalClips, EvalSentences, Narration
from datamodules.stream.faults import FaultMonitor
from datamodules.stream.loader import PlaceLoader
from datamodules.stream.reader import Corpus, SampleReader
from lightning_modules.evaluation.benchmarks import BENCHMARKS
from lightning_modules.evaluation.engine import Engine, Evaluation
from lightning_modules.evaluation.interface import Benchmark, BenchmarkData
from lightning_modules.evaluation.missing import MAX_MISSING
from lightning_modules.evaluation.predictors import (
    DualEncoderPredictor,
    Predictor,
    predictor_of,
)
from lightning_modules.evaluation.processes import Machines
from lightning_modules.evaluation.rerank import RerankOptions, RerankPredictor
from lightning_modules.losses.gather import world_size
from lightning_modules.models import DualEncoder, VideoClassifier
from lightning_modules.models.rerank import ReRanker
from lightning_modules.training.run.stall import StallWatch


@dataclass(frozen=True)
class EvalOptions:
    """How clips are read and measured.

    Attributes:
        batch_size: Clips (and texts) in a forward pass.
        num_workers: Decoding processes a rank.
        views: Clips of T frames taken from each segment, interleaved in time, and averaged.
        flip: Average with the horizontally flipped clip.
        max_fault_rate: Share of damaged clips above which the evaluation ends.
        max_missing: Greatest share of the benchmark that may be missing.
        rerank: A re-ranker of the model, and how it takes part.
        cache: Where copies of remote shards go; needed if they are remote.
    """

    batch_size: int = 16
    num_workers: int = 2
    views: int = 1
    flip: bool = False
    max_fault_rate: float = 0.01
    max_missing: float = MAX_MISSING
    cache: FileCache | None = None
    rerank: tuple[ReRanker, RerankOptions] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.views < 1 or self.num_workers < 0:
            raise ValueError(
                f"batch size {self.batch_size}, views {self.views} and workers "
                f"{self.num_workers} given; they must be at least 1, 1 and 0"
            )
        if self.rerank is not None and (self.views > 1 or self.flip):
            raise ValueError("a re-ranker looks at one view of a clip: no --views, no --flip")


def open_benchmark(
    name: str,
    manifest: str,
    *,
    annotations: Path | None = None,
    split: str | None = None,
    template: str = "{}",
    dual_softmax: float | None = None,
    allow_pipe: bool = False,
) -> tuple[Benchmark, Corpus]:
    """Read a benchmark's annotations and the manifest of its shards.

    Args:
        name: One of `BENCHMARKS`.
        manifest: File, folder or URL of the shards' manifest.
        annotations: See `BenchmarkData`, as are the rest.
        split: Which part of the data.
        template: Each prompt is set in here.
        dual_softmax: Its scale, for retrieval.
        allow_pipe: The manifest's location may be a command.

    Raises:
        ValueError: An unknown name, a missing or malformed file, or an option that the benchmark
            does not have.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"unknown benchmark {name!r}; one of: {', '.join(BENCHMARKS)}")
    retrieval = ("ek100_mir", "text_video")
    if dual_softmax is not None and name not in retrieval:
        raise ValueError(f"dual softmax is for retrieval ({', '.join(retrieval)}), not for {name}")
    corpus = Corpus.load([manifest], None, allow_pipe)
    (manifest_read,) = corpus.manifests
    records, rejected = load_records(manifest_read), _rejected(manifest_read)
    data = BenchmarkData(records, annotations, split, template, dual_softmax, rejected)
    return BENCHMARKS[name](data), corpus


def _rejected(manifest: Manifest) -> list[str]:
    """Names of the clips that the build of the shards rejected."""
    indexes = map(manifest.load_index, range(len(manifest.shards)))
    return [reject["clip_id"] for index in indexes for reject in index.rejects]


def open_engine(
    model: DualEncoder | VideoClassifier,
    benchmark: Benchmark,
    corpus: Corpus,
    options: EvalOptions,
) -> Engine:
    """The engine of a model on a benchmark.

    Raises:
        ValueError: The benchmark is not one for this model, or the shards lack too much of it.
    """
    return Engine(
        benchmark,
        load_records(corpus.manifests[0]),
        _predictor(model, options),
        max_missing=options.max_missing,
        views=options.views,
        flip=options.flip,
    )


def _predictor(model: DualEncoder | VideoClassifier, options: EvalOptions) -> Predictor:
    first = predictor_of(model)
    if options.rerank is None:
        return first
    if not isinstance(first, DualEncoderPredictor):
        raise ValueError("a re-ranker belongs to a dual encoder, and this is a classifier")
    reranker, how = options.rerank
    return RerankPredictor(first, reranker.to(first.device, first.model.logit_scale.dtype), how)


def evaluate(
    model: DualEncoder | VideoClassifier,
    benchmark: Benchmark,
    corpus: Corpus,
    options: EvalOptions,
    on_progress: Callable[[int], object] = lambda done: None,
) -> Evaluation:
    """Evaluate a model; on several ranks each does its share and all return the same.

    Args:
        model: In evaluation mode, on its device.
        benchmark: From `open_benchmark`, as is `corpus`.
        corpus: The shards.
        options: How clips are read and measured.
        on_progress: Called with the number of this rank's clips just finished; 0 for texts.

    Raises:
        ValueError: As `open_engine`, or too many clips are damaged.
    """
    engine = open_engine(model, benchmark, corpus, options)
    for clips in clip_batches(model, corpus, options):
        engine.take(clips)
        on_progress(int(clips.mask.sum()))
    for texts in text_batches(benchmark.prompts, options.batch_size):
        engine.take(texts)
        on_progress(0)
    return engine.finish()


def evaluate_here(
    model: DualEncoder | VideoClassifier,
    benchmark: Benchmark,
    corpus: Corpus,
    options: EvalOptions,
    machines: Machines,
) -> Evaluation | None:
    """Evaluate a model on these machines, with a progress bar.

    Returns:
        What came out; None on every process but the first.
    """
    with (
        machines.processes() as process,
        StallWatch(machines.stall_s).watching("loading") as watch,
        tqdm(
            total=len(benchmark.clip_ids),
            unit="clip",
            disable=not process.is_first or None,
            leave=False,
        ) as bar,
    ):

        def on_progress(clips: int) -> None:
            watch.mark("evaluating")
            bar.update(clips * machines.num_processes)

        done = evaluate(
            model.to(process.device, machines.weights),
            benchmark,
            corpus,
            options,
            on_progress,
        )
        return done if process.is_first else None


def clip_batches(
    model: DualEncoder | VideoClassifier, corpus: Corpus, options: EvalOptions
) -> Iterable[ClipBatch]:
    """This rank's batches of the clips of a set of shards.

    The work is cut into the same batches whatever the number of ranks, so that results do not
    depend on it.
    """
    vision = model.config.vision
    reader = SampleReader(corpus, options.cache)
    monitor = FaultMonitor(options.num_workers, options.max_fault_rate)
    clip_options = ClipOptions(vision.num_frames * options.views, vision.image_size)
    dataset = EvalClips(reader, clip_options, monitor)
    places = _own_places(len(dataset), options.batch_size)
    return PlaceLoader(
        dataset,
        lambda: places,
        len(places),
        num_workers=options.num_workers,
        monitor=monitor,
        describe=reader.describe,
    )


def text_batches(texts: Sequence[str], batch_size: int) -> Iterable[TextBatch]:
    """This rank's batches of texts, cut alike."""
    dataset = EvalSentences([Narration(text, row, (), ()) for row, text in enumerate(texts)])
    return (dataset[place] for place in _own_places(len(texts), batch_size))


def _own_places(total: int, batch_size: int) -> list[tuple[int, int]]:
    """(start, size) of this rank's batches; every rank has the same number of them."""
    num_ranks = world_size()
    rank = dist.get_rank() if num_ranks > 1 else 0
    rounds = -(-total // (batch_size * num_ranks))
    return [((k * num_ranks + rank) * batch_size, batch_size) for k in range(rounds)]
