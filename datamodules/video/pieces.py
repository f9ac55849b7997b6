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
        source: The video file, or what is in it.
        offset_s: The file's first frame on the source video's clock, seconds.
    """

    source: Path | bytes
    offset_s: float
