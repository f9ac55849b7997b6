"""Batches of the training stream and of evaluation, made from an order and a reader.

A batch is asked for by its place in the order and made whole by one loader worker; nothing else
decides what is in it. What is drawn at random (frames, crop, text) is seeded by
(seed, epoch, sample index), so it does not depend on who draws it either.
"""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batch import ClipBatch, TextBatch, pad_class_ids
from datamodules.manifest import ClipRecord
from datamodules.stream.captions import CaptionNegatives
from datamodules.stream.captions import Narration as Narration
from datamodules.stream.faults import FaultMonitor
from datamodules.stream.hung import DecodeWatch
from datamodules.stream.order import EpochOrder, StreamOrder, keyed_hash
from datamodules.stream.reader import MissingShard, SampleReader
from datamodules.tokenizer import Tokenizer
from datamodules.video.crops import crop_and_resize, random_crop_box, resize_and_centre_crop
from datamodules.video.decode import (
    DamagedSample,
    Decoder,
    check_decoder,
    decode_frames,
    decoder_of,
)
from datamodules.video.frames import Limits

logger = logging.getLogger(__name__)

_MAX_SUBSTITUTES = 100
_MANY_PLAIN = 500  # clips in a row without the hard negative that was asked for
_MOST_SKIPPED = 100_000  # samples of missing shards besides


class ChooseText(Protocol):
    """How training picks a clip's text."""

    def __call__(self, record: ClipRecord, generator: random.Random) -> Narration:
        """Return the text of one visit to a clip."""


def own_text(record: ClipRecord, generator: random.Random | None = None) -> Narration:
    """One of the clip's own texts, at random with a generator, else the first."""
    pick = 0 if generator is None else generator.randrange(len(record.texts))
    return Narration(record.texts[pick], -1, record.verb_classes, record.noun_classes)


@dataclass(frozen=True)
class ClipOptions:
    """What a clip becomes.

    Attributes:
        num_frames: T.
        image_size: Side of the frames.
        crop_scale: Least and greatest share of the frame's area for the random crop.
        decoder: Which library decodes; `auto` takes what serves each manifest best.
        limits: What a clip may declare.
    """

    num_frames: int = 4
    image_size: int = 224
    crop_scale: tuple[float, float] = (0.5, 1.0)
    decoder: Decoder = "auto"
    limits: Limits = Limits()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        check_decoder(self.decoder)
        if self.num_frames < 1 or self.image_size < 1:
            raise ValueError("num_frames and image_size must be at least 1")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale is {self.crop_scale}; it must rise, within (0, 1]")


@dataclass(frozen=True)
class _Item:
    """One pair before it is collated."""

    video: Tensor
    clip_index: int
    sample_index: int
    record: ClipRecord
    narration: Narration
    key: str
    negatives: Sequence[str] = ()

    @property
    def text_index(self) -> int:
        """The narration's row in its list; where it is the clip's own, the clip's."""
        return self.clip_index if self.narration.text_index < 0 else self.narration.text_index


