"""Trimming one clip out of its source files into a small mp4 of its own.

Re-encoded rather than stream-copied: a copied cut decodes to wrong frames at its start and reports
a wrong length. A short GOP without B-frames makes four scattered frames cheap to decode.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
from av.video.frame import VideoFrame

from datamodules.video.colour import tag_stored
from datamodules.video.frames import UNREADABLE, Limits, Video, on_screen
from datamodules.video.pieces import Piece, RejectedClip

_PRESETS = (
    "ultrafast",
    "superfast",
    "veryfast",
    "faster",
    "fast",
    "medium",
    "slow",
    "slower",
    "veryslow",
)


@dataclass(frozen=True)
class EncodeOptions:
    """How a clip is stored.

    Attributes:
        short_side: Shorter side in pixels; smaller sources are not enlarged.
        fps: Frames a second; None, or more than the source has, keeps the source's rate.
        gop: Frames from one key frame to the next; 1 stores key frames alone.
        crf: x264's quality, 0 (lossless) to 51.
        preset: x264's trade of time for size.
        fast_decode: Leave out arithmetic coding and deblocking (x264's tune `fastdecode`): a tenth
            more bytes, and less than half the time to decode.
        min_coverage: Share of the clip's duration that the source must cover.
    """

    short_side: int = 256
    fps: float | None = None
    gop: int = 8
    crf: int = 23
    preset: str = "medium"
    fast_decode: bool = True
    min_coverage: float = 0.5

    def __post_init__(self) -> None:
        for name, value, rule, holds in (
            ("short_side", self.short_side, "at least 16", self.short_side >= 16),
            ("fps", self.fps, "positive", self.fps is None or self.fps > 0),
            ("gop", self.gop, "at least 1", self.gop >= 1),
            ("crf", self.crf, "from 0 to 51", 0 <= self.crf <= 51),
            ("min_coverage", self.min_coverage, "from 0 to 1", 0 <= self.min_coverage <= 1),
            ("preset", self.preset, f"one of {', '.join(_PRESETS)}", self.preset in _PRESETS),
        ):
            if not holds:
                raise ValueError(f"{name} is {value}; it must be {rule}")


# What each choice costs in bytes and gains in speed is measured in docs/data.md.
RECIPES: dict[str, EncodeOptions] = {
    "pretrain": EncodeOptions(short_side=256, fps=15.0, gop=8),  # 4 frames of 1-2 s
    "mir": EncodeOptions(short_side=256, gop=8),  # 16 frames of about 3 s, the source's rate
    "video": EncodeOptions(short_side=256, fps=4.0, gop=4),  # 16 frames of 30 s, as in Charades-Ego
}


@dataclass(frozen=True)
class EncodedClip:
    """A finished clip.

    Attributes:
        data: The mp4 file.
        num_frames: Frames in it.
        fps: Frames a second.
        width: Pixels.
        height: Pixels.
    """

    data: bytes
    num_frames: int
    fps: float
    width: int
    height: int


def encode_clip(
    pieces: Sequence[Piece],
    start_s: float,
    end_s: float,
    options: EncodeOptions,
    limits: Limits | None = None,
) -> EncodedClip:
    """Cut a span out of its source files.

    Frames are chosen by their timestamps, so that odd and variable frame rates keep their timing:
    output frame k shows what the source showed at start_s + k / fps. The same source and options
    give the same bytes (one encoder thread).

    Args:
        pieces: The files that hold the span, in time order.
        start_s: Start on the source video's clock.
        end_s: End on the source video's clock.
        options: How to store it.
        limits: What a source may declare.

    Raises:
        RejectedClip: A source cannot be decoded or covers too little of the span.
    """
    try:
        frames, rate = _cut(pieces, start_s, end_s, options.fps, limits or Limits())
        clip = _encode(frames, rate, options)
    except UNREADABLE as error:
        raise RejectedClip(f"unreadable: {error}") from error
    wanted = max(1.0, (end_s - start_s) * float(rate))
    if clip is None or clip.num_frames < options.min_coverage * wanted:
        covered = 0.0 if clip is None else clip.num_frames / float(rate)
        raise RejectedClip(
            f"short: the source covers {covered:.2f} s of {start_s:.2f}-{end_s:.2f} s"
        )
    return clip


def encode_whole(data: bytes, options: EncodeOptions, limits: Limits) -> EncodedClip:
    """Bring a whole clip of somebody else's into the stored form.

    Raises:
        RejectedClip: It cannot be decoded.
    """
    try:
        with Video(data, limits) as video:
            duration_s = video.stamps().duration_s
    except UNREADABLE as error:
        raise RejectedClip(f"unreadable: {error}") from error
    return encode_clip([Piece(data, 0.0)], 0.0, duration_s, options, limits)


@dataclass(frozen=True)
class _Picture:
    """A frame, and the video that knows how it is shown."""

    frame: VideoFrame
    video: Video


def _cut(
    pieces: Sequence[Piece], start_s: float, end_s: float, fps: float | None, limits: Limits
) -> tuple[Iterator[_Picture], Fraction]:
    """Return the frame shown at each of start_s + k / rate < end_s, at least one, and the rate."""
    with Video(pieces[0].source, limits) as first:
        rate = first.rate
    if fps is not None and fps < rate:
        rate = Fraction(fps)
    rate = rate.limit_denominator(1001)
    count = max(1, round((end_s - start_s) * float(rate)))
    times = [start_s + k / float(rate) for k in range(count)]
    return on_screen(_timed(pieces, start_s, end_s, limits), times, 1 / float(rate)), rate


def _timed(
    pieces: Sequence[Piece], start_s: float, end_s: float, limits: Limits
) -> Iterator[tuple[float, _Picture]]:
    """Yield (time on the source video's clock, picture) from the start, or before it, on."""
    begun = False
    for piece in pieces:
        with Video(piece.source, limits) as video:
            for time_s, frame in video.frames(max(0.0, start_s - piece.offset_s)):
                time_s += piece.offset_s
                if not begun and time_s >= end_s:
                    return  # the span falls into a gap of the source
                begun = True
                yield time_s, _Picture(frame, video)


def _encode(
    pictures: Iterator[_Picture], rate: Fraction, options: EncodeOptions
) -> EncodedClip | None:
    first = next(pictures, None)
    if first is None:
        return None
    shown = first.video.upright_size(first.frame)
    scale = min(1.0, options.short_side / min(shown))
    width, height = (max(2, 2 * round(side * scale / 2)) for side in shown)
    buffer = io.BytesIO()
    # PyAV's stubs leave out what an output container can do
    container: Any = av.open(buffer, "w", format="mp4")
    with container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        tag_stored(stream.codec_context)
        stream.codec_context.thread_count = 1
        stream.options = {
            "crf": str(options.crf),
            "preset": options.preset,
            "g": str(options.gop),
            "keyint_min": str(options.gop),
            "sc_threshold": "0",
            "bf": "0",
            # With macroblock trees x264's vector code (core 165) gave other bytes in one process
            # of eight where the width is no multiple of 16; without, 1,728 encodings were equal.
            "x264-params": "mbtree=0",
        }
        if options.fast_decode:
            stream.options |= {"tune": "fastdecode"}
        count = 0
        for picture in itertools.chain([first], pictures):
            small = picture.video.painter.stored(picture.frame, width, height)
            small.pts, small.time_base = count, 1 / rate
            small.pict_type = 0  # the encoder decides, not the source's frame types
            container.mux(stream.encode(small))
            count += 1
        container.mux(stream.encode())
    return EncodedClip(buffer.getvalue(), count, float(rate), width, height)
