"""The DataModule of contrastive pretraining."""

from __future__ import annotations

from datamodules.decode import Decoder
from datamodules.module import RetrievalSplit, StreamDataModule
from datamodules.stream import ChooseText, ClipOptions, own_text


class PretrainDataModule(StreamDataModule):
    """Narrated clips for pretraining: each clip with one of its own texts.

    Args:
        train: Manifests of the training shards; an epoch goes through all of them.
        weights: How often each manifest is seen in an epoch, 1 each by default; fractions take
            another part of the set in each epoch.
        val: Clips and sentences for zero-shot retrieval in validation; none by default.
        test: The same for `test`; `val` by default.
        global_batch_size: Pairs a step over all ranks. It belongs to the recipe; each rank's share
            follows from the number of ranks, so that a run may move to more or fewer GPUs.
        eval_batch_size: Clips, or sentences, a rank and batch in evaluation.
        num_frames: Frames a clip.
        image_size: Side of the frames in pixels.
        crop_scale: Least and greatest share of the frame's area for the random crop.
        num_workers: Loader processes a rank; 0 reads in the trainer's own.
        prefetch: Batches that each of them prepares ahead.
        seed: Seed of order, crops, frames and texts.
        lanes: Canonical streams; see `datamodules.order`.
        shuffle_window: Samples of a lane that are permuted together; see `datamodules.order`.
        max_fault_rate: Share of damaged samples above which the run ends.
        accept_changed_data: Resume although the data or the batch size is not the checkpoint's.
        decoder: `decord`, or `torchcodec` where it is installed.
        cache_dir: Folder for copies of remote shards; needed if a manifest is a URL.
        cache_gb: How much it may hold.
    """

    def __init__(
        self,
        train: list[str],
        weights: list[float] | None = None,
        val: RetrievalSplit | None = None,
        test: RetrievalSplit | None = None,
        global_batch_size: int = 1024,
        eval_batch_size: int = 64,
        num_frames: int = 4,
        image_size: int = 224,
        crop_scale: tuple[float, float] = (0.5, 1.0),
        num_workers: int = 8,
        prefetch: int = 2,
        seed: int = 0,
        lanes: int | None = None,
        shuffle_window: int | None = None,
        max_fault_rate: float = 0.01,
        accept_changed_data: bool = False,
        decoder: Decoder = "decord",
        cache_dir: str | None = None,
        cache_gb: float = 100.0,
    ) -> None:
        super().__init__(
            clip_options=ClipOptions(num_frames, image_size, crop_scale, decoder),
            global_batch_size=global_batch_size,
            eval_batch_size=eval_batch_size,
            num_workers=num_workers,
            prefetch=prefetch,
            seed=seed,
            lanes=lanes,
            shuffle_window=shuffle_window,
            max_fault_rate=max_fault_rate,
            accept_changed_data=accept_changed_data,
            cache_dir=cache_dir,
            cache_gb=cache_gb,
        )
        self.train_manifests, self.train_weights = train, weights
        self.val_split, self.test_split = val, test

    def choose_text(self) -> ChooseText:
        """One of the clip's own texts, at random."""
        return own_text
