"""The typed batches that the data path hands over: all that a LightningModule knows of the data.

Shape legend: B clips of a rank's batch, T frames, H x W pixels, V/N the widest row of class ids.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


class _TensorFields:
    """Pinning for `DataLoader(pin_memory=True)`, which looks for this method on custom batches."""

    def pin_memory(self):
        """Return a copy whose tensors lie in page-locked memory."""
        pinned = {
            f.name: value.pin_memory()
            for f in fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(self, **pinned)  # type: ignore[type-var]


@dataclass
class ClipBatch(_TensorFields):
    """A batch of (clip, narration) pairs; row b of every field belongs to the same pair.

    Class ids are padded with -1. The text's classes are its own, not the clip's: multi-instance
    retrieval pairs a clip with any narration whose relevance is at least the mining threshold.

    Attributes:
        video: (B, 3, T, H, W) uint8, RGB; the LightningModule normalises it on the device.
        tokens: (B, L) int64 token ids of the narrations. L is 77 in evaluation; in training the
            longest narration's, rounded up to a multiple of 16.
        clip_index: (B,) int64, the clip's row in its manifest: its identity in metrics.
        text_index: (B,) int64, the narration's row in the sentence list (clip_index where each
            clip has its own).
        sample_index: (B,) int64, the global sample index within the epoch, which seeds
            augmentation and text choice; -1 for padding rows.
        mask: (B,) bool, False for rows that only pad an evaluation batch to an even size.
        verb_classes: (B, V) int64 verb class ids of the clip.
        noun_classes: (B, N) int64 noun class ids of the clip.
        text_verb_classes: (B, V) int64 verb class ids of the narration.
        text_noun_classes: (B, N) int64 noun class ids of the narration.
        keys: B sample keys, for error messages and health reports.
        even: Whoever made the batch guarantees that every rank's of this step has as many pairs, so
            that nobody need ask.
        same_text_widths: And that the texts' class ids have as many columns.
        negative_tokens: (B, K, L) token ids of captions that are false of each clip; rows of zeros
            where none could be made. None where the stream makes none.
    """

    video: Tensor
    tokens: Tensor
    clip_index: Tensor
    text_index: Tensor
    sample_index: Tensor
    mask: Tensor
    verb_classes: Tensor
    noun_classes: Tensor
    text_verb_classes: Tensor
    text_noun_classes: Tensor
    keys: list[str]
    even: bool = False
    same_text_widths: bool = False
    negative_tokens: Tensor | None = None

    def __len__(self) -> int:
        return self.video.shape[0]


@dataclass
class TextBatch(_TensorFields):
    """A batch of sentences to retrieve, for evaluation.

    Attributes:
        tokens: (B, 77) int64 token ids.
        text_index: (B,) int64, the sentence's row in the sentence list.
        mask: (B,) bool, False for rows that only pad the batch.
        verb_classes: (B, V) int64, padded with -1.
        noun_classes: (B, N) int64, padded with -1.
    """

    tokens: Tensor
    text_index: Tensor
    mask: Tensor
    verb_classes: Tensor
    noun_classes: Tensor

    def __len__(self) -> int:
        return self.tokens.shape[0]


def pad_class_ids(rows: list[list[int]], width: int = 1) -> Tensor:
    """Stack ragged lists of class ids into (B, max(width, longest)) int64, padded with -1."""
    width = max(width, max((len(row) for row in rows), default=1))
    padded = torch.full((len(rows), width), -1, dtype=torch.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = torch.tensor(ids, dtype=torch.int64)
    return padded
