"""The DataModule of contrastive pretraining."""

from __future__ import annotations

from typing import Any

from datamodules.module import RetrievalSplit, StreamDataModule
from datamodules.stream.clips import ChooseText, own_text


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
        **options: As `StreamDataModule`.
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
        **options: Any,
    ) -> None:
        super().__init__(
            global_batch_size=global_batch_size,
            eval_batch_size=eval_batch_size,
            num_frames=num_frames,
            **options,
        )
        self.train_manifests, self.train_weights = train, weights
        self.val_split, self.test_split = val, test

    def choose_text(self) -> ChooseText:
        """One of the clip's own texts, at random."""
        return own_text