class TrainStream(Dataset):
    """Training batches by (epoch, step, part).

    Args:
        reader: Where samples come from.
        order: Which sample belongs where.
        options: Frames and crop.
        choose_text: Which text goes with a clip.
        monitor: Counts damaged samples.
        part: This rank's first part of each global batch.
        num_parts: Ranks x micro-batches.
        watch: Knows what is being decoded, and what is not to be.
        text_widths: Verb and noun classes of the text that has most of each, where that is known:
            every batch then has as many columns, and ranks need not ask each other.
        hard: Adds hard negatives to the pairs; None for none.
    """

    def __init__(
        self,
        reader: SampleReader,
        order: StreamOrder,
        options: ClipOptions,
        choose_text: ChooseText,
        monitor: FaultMonitor,
        part: int,
        num_parts: int,
        watch: DecodeWatch | None = None,
        text_widths: tuple[int, int] | None = None,
        hard: CaptionNegatives | None = None,
    ) -> None:
        self.reader, self.order, self.options = reader, order, options
        self.hard = hard
        self.choose_text, self.monitor = choose_text, monitor
        self.part, self.num_parts = part, num_parts
        self.watch = watch or DecodeWatch(0, math.inf)
        self.decoders = _decoders(reader, options)
        self.text_widths = text_widths
        self.tokenizer = Tokenizer(pad_to_multiple_of=16)
        self._epoch: EpochOrder | None = None
        self._plain = 0

    def __getitem__(self, place: tuple[int, int, int]) -> ClipBatch:
        """Make one batch.

        Args:
            place: Epoch, step, and which of the rank's parts of it (its micro-batch).
        """
        epoch, step, micro = place
        if self._epoch is None or self._epoch.number != epoch:
            self._epoch = self.order.epoch(epoch)
        slots = self._epoch.batch(step, self.part + micro, self.num_parts)
        items = [
            item
            for lane, position, sample_index in zip(
                slots.lane, slots.position, slots.sample_index, strict=True
            )
            for item in self._fill(self._epoch, int(lane), int(position), int(sample_index))
        ]
        batch = collate(items, self.tokenizer, self.text_widths or (1, 1))
        # how many clips are shown backwards besides is each part's own affair
        batch.even = self.hard is None or not self.hard.reversed_share
        batch.same_text_widths = self.text_widths is not None
        return batch

    def _fill(self, epoch: EpochOrder, lane: int, position: int, sample_index: int) -> list[_Item]:
        """Return the sample of a place or, if it is damaged, the next good one of its lane.

        It comes with its time reversal, where that is drawn.
        """
        damaged, name = 0, ""
        for skip in range(_MOST_SKIPPED):
            # a lane may have nothing but missing shards: on to the next one
            then = (lane + skip // epoch.lane_length) % self.order.lanes
            shards, rows = epoch.locate(np.array([then]), np.array([position + skip]))
            shard, row = int(shards[0]), int(rows[0])
            self.monitor.begin(shard, row)
            try:
                return self._hard(epoch.number, self._make(epoch.number, shard, row, sample_index))
            except MissingShard as error:
                name = self.reader.name(shard)
                self.monitor.report_missing(shard, name, str(error), is_substitute=skip > 0)
            except DamagedSample as error:
                damaged += 1
                name = self.reader.describe(shard, row)
                self.monitor.report(name, str(error), "replaced by the next of its lane")
            if damaged == _MAX_SUBSTITUTES:
                break
        raise RuntimeError(f"{skip + 1} unusable samples in a row, from {name} backwards")

    def _make(self, epoch: int, shard: int, row: int, sample_index: int) -> _Item:
        generator = random.Random(keyed_hash(self.order.seed, epoch, sample_index, 3))
        sample = self.reader.read(shard, row)
        narration = self.choose_text(sample.record, generator)
        options = self.options
        with self.watch.decoding(shard, row):
            frames = decode_frames(
                sample.video, options.num_frames, generator, self.decoders[shard], options.limits
            )
        height, width = frames.shape[1:3]
        box = random_crop_box(height, width, generator, options.crop_scale)
        return _Item(
            crop_and_resize(frames, box, options.image_size),
            int(self.reader.corpus.starts[shard]) + row,
            sample_index,
            sample.record,
            narration,
            sample.key,
        )

    def _hard(self, epoch: int, item: _Item) -> list[_Item]:
        """Add what makes the pair hard, by draws of its own: frames, crop and text stay."""
        if self.hard is None:
            return [item]
        generator = random.Random(keyed_hash(self.order.seed, epoch, item.sample_index, 4))
        shown_backwards = generator.random() < self.hard.reversed_share
        turned = self.hard.backwards(item.record, item.narration) if shown_backwards else None
        items = [item]
        if turned is not None:
            record, narration = turned
            items.append(
                replace(item, video=item.video.flip(1), record=record, narration=narration)
            )
        items = [
            replace(one, negatives=self.hard.captions(one.narration, generator)) for one in items
        ]
        if any(any(one.negatives) for one in items) or turned is not None:
            self._plain = 0
        elif shown_backwards or items[0].negatives:
            self._plain += 1
            if self._plain == _MANY_PLAIN:
                logger.warning(
                    "data.hard_negatives: %d clips in a row have none: no caption names a word "
                    "that the vocabulary has for its clip's classes; the last is %r",
                    self._plain,
                    item.narration.text,
                )
        return items


class EvalClips(Dataset):
    """Evaluation batches of clips in the manifest's order, each clip exactly once over all ranks.

    A damaged clip becomes a masked row: a substitute would be scored as what it is not.

    Args:
        reader: Where samples come from.
        options: Frames and size.
        monitor: Counts damaged samples.
        watch: Knows what is being decoded, and what is not to be.
    """

    def __init__(
        self,
        reader: SampleReader,
        options: ClipOptions,
        monitor: FaultMonitor,
        watch: DecodeWatch | None = None,
    ) -> None:
        self.reader, self.options, self.monitor = reader, options, monitor
        self.watch = watch or DecodeWatch(0, math.inf)
        self.decoders = _decoders(reader, options)
        self.tokenizer = Tokenizer()

    def __len__(self) -> int:
        return int(self.reader.corpus.starts[-1])

    def __getitem__(self, span: tuple[int, int]) -> ClipBatch:
        """Make the batch of rows [start, start + size); rows past the end are masked padding."""
        start, size = span
        return collate([self._make(start + i) for i in range(size)], self.tokenizer)

    def _make(self, clip_index: int) -> _Item:
        if clip_index < len(self):
            starts = self.reader.corpus.starts
            shard = int(np.searchsorted(starts, clip_index, side="right")) - 1
            row = clip_index - int(starts[shard])
            self.monitor.begin(shard, row)
            try:
                sample = self.reader.read(shard, row)
                options, decoder = self.options, self.decoders[shard]
                with self.watch.decoding(shard, row):
                    frames = decode_frames(
                        sample.video, options.num_frames, None, decoder, options.limits
                    )
                video = resize_and_centre_crop(frames, options.image_size)
                record = sample.record
                return _Item(video, clip_index, clip_index, record, own_text(record), sample.key)
            except MissingShard as error:
                self.monitor.report_missing(shard, self.reader.name(shard), str(error), False)
            except DamagedSample as error:
                name = self.reader.describe(shard, row)
                self.monitor.report(name, str(error), "left out of the evaluation")
        size = self.options.image_size
        blank = torch.zeros(3, self.options.num_frames, size, size, dtype=torch.uint8)
        nothing = ClipRecord("", "", 0.0, 0.0, ("",))
        return _Item(blank, -1, -1, nothing, own_text(nothing), "")


def _decoders(reader: SampleReader, options: ClipOptions) -> list[Decoder]:
    """Say which decoder serves each shard."""
    decoders: list[Decoder] = []
    for manifest in reader.corpus.manifests:
        decoder = decoder_of(options.decoder, manifest.options)
        logger.info("clips of %s are decoded by %s", manifest.root or ".", decoder)
        decoders += [decoder] * len(manifest.shards)
    return decoders


class EvalSentences(Dataset):
    """Evaluation batches of sentences in their list's order.

    Args:
        sentences: The list.
    """

    def __init__(self, sentences: Sequence[Narration]) -> None:
        self.sentences = sentences
        self.tokenizer = Tokenizer()

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, span: tuple[int, int]) -> TextBatch:
        """Make the batch of rows [start, start + size); rows past the end are masked padding."""
        start, size = span
        rows = list(self.sentences[start : start + size])
        padding = size - len(rows)
        return TextBatch(
            tokens=self.tokenizer([row.text for row in rows] + [""] * padding),
            text_index=torch.tensor([row.text_index for row in rows] + [-1] * padding),
            mask=torch.tensor([True] * len(rows) + [False] * padding),
            verb_classes=pad_class_ids([list(r.verb_classes) for r in rows] + [[]] * padding),
            noun_classes=pad_class_ids([list(r.noun_classes) for r in rows] + [[]] * padding),
        )


