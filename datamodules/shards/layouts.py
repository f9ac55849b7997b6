"""Where a moment of a source video lies on disk: whole files, or chunks by index or by second."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from datamodules.video.pieces import Piece, RejectedClip


@dataclass(frozen=True)
class VideoLayout:
    """A family's way of storing videos.

    Attributes:
        pattern: Relative path with `{video_id}`, `{participant}` (the video id up to its first
            `_`), and for chunks `{index}` (0, 1, ...) or `{start}` (whole seconds).
        chunk_s: Length of a chunk in seconds; None for whole videos.

    Raises:
        ValueError: The pattern does not fit the chunking.
    """

    pattern: str
    chunk_s: int | None = None

    def __post_init__(self) -> None:
        chunked = "{index}" in self.pattern or "{start}" in self.pattern
        if chunked != (self.chunk_s is not None) or (self.chunk_s or 1) <= 0:
            raise ValueError(
                f"layout {self.pattern!r} with chunks of {self.chunk_s} s: a pattern with "
                "{index} or {start} needs a chunk length, one without needs none"
            )
        try:
            self._path("v", 0)
        except (KeyError, IndexError, ValueError) as error:
            raise ValueError(
                f"layout {self.pattern!r}: unknown field {error}; the fields are {{video_id}}, "
                "{participant}, {index}, {start}"
            ) from error

    def _path(self, video_id: str, chunk: int) -> str:
        start = chunk * (self.chunk_s or 0)
        participant = video_id.partition("_")[0]
        return self.pattern.format(
            video_id=video_id, participant=participant, index=chunk, start=start
        )

    def pieces(
        self,
        root: Path,
        video_id: str,
        start_s: float,
        end_s: float,
        is_file: Callable[[Path], bool] = Path.is_file,
    ) -> list[Piece]:
        """Find the files that hold a span, in time order.

        A missing chunk after the first is taken as the end of the video; how much of the clip must
        be there is the reader's rule.

        Args:
            root: Folder of the videos.
            video_id: Which.
            start_s: The span's start.
            end_s: Its end.
            is_file: Says whether a file exists.

        Raises:
            RejectedClip: The file that holds the start is missing.
        """
        if self.chunk_s is None:
            numbers = range(1)
        else:
            first = math.floor(start_s / self.chunk_s)
            # a clip that ends on a boundary does not need the chunk that starts there
            numbers = range(first, max(first, math.ceil(end_s / self.chunk_s) - 1) + 1)
        pieces = []
        for number in numbers:
            path = root / self._path(video_id, number)
            if not is_file(path):
                break
            pieces.append(Piece(path, float(number * (self.chunk_s or 0))))
        if not pieces:
            raise RejectedClip(f"missing: {self._path(video_id, numbers[0])}")
        return pieces


class Listing:
    """Says which files exist by listing each folder once.

    On a network file system each question is a round trip, and EgoClip's clips ask 3.85 million.
    Files that arrive later are not seen.
    """

    def __init__(self) -> None:
        self._names = lru_cache(maxsize=4096)(_file_names)

    def __call__(self, path: Path) -> bool:
        """True if a file of this path existed when its folder was listed."""
        return path.name in self._names(path.parent)


def _file_names(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except (OSError, ValueError):  # no such folder, or a name that can be none
        return frozenset()


LAYOUTS: dict[str, VideoLayout] = {
    "whole": VideoLayout("{video_id}.mp4"),
    "egovlp": VideoLayout("{video_id}/{index}.mp4", 600),
    "lavila": VideoLayout("{video_id}.mp4/{start}.mp4", 300),
    "avion": VideoLayout("{video_id}.mp4/{start}.mp4", 15),
    "ek100": VideoLayout("{participant}/{video_id}.MP4"),
    "ek100_avion": VideoLayout("{participant}/{video_id}.MP4/{start}.MP4", 15),
}


def find_layout(name: str, chunk_s: int | None = None) -> VideoLayout:
    """Return a layout by name, or the one that a pattern describes.

    Args:
        name: One of `LAYOUTS`, or a pattern with `{video_id}`.
        chunk_s: Chunk length of a pattern.

    Raises:
        ValueError: It is neither, or a chunk length comes with a name.
    """
    if name in LAYOUTS:
        if chunk_s is not None:
            raise ValueError(f"--chunk-seconds goes with a pattern, not with layout {name!r}")
        return LAYOUTS[name]
    if "{video_id}" not in name:
        raise ValueError(f"unknown layout {name!r}; one of {', '.join(LAYOUTS)}, or a pattern")
    return VideoLayout(name, chunk_s)
