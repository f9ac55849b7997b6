"""Embeddings of a set of shards and of texts, over any number of ranks, each sample once.

The work is cut into the same batches whatever the number of ranks, so that results do not depend on
it, and gathered by identity: what pads the last batches never counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from datamodules.stream.clips import ClipOptions, EvalClips
from datamodules.stream.faults import FaultMonitor
from datamodules.stream.loader import PlaceLoader
from datamodules.stream.reader import Corpus, SampleReader
from datamodules.tokenizer import Tokenizer
from lightning_modules.losses.gather import gather_no_gradient, world_size
from lightning_modules.models import DualEncoder


@dataclass(frozen=True)
class EmbedOptions:
    """How clips become embeddings.

    Attributes:
        batch_size: Clips (and texts) in a forward pass.
        num_workers: Decoding processes a rank.
        views: Clips of T frames taken from each segment, interleaved in time, and averaged.
        flip: Average with the horizontally flipped clip.
        max_fault_rate: Share of damaged clips above which the evaluation ends.
    """

    batch_size: int = 16
    num_workers: int = 2
    views: int = 1
    flip: bool = False
    max_fault_rate: float = 0.01

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.views < 1 or self.num_workers < 0:
            raise ValueError(
                f"batch size {self.batch_size}, views {self.views} and workers "
                f"{self.num_workers} given; they must be at least 1, 1 and 0"
            )


@torch.inference_mode()
def embed_clips(
    model: DualEncoder,
    corpus: Corpus,
    options: EmbedOptions,
    on_progress: Callable[[int], object] = lambda done: None,
) -> tuple[Tensor, Tensor]:
    """Embed every clip of a set of shards.

    Args:
        model: In evaluation mode, on its device; the same on every rank.
        corpus: The shards.
        options: See there.
        on_progress: Called with the number of this rank's clips just finished.

    Returns:
        (n, E) fp32 on the CPU, L2-normalised, in the order of the shards, NaN where a clip is
        damaged; and (n,) bool, False there. The same on every rank.
    """
    vision = model.config.vision
    clip_options = ClipOptions(vision.num_frames * options.views, vision.image_size)
    reader = SampleReader(corpus)
    monitor = FaultMonitor(options.num_workers, options.max_fault_rate)
    dataset = EvalClips(reader, clip_options, monitor)
    places = _own_places(len(dataset), options.batch_size)
    loader = PlaceLoader(
        dataset,
        lambda: places,
        len(places),
        num_workers=options.num_workers,
        monitor=monitor,
        describe=reader.describe,
    )
    rows, index = [], []
    for batch in loader:
        rows.append(_embed_views(model, batch.video, options)[batch.mask])
        index.append(batch.clip_index[batch.mask])
        on_progress(int(batch.mask.sum()))
    return _gather(rows, index, len(dataset), model)


@torch.inference_mode()
def embed_texts(model: DualEncoder, texts: Sequence[str], batch_size: int) -> Tensor:
    """Embed texts: (n, E) fp32 on the CPU, L2-normalised, the same on every rank."""
    tokenizer, device = Tokenizer(model.config.text.context_length), _device(model)
    rows, index = [], []
    for start, size in _own_places(len(texts), batch_size):
        chosen = texts[start : start + size]
        # Padded to whole batches: a matrix product may round otherwise for another batch size.
        tokens = tokenizer([*chosen, *[""] * (size - len(chosen))])
        rows.append(model.encode_text(tokens.to(device)).float()[: len(chosen)])
        index.append(torch.arange(start, start + len(chosen)))
    return _gather(rows, index, len(texts), model)[0]


def _own_places(total: int, batch_size: int) -> list[tuple[int, int]]:
    """(start, size) of this rank's batches; every rank has the same number of them."""
    num_ranks = world_size()
    rank = dist.get_rank() if num_ranks > 1 else 0
    rounds = -(-total // (batch_size * num_ranks))
    return [((k * num_ranks + rank) * batch_size, batch_size) for k in range(rounds)]


def _embed_views(model: DualEncoder, video: Tensor, options: EmbedOptions) -> Tensor:
    """(B, 3, views * T, H, W) to the mean embedding of its views, normalised."""
    video = video.to(_device(model))
    # view k shows frames k, k + views, ...: each spans the whole segment
    clips = [video[:, :, view :: options.views] for view in range(options.views)]
    if options.flip:
        clips += [clip.flip(-1) for clip in clips]
    embeddings = [model.encode_video(clip).float() for clip in clips]
    if len(embeddings) == 1:
        return embeddings[0]
    return F.normalize(torch.stack(embeddings).mean(dim=0), dim=-1)


def _gather(
    rows: list[Tensor], index: list[Tensor], total: int, model: DualEncoder
) -> tuple[Tensor, Tensor]:
    """All ranks' rows at the places that `index` says, and which places were filled."""
    device, width = _device(model), model.config.embed_dim
    own = torch.cat(rows) if rows else torch.empty(0, width, device=device)
    places = torch.cat(index).to(device) if index else torch.empty(0, dtype=torch.int64)
    own, places = gather_no_gradient(own).cpu(), gather_no_gradient(places.to(device)).cpu()
    everything = torch.full((total, width), torch.nan)  # what is missing must not look like a zero
    present = torch.zeros(total, dtype=torch.bool)
    everything[places], present[places] = own, True
    return everything, present


def _device(model: DualEncoder) -> torch.device:
    return next(model.parameters()).device
