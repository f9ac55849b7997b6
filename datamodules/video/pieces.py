"""What a clip is cut from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


class RejectedClip(Exception):
    """A clip that cannot be built; the message is the reason that goes into the rejects file."""


@dataclass(frozen=True)
class Piece:
    """A file that holds a part of a clip.

    Attributes:
        path: The video file.
        offset_s: The file's first frame on the source video's clock, seconds.
    """

    path: Path
    offset_s: float
