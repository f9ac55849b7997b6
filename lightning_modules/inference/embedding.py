"""Embeddings of windows of videos, and of sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from datamodules.tokenizer import Tokenizer
from datamodules.video.frames import Limits
from datamodules.video.windows import (
    Unreadable,
    Window,
    probe_videos,
    read_windows,
    sliding_windows,
)
from lightning_modules.checkpoints.conversion import LoadedModel
from lightning_modules.checkpoints.model_config import warn_of_frames
from lightning_modules.models import DualEncoder


@dataclass(frozen=True)
class EmbedOptions:
    """How videos are turned into embeddings.

    Attributes:
        num_frames: T of a window; None for the model's own.
        rate: Windows a second; None takes each video as one window.
        window_s: Length of a window; None for 1 / rate.
        batch_size: Windows in a forward pass.
        num_workers: Decoding processes.
        device: Of the model.
        dtype: "float32" or "bfloat16": arithmetic of the forward pass.
        limits: What a video may declare.
    """

    num_frames: int | None = None
    rate: float | None = None
    window_s: float | None = None
    batch_size: int = 16
    num_workers: int = 2
    device: str = "cpu"
    dtype: str = "float32"
    limits: Limits = Limits()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        for name in ("num_frames", "rate", "window_s", "batch_size", "num_workers"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name.replace('_', '-')} is {value}; it must be positive")
        if self.window_s is not None and self.rate is None:
            raise ValueError("window-s needs a rate: windows a second")


@dataclass
class Embedded:
    """Embeddings and the windows they stand for, in the order of the videos.

    Attributes:
        windows: N windows.
        embeddings: (N, E) fp32 on the CPU, L2-normalised.
        unreadable: What was left out, and why.
    """

    windows: list[Window] = field(default_factory=list)
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    unreadable: list[Unreadable] = field(default_factory=list)


class Embedder:
    """A model that is ready to embed.

    Args:
        model: In evaluation mode, or what `load_model` returns.
        options: See there.
    """

    def __init__(
        self, model: DualEncoder | LoadedModel, options: EmbedOptions | None = None
    ) -> None:
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        model = model.model if isinstance(model, LoadedModel) else model
        options = options or EmbedOptions()
        self.model = model.to(options.device, dtypes[options.dtype])
        self.options = options
        vision = model.config.vision
        self.num_frames = options.num_frames or vision.num_frames
        warn_of_frames(vision, self.num_frames, vision.num_frames)
        self.image_size = vision.image_size
        self.tokenizer = Tokenizer(model.config.text.context_length)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed sentences: (N, E) fp32 on the CPU, L2-normalised."""
        tokens = self.tokenizer(list(texts)).to(self.options.device)
        return self.model.encode_text(tokens).float().cpu()

    @torch.inference_mode()
    def tokens(self, texts: Sequence[str], batch_size: int) -> list[Tensor]:
        """Hidden states of sentences, from the start to the end token: (L, D) fp32 on the CPU."""
        found = []
        for start in range(0, len(texts), batch_size):
            tokens = self.tokenizer(list(texts[start : start + batch_size]))
            states = self.model.text.hidden_states(tokens.to(self.options.device)).float().cpu()
            ends = tokens.argmax(dim=1) + 1
            found += [row[:end].clone() for row, end in zip(states, ends.tolist(), strict=True)]
        return found

    def windows_of(self, videos: Sequence[Path]) -> tuple[list[Window], list[Unreadable]]:
        """Cut videos into windows as the options say.

        Returns:
            The windows, video by video, and the videos that cannot be read.
        """
        measured = dict(probe_videos(videos, self.options.num_workers, self.options.limits))
        windows, unreadable = [], []
        for video in videos:
            length = measured[video]
            if isinstance(length, Unreadable):
                unreadable.append(length)
            elif self.options.rate is None:
                windows.append(Window(video, 0.0, length.duration_s))
            else:
                cut = sliding_windows(video, length, self.options.rate, self.options.window_s)
                windows += cut
        return windows, unreadable

    @torch.inference_mode()
    def windows(
        self, windows: Sequence[Window], on_progress: Callable[[int], object] = lambda done: None
    ) -> Embedded:
        """Embed windows of videos.

        Args:
            windows: Video by video, in order of time.
            on_progress: Called with the number of windows just finished, readable or not.

        Returns:
            Those that could be read, in the given order.
        """
        options = self.options
        place = {window: number for number, window in enumerate(windows)}
        rows: list[tuple[int, Window, Tensor]] = []
        result = Embedded()
        batches = read_windows(
            windows,
            self.num_frames,
            self.image_size,
            options.num_workers,
            options.batch_size,
            options.limits,
        )
        for read, clips, unreadable in batches:
            if read:
                found = self.model.encode_video(clips.to(options.device)).float().cpu()
                rows += [(place[w], w, row) for w, row in zip(read, found, strict=True)]
            result.unreadable += unreadable
            on_progress(len(read) + len(unreadable))
        rows.sort(key=lambda row: row[0])
        result.windows = [window for _, window, _ in rows]
        embed_dim = self.model.config.embed_dim
        result.embeddings = (
            torch.stack([r for *_, r in rows]) if rows else torch.empty(0, embed_dim)
        )
        return result
