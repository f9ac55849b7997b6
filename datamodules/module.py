"""What both DataModules share: the training stream with its position, and evaluation loaders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch.distributed
from lightning import LightningDataModule, Trainer

from datamodules.annotations.epic import read_retrieval_clips, read_sentences, retrieval_files
from datamodules.manifest import ClipRecord, Manifest, load_records
from datamodules.stream.cache import FileCache
from datamodules.stream.clips import (
    ChooseText,
    ClipOptions,
    EvalClips,
    EvalSentences,
    Narration,
    TrainStream,
)
from datamodules.stream.faults import FaultMonitor
from datamodules.stream.hung import LIST_NAME, DecodeWatch, HungSamples
from datamodules.stream.loader import PlaceLoader
from datamodules.stream.order import StreamOrder
from datamodules.stream.prefetch import Prefetcher, Upcoming
from datamodules.stream.reader import Corpus, SampleReader
from datamodules.stream.retry import Retry
from datamodules.stream.stores import Fetcher, is_remote
from datamodules.video.decode import Decoder
from datamodules.video.frames import Limits
from datamodules.vocabulary import HardNegatives


@dataclass
class RetrievalSplit:
    """Clips and sentences to retrieve from each other.

    Attributes:
        manifest: Manifest of the clips' shards.
        annotations: Folder with EK-100's retrieval CSVs, for the sentence list. Without it, the
            sentences are the distinct narrations of the clips, in order of appearance.
        split: `train` or `test`, which of the CSVs.
    """

    manifest: str
    annotations: str | None = None
    split: str = "test"

    def records(self, allow_pipe: bool = False) -> list[ClipRecord]:
        """Read the clips' metadata, in the order of their `clip_index`.

        Args:
            allow_pipe: The manifest's location may be a command.
        """
        return load_records(Manifest.load(self.manifest, allow_pipe))

    def sentences(self, allow_pipe: bool = False) -> list[Narration]:
        """Read the sentence list, in the order of the published similarity matrices' columns.

        Args:
            allow_pipe: The manifest's location may be a command.

        Raises:
            ValueError: A file is missing or malformed.
        """
        if self.annotations is not None:
            clip_file, sentence_file = retrieval_files(self.annotations, self.split)
            rows = read_sentences(sentence_file, read_retrieval_clips(clip_file))
            return [
                Narration(row.text, number, (row.verb_class,), row.all_noun_classes)
                for number, row in enumerate(rows)
            ]
        return own_sentences(self.records(allow_pipe))


def own_sentences(records: Iterable[ClipRecord]) -> list[Narration]:
    """The distinct narrations of clips, in order of appearance."""
    first: dict[str, Narration] = {}
    for record in records:
        text = record.texts[0]
        if text not in first:
            first[text] = Narration(text, len(first), record.verb_classes, record.noun_classes)
    return list(first.values())


class StreamDataModule(LightningDataModule):
    """A training stream that resumes exactly on any number of ranks, and evaluation loaders.

    The checkpoint holds two integers, the epoch and the samples consumed in it, taken from the
    trainer's counters of finished batches; whatever loaders have prefetched does not count.

    Subclasses give `train_manifests`, `train_weights`, `choose_text` and the evaluation splits.

    Args:
        global_batch_size: Pairs a step over all ranks. It belongs to the recipe; each rank's share
            follows from the number of ranks, so that a run may move to more or fewer GPUs.
        eval_batch_size: Clips, or sentences, a rank and batch in evaluation.
        num_frames: Frames a clip.
        image_size: Side of the frames in pixels.
        crop_scale: Least and greatest share of the frame's area for the random crop.
        num_workers: Loader processes a rank; 0 reads in the trainer's own.
        prefetch: Batches that each of them prepares ahead.
        seed: Seed of order, crops, frames and texts.
        lanes: Canonical streams; see `datamodules.stream.order`.
        shuffle_window: Samples of a lane permuted together; see `datamodules.stream.order`.
        max_fault_rate: Share of damaged samples above which the run ends.
        max_missing: Share of an evaluation's clips that may be missing, else it has no figures.
        accept_changed_data: Resume although the data or the batch size is not the checkpoint's.
        decoder: `auto` (decord where it is installed and the clips are of our making), `decord`,
            `torchcodec`, `torchcodec-cuda` (the GPU's own decoder, NVDEC: each worker then holds a
            CUDA context) or `pyav`.
        decode_timeout_s: A sample whose decoding takes longer is named, replaced, and written to
            `hung_samples.jsonl` in the run's folder, so that later starts do not meet it; needs
            `num_workers` of at least 1.
        storage_patience_s: How long a file system or a store that fails is waited for; then the
            run stops, with a checkpoint.
        max_pixels: Clips with larger frames are damaged samples.
        cache_dir: Folder for copies of remote shards; needed if a manifest is a URL.
        cache_gb: How much it may hold.
        prefetch_shards: Remote shards that a node fetches ahead of their use, as far as `cache_gb`
            holds them; all that it holds by default, 0 for none.
        allow_pipe: A manifest's location may be `pipe:` and a command, which is then run.
        hard_negatives: Captions that differ in a word, and clips played backwards.
    """

    def __init__(
        self,
        *,
        global_batch_size: int,
        eval_batch_size: int,
        num_frames: int,
        image_size: int = 224,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        num_workers: int = 8,
        prefetch: int = 2,
        seed: int = 0,
        lanes: int | None = None,
        shuffle_window: int | None = None,
        max_fault_rate: float = 0.01,
        max_missing: float = 0.01,
        accept_changed_data: bool = False,
        decoder: Decoder = "auto",
        decode_timeout_s: float = 60.0,
        storage_patience_s: float = 600.0,
        max_pixels: int = Limits.max_pixels,
        cache_dir: str | None = None,
        cache_gb: float = 100.0,
        prefetch_shards: int | None = None,
        allow_pipe: bool = False,
        hard_negatives: HardNegatives | None = None,
    ) -> None:
        super().__init__()
        _check_range(global_batch_size=(global_batch_size, 1), eval_batch_size=(eval_batch_size, 1))
        _check_range(num_workers=(num_workers, 0), prefetch=(prefetch, 1))
        _check_range(prefetch_shards=(prefetch_shards or 0, 0))
        if cache_gb <= 0:
            raise ValueError(
                f"data.cache_gb is {cache_gb}; it must be above 0 (no cache: cache_dir)"
            )
        self.hard_negatives = hard_negatives
        self.retry = Retry(patience_s=storage_patience_s)
        fetcher = Fetcher(self.retry)
        limit = int(cache_gb * 1e9)
        self.cache = None if cache_dir is None else FileCache(cache_dir, limit, fetcher)
        limits = Limits(max_pixels=max_pixels)
        self.clip_options = ClipOptions(num_frames, image_size, crop_scale, decoder, limits)
        self.decode_timeout_s = decode_timeout_s
        self.global_batch_size, self.eval_batch_size = global_batch_size, eval_batch_size
        self.num_workers, self.prefetch, self.seed = num_workers, prefetch, seed
        self.lanes, self.shuffle_window = lanes, shuffle_window
        self.allow_pipe, self.max_missing = allow_pipe, max_missing
        self.prefetch_shards = prefetch_shards
        self._prefetcher: Prefetcher | None = None
        self.max_fault_rate, self.accept_changed_data = max_fault_rate, accept_changed_data
        self.train_manifests: Sequence[str] = ()
        self.train_weights: Sequence[float] | None = None
        self.val_split: RetrievalSplit | None = None
        self.test_split: RetrievalSplit | None = None
        self.fault_monitor: FaultMonitor | None = None
        # (epoch, samples) at which the next iteration begins; None if the trainer alone knows
        self._loaded: tuple[int, int] | None = (0, 0)
        self._epoch: int | None = None  # the epoch that the trainer is in, once it has begun

    def choose_text(self) -> ChooseText:
        """Return how training picks a clip's text."""
        raise NotImplementedError

    @cached_property
    def corpus(self) -> Corpus:
        """The training shards."""
        return Corpus.load(self.train_manifests, self.train_weights, self.allow_pipe)

    @cached_property
    def order(self) -> StreamOrder:
        """The order of training samples."""
        return StreamOrder(
            self.corpus.counts,
            global_batch_size=self.global_batch_size,
            seed=self.seed,
            lanes=self.lanes,
            window=self.shuffle_window,
            weights=self.corpus.shard_weights,
        )

    @property
    def batches_per_epoch(self) -> int:
        """Batches of one rank's epoch: optimiser steps times accumulated micro-batches."""
        return self.order.num_steps * self._micro_batches()

    def train_dataloader(self) -> PlaceLoader:
        """Build the training loader: global_batch_size / (ranks x accumulation) clips a batch."""
        rank, world_size = self._rank_and_world_size()
        micro_batches = self._micro_batches()
        num_parts = world_size * micro_batches
        self.order.check_parts(num_parts)
        reader = SampleReader(self.corpus, self.cache, self.retry)
        if self._prefetcher is None:
            self._prefetcher = self._make_prefetcher()
        self.fault_monitor = FaultMonitor(self.num_workers, self.max_fault_rate)
        callbacks = [] if self.trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        self.fault_monitor.judged_together = any(hasattr(c, "judges_faults") for c in callbacks)
        choose_text = self.choose_text()
        stream = TrainStream(
            reader,
            self.order,
            self.clip_options,
            choose_text,
            self.fault_monitor,
            rank * micro_batches,
            num_parts,
            self._watch(self.corpus),
            getattr(choose_text, "text_widths", None),
            None if self.hard_negatives is None else self.hard_negatives.read(),
        )
        return self._loader(stream, self._train_places, self.batches_per_epoch, reader)

    def eval_split(self, stage: str) -> RetrievalSplit | None:
        """What a stage, `val` or `test`, is evaluated on."""
        return self.val_split if stage == "val" else self.test_split or self.val_split

    def val_dataloader(self) -> list[PlaceLoader]:
        """Build the loaders of clips and of sentences to validate on; none without a split."""
        return self._eval_loaders(self.eval_split("val"))

    def test_dataloader(self) -> list[PlaceLoader]:
        """Build the loaders of clips and of sentences to test on."""
        return self._eval_loaders(self.eval_split("test"))

    def predict_dataloader(self) -> list[PlaceLoader]:
        """Build the same loaders as for the test."""
        return self.test_dataloader()

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next batch to train on, and what it refers to."""
        epoch, samples = self._position()
        return {"epoch": epoch, "samples": samples, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a checkpoint's position, on any number of ranks.

        For training alone: an evaluation needs neither the position nor the training's shards.

        Raises:
            ValueError: The data, the seed or the batch is not the checkpoint's, so that the order
                would be another one.
        """
        if self.trainer is not None and self.trainer.state.fn not in (None, "fit"):
            return
        mine = self._identity()
        changed = [key for key in mine if state_dict.get(key) != mine[key]]
        if changed and not self.accept_changed_data:
            listed = ", ".join(f"{k} {state_dict.get(k)!r} -> {mine[k]!r}" for k in changed)
            raise ValueError(
                f"the checkpoint's stream is another one ({listed}), so it cannot be continued "
                "exactly; restore the values, or set data.init_args.accept_changed_data=true to "
                "go on with a new order"
            )
        self._loaded = None if changed else (state_dict["epoch"], state_dict["samples"])
        self._epoch = None

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "manifest": self.corpus.fingerprint,
            "global_batch_size": self.global_batch_size,
            "lanes": self.order.lanes,
            "window": self.order.window,
        }

    def _rank_and_world_size(self) -> tuple[int, int]:
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return torch.distributed.get_rank(), torch.distributed.get_world_size()
        return 0, 1

    def _micro_batches(self) -> int:
        return 1 if self.trainer is None else self.trainer.accumulate_grad_batches

    def _position(self) -> tuple[int, int]:
        """(epoch, samples consumed in it): as loaded, then by the trainer's finished batches."""
        if self._epoch is None or self.trainer is None:
            return self._loaded or (0, 0)
        # `processed` counts a batch once its optimiser step is done, before the hooks that save;
        # it keeps the last epoch's count until the first batch of the next is asked for
        finished = _counters(self.trainer).processed
        if finished >= self.trainer.num_training_batches:
            return self._epoch + 1, 0
        return self._epoch, finished * self.global_batch_size // self._micro_batches()

    def _train_places(self) -> Iterator[tuple[int, int, int]]:
        """Yield (epoch, step, micro-batch) from the position at the first call to the end."""
        micro_batches = self._micro_batches()
        epoch, samples = self._loaded or (0, 0)
        if self.trainer is not None:
            epoch = self.trainer.current_epoch
            samples = _counters(self.trainer).ready * self.global_batch_size // micro_batches
            if self._epoch is None and self._loaded not in (None, (epoch, samples)):
                raise ValueError(
                    f"the stream stands at (epoch, sample) {self._loaded}, the trainer at "
                    f"{(epoch, samples)}; was accumulate_grad_batches changed within an epoch, or "
                    "the checkpoint saved in on_train_epoch_start, which Lightning cannot resume?"
                )
            self._epoch = epoch
        first = samples * micro_batches // self.global_batch_size
        for place in range(first, self.order.num_steps * micro_batches):
            if self._prefetcher is not None:
                self._prefetcher.move_to(epoch, place // micro_batches)
            yield epoch, *divmod(place, micro_batches)

    def teardown(self, stage: str) -> None:
        """End the process that fetches ahead."""
        if self._prefetcher is not None:
            self._prefetcher.close()

    def _make_prefetcher(self) -> Prefetcher | None:
        """One on each node, for the lanes of all its ranks; None where nothing is remote."""
        remote = any(is_remote(manifest.root) for manifest in self.corpus.manifests)
        if self.cache is None or not remote or self.prefetch_shards == 0:
            return None
        rank, world_size = self._rank_and_world_size()
        here = 1  # ranks that share the cache, as far as this process knows
        if self.trainer is not None:
            if self.trainer.local_rank != 0:
                return None
            here = self.trainer.num_devices
        each = self.order.lanes // world_size
        manifests = self.corpus.manifests
        sizes = [shard.num_bytes for manifest in manifests for shard in manifest.shards]
        upcoming = Upcoming(
            self.order,
            range(rank * each, (rank + here) * each),
            sizes,
            self.cache.limit_bytes,
            self.prefetch_shards,
        )
        behind = -(-max(1, self.num_workers) * self.prefetch // self._micro_batches()) + 1
        return Prefetcher(self.corpus, self.cache, upcoming, behind)

    def _watch(self, corpus: Corpus) -> DecodeWatch:
        run = None if self.trainer is None else Path(self.trainer.default_root_dir)
        hung = HungSamples(run and run / LIST_NAME, corpus.fingerprint)
        return DecodeWatch(self.num_workers, self.decode_timeout_s, hung)

    def _loader(
        self, dataset: Any, places: Any, length: int, reader: SampleReader | None
    ) -> PlaceLoader:
        loader = PlaceLoader(
            dataset,
            places,
            length,
            num_workers=self.num_workers if reader is not None else 0,
            prefetch=self.prefetch,
            monitor=getattr(dataset, "monitor", None),
            describe=None if reader is None else reader.describe,
            watch=getattr(dataset, "watch", None),
            start_method=self._start_method(),
        )
        callbacks = [] if self.trainer is None else self.trainer.callbacks  # type: ignore[attr-defined]
        fits = self.trainer is not None and self.trainer.state.fn == "fit"
        loader.hands_over = fits and any(hasattr(c, "takes_no_batch") for c in callbacks)
        return loader

    def _start_method(self) -> str:
        """How workers begin: what decodes on the GPU needs a process of its own kind."""
        if self.clip_options.decoder != "torchcodec-cuda":
            return "fork"
        if not torch.cuda.is_available():
            raise ValueError(
                "data.decoder is 'torchcodec-cuda', and there is no CUDA device here; use 'auto'"
            )
        return "spawn"

    def _eval_loaders(self, split: RetrievalSplit | None) -> list[PlaceLoader]:
        if split is None:
            return []
        corpus = Corpus.load([split.manifest], None, self.allow_pipe)
        reader = SampleReader(corpus, self.cache, self.retry)
        monitor = FaultMonitor(self.num_workers, self.max_fault_rate)
        clips = EvalClips(reader, self.clip_options, monitor, self._watch(reader.corpus))
        sentences = EvalSentences(split.sentences(self.allow_pipe))
        return [self._eval_loader(clips, reader), self._eval_loader(sentences, None)]

    def _eval_loader(
        self, dataset: EvalClips | EvalSentences, reader: SampleReader | None
    ) -> PlaceLoader:
        """Every rank gets the same number of batches; those past the end are padding."""
        rank, world_size = self._rank_and_world_size()
        size = self.eval_batch_size
        length = -(-len(dataset) // (size * world_size))
        places = [((k * world_size + rank) * size, size) for k in range(length)]
        return self._loader(dataset, lambda: places, length, reader)


def _counters(trainer: Trainer) -> Any:
    """Batches of the current epoch; Lightning types them by a base class without `processed`."""
    return trainer.fit_loop.epoch_loop.batch_progress.current


def _check_range(**given: tuple[int, int]) -> None:
    """Name the argument that is below its least value: name=(value, least)."""
    for name, (value, least) in given.items():
        if value < least:
            raise ValueError(f"data.{name} is {value}; it must be at least {least}")
