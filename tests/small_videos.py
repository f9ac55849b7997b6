"""Videos for tests, rendered here: frame k of a video has its own brightness and a moving bar."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def picture(k: int, height: int = 48, width: int = 64) -> np.ndarray:
    frame = np.full((height, width, 3), 20 + 3 * (k % 70), np.uint8)
    frame[:, (3 * k) % width : (3 * k) % width + 6] = (220, 30, 60)
    return frame


def write_video(
    path: Path,
    num_frames: int,
    fps: int | Fraction = 10,
    times_s: Sequence[float] | None = None,
    gop: int = 250,
    first: int = 0,
) -> Path:
    """Encode `picture(first)`, ... at a rate, or at given times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"crf": "10", "g": str(gop), "preset": "veryfast"}
        stream.codec_context.time_base = Fraction(1, 1000) if times_s else 1 / Fraction(fps)
        for k in range(num_frames):
            frame = av.VideoFrame.from_ndarray(picture(first + k), format="rgb24")
            frame.pts = round(1000 * times_s[k]) if times_s else k
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def brightness(frame: np.ndarray) -> float:
    """Which picture it is: the median ignores the bar."""
    return (float(np.median(frame[..., 2])) - 20) / 3