def _class_ids(rows: Iterable[Sequence[int]], width: int = 1) -> Tensor:
    return pad_class_ids([list(row) for row in rows], width)


def collate(
    items: Sequence[_Item],
    tokenizer: Callable[[Sequence[str]], Tensor],
    text_widths: tuple[int, int] = (1, 1),
) -> ClipBatch:
    """Stack pairs into a batch; rows without a clip (index -1) are masked.

    Args:
        items: The pairs.
        tokenizer: Texts to ids.
        text_widths: Least columns of the texts' verb and noun classes.
    """
    clip_index = torch.tensor([item.clip_index for item in items])
    texts = [[item.narration.text, *item.negatives] for item in items]
    tokens = tokenizer([text for row in texts for text in row]).unflatten(0, (len(items), -1))
    negatives = None
    if tokens.shape[1] > 1:
        made = torch.tensor([[text != "" for text in row[1:]] for row in texts])
        negatives = tokens[:, 1:] * made[:, :, None]
    return ClipBatch(
        video=torch.stack([item.video for item in items]),
        tokens=tokens[:, 0].contiguous(),
        clip_index=clip_index,
        text_index=torch.tensor([item.text_index for item in items]),
        sample_index=torch.tensor([item.sample_index for item in items]),
        mask=clip_index >= 0,
        verb_classes=_class_ids(item.record.verb_classes for item in items),
        noun_classes=_class_ids(item.record.noun_classes for item in items),
        text_verb_classes=_class_ids(
            (item.narration.verb_classes for item in items), text_widths[0]
        ),
        text_noun_classes=_class_ids(
            (item.narration.noun_classes for item in items), text_widths[1]
        ),
        keys=[item.key for item in items],
        negative_tokens=negatives,
    )
