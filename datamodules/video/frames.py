"""Frames at given times of a video file, or of its bytes: those that are on the screen then.

Every path reads videos through here: the build, the index of foreign tars, the training reader
where no faster decoder is wanted, `embed` and `search`. Time 0 is when the first frame appears.

After a seek, decoding begins at a key frame; what is shown before that key frame (leading pictures
of an open GOP) cannot be decoded from it, so that a moment before it needs an earlier one. Formats
without an index may land anywhere; the seek then goes farther back until the frame that comes out
first is not later than what is wanted.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from av.stream import Disposition
from av.video.frame import VideoFrame
from numpy.typing import NDArray

from datamodules.video.colour import DAMAGED, Painter, shown_size, turn

T = TypeVar("T")
# What reading an odd file raises; FFmpeg's own errors are OSErrors or ValueErrors as well.
UNREADABLE = (
    av.FFmpegError,
    OSError,
    ValueError,
    EOFError,
    IndexError,
    ArithmeticError,
    MemoryError,
)
_EPSILON_S = 1e-3
_FIRST_STEP_BACK_S = 2.0
_REORDERED = 32  # more packets than any codec shows out of order
_UNTIMED = frozenset({"mpeg", "mpegvideo"})  # not every frame of a programme stream has a time
_NO_TIMESTAMPS = 0x0080 | 0x0100  # AVFMT_NOTIMESTAMPS, AVFMT_GENERIC_INDEX: bare streams
_NO_PICTURES = Disposition.attached_pic | Disposition.timed_thumbnails


@dataclass(frozen=True)
class Limits:
    """What a video may declare before it is refused.

    Attributes:
        max_pixels: Of a frame as it is shown; an 8K frame has 33 million.
        max_frames: Of a clip in a tar; the videos that clips are cut from may be longer.
    """

    max_pixels: int = 1 << 25
    max_frames: int = 1 << 18

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_frames"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")

    def check_size(self, width: int, height: int) -> None:
        """Refuse a frame's size.

        Raises:
            ValueError: It is too large.
        """
        if width * height > self.max_pixels:
            raise ValueError(
                f"too large: a frame of {width} x {height} pixels, more than max_pixels="
                f"{self.max_pixels} allows"
            )


@dataclass(frozen=True)
class Stamps:
    """When the frames of a video appear.

    Attributes:
        starts_s: Rising, from 0, in seconds.
        duration_s: To the end of the last frame.
    """

    starts_s: NDArray[np.float64]
    duration_s: float


class Video:
    """An open video.

    Args:
        source: The file, or what is in it.
        limits: What it may declare.

    Raises:
        ValueError: It has no pictures, or is larger than allowed.
        av.FFmpegError: It cannot be opened.
    """

    def __init__(self, source: Path | bytes, limits: Limits | None = None) -> None:
        self.source, self.limits = source, limits or Limits()
        self.painter = Painter()
        self._open()
        try:
            self._head, self._origin = self._find_origin()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _open(self) -> None:
        file = io.BytesIO(self.source) if isinstance(self.source, bytes) else str(self.source)
        # also for the look that FFmpeg takes at the first frames while it opens the file
        bound = {"max_pixels": str(self.limits.max_pixels)}
        self._container: Any = av.open(file, options=bound)
        try:
            self.stream = _pictures(self._container)
            codec = self.stream.codec_context
            if codec is None:
                raise ValueError("no decoder for its codec")
            if not codec.width:  # FFmpeg says no more of a size that it was not allowed to open
                raise ValueError(
                    f"too large, or of no size: no frame of at most max_pixels="
                    f"{self.limits.max_pixels} could be opened"
                )
            self.limits.check_size(codec.width, codec.height)
            self.limits.check_size(*shown_size(codec, self.pixel_aspect))
            codec.options = bound
            codec.thread_count = 1  # videos, not threads, are worked on in parallel
        except BaseException:
            self._container.close()
            raise

    @property
    def _can_seek(self) -> bool:
        """Without timestamps of its own, a format tells wrong times after a seek."""
        form = self._container.format
        return form.name not in _UNTIMED and not form.flags & _NO_TIMESTAMPS

    @property
    def pixel_aspect(self) -> Fraction:
        """Width of a pixel / its height."""
        return self.stream.sample_aspect_ratio or Fraction(1)

    @property
    def rate(self) -> Fraction:
        """Frames a second, on average."""
        return self.stream.average_rate or self.stream.guessed_rate or Fraction(30)

    def _find_origin(self) -> tuple[list[Any], int]:
        """Read ahead to the first frames; return the packets so far and the first frame's time."""
        head: list[Any] = []
        times: list[int] = []
        key: int | None = None
        for packet in self._container.demux(self.stream):
            head.append(packet)
            if key is None and packet.is_keyframe:
                key = packet.pts
            # an edit list leaves out what lies before the cut
            if key is not None and packet.pts is not None and not packet.is_discard:
                times += [packet.pts] if packet.pts >= key else []
            if len(times) == _REORDERED:
                break
        if not times:
            raise ValueError("no frames: no key frame with a timestamp")
        return head, min(times)

    def stamps(self) -> Stamps:
        """Read when every frame appears, without decoding them.

        Raises:
            ValueError: There are more frames than allowed.
        """
        return _stamps(self._packets(None), self._origin, self.stream, self.limits)

    def _packets(self, start_s: float | None) -> Iterator[Any]:
        """Read packets, from the start or from a key frame near a time on."""
        if start_s is not None and self._can_seek:
            time = int(Fraction(start_s) / self.stream.time_base) + self._origin
            self._container.seek(time, stream=self.stream)
            self._head = []
        elif not self._head:  # it was left
            self._container.close()
            self._open()
        head, self._head = self._head, []
        yield from head
        if head and not head[-1].size:
            return  # an empty packet is the last: it flushes the decoder
        try:
            yield from self._container.demux(self.stream)
        except IndexError as error:  # PyAV lists the streams once
            raise ValueError("a stream begins in the middle of the file") from error

    def frames(self, start_s: float = 0.0) -> Iterator[tuple[float, VideoFrame]]:
        """Decode (seconds, frame) in order, from the one on the screen at a time or before it."""
        step_s: float = 0.0
        while True:
            begin_s = start_s - step_s
            try:
                found = self._decode(self._packets(begin_s if begin_s > 0 else None))
                first = next(found, None)
            except av.FFmpegError:  # it cannot be sought in
                if begin_s <= 0:
                    raise
                first = None
            if begin_s <= 0 or (first is not None and first[0] <= start_s + _EPSILON_S):
                break
            step_s = max(_FIRST_STEP_BACK_S, 4 * step_s)
        if first is not None:
            yield first
            yield from found

    def _decode(self, packets: Iterable[Any]) -> Iterator[tuple[float, VideoFrame]]:
        base, codec = self.stream.time_base, self.stream.codec_context
        codec.flush_buffers()
        for time, frame in decode_packets(packets):
            yield float((time - self._origin) * base), frame

    def at(self, times_s: Callable[[Stamps], Sequence[float]]) -> list[NDArray[np.uint8]]:
        """Paint the frames at rising times of a short video, jumping from key frame to key frame.

        Args:
            times_s: Called with when the frames appear; chooses the times.

        Raises:
            ValueError: It is unfit, or a frame that its container lists does not come out.
        """
        packets = list(self._packets(None))
        stamps = _stamps(packets, self._origin, self.stream, self.limits)
        keys = [(p.pts, n) for n, p in enumerate(packets) if p.is_keyframe and p.pts is not None]
        units = np.round(stamps.starts_s / float(self.stream.time_base)).astype(np.int64)
        pictures: list[NDArray[np.uint8]] = []
        decoded: Iterator[tuple[int, VideoFrame]] = iter(())
        time, frame, begun = -1, None, -1
        for index in frame_indices(stamps.starts_s, stamps.duration_s, times_s(stamps)):
            wanted = int(units[index]) + self._origin
            _, first = max((key for key in keys if key[0] <= wanted), default=keys[0])
            if first > begun and time != wanted:
                self.stream.codec_context.flush_buffers()
                decoded, begun = decode_packets(packets[first:]), first
            while time < wanted or frame is None:
                time, frame = next(decoded, (wanted + 1, None))
            if frame is None or time != wanted:
                raise ValueError(f"frame {index} of {len(units)} does not come out")
            pictures.append(self.rgb(frame))
        return pictures

    def upright_size(self, frame: VideoFrame) -> tuple[int, int]:
        """Return width and height of a frame as it is shown."""
        width, height = shown_size(frame, self.pixel_aspect)
        self.limits.check_size(width, height)
        return (height, width) if turn(frame)[0] else (width, height)

    def rgb(self, frame: VideoFrame) -> NDArray[np.uint8]:
        """Paint a frame: (H, W, 3) uint8 RGB, upright, in square pixels."""
        self.limits.check_size(*shown_size(frame, self.pixel_aspect))
        return self.painter.rgb(frame, self.pixel_aspect)


def frame_indices(
    starts_s: NDArray[np.floating], duration_s: float, times_s: Sequence[float]
) -> list[int]:
    """Return the frames on the screen at given times, whatever the frame rate does.

        frames shown from    0.0  0.1  0.2  0.3        (8 frames of 0.1 s would be
        times                .05       .25  .35         0.1 0.3 0.5 0.7 for T = 4)
        frames                 0         2    3

    Args:
        starts_s: (n,) when each frame appears.
        duration_s: Length of the clip.
        times_s: Moments.
    """
    # timestamps are rounded to float32 or to the file's clock
    tolerance_s = 1e-3 * duration_s / len(starts_s)
    found = np.searchsorted(np.sort(starts_s), np.array(times_s) + tolerance_s, side="right") - 1
    return np.clip(found, 0, len(starts_s) - 1).tolist()


def _pictures(container: Any) -> Any:
    """Choose the stream of moving pictures; a cover is one of still ones."""
    streams = [s for s in container.streams.video if not s.disposition & _NO_PICTURES]
    if not streams:
        raise ValueError("no video stream")
    best = container.streams.best("video")
    return best if best in streams else streams[0]


def _stamps(packets: Iterable[Any], origin: int, stream: Any, limits: Limits) -> Stamps:
    times, ends = [], []
    for packet in packets:
        if packet.pts is None or packet.is_discard or packet.pts < origin:
            continue
        times.append(packet.pts)
        ends.append(packet.pts + (packet.duration or 0))
        if len(times) > limits.max_frames:
            raise ValueError(f"too long: more than max_frames={limits.max_frames} frames")
    times.sort()
    base = stream.time_base
    if len(times) > 1:
        usual = (times[-1] - times[0]) / Fraction(len(times) - 1)
    else:
        usual = 1 / (stream.average_rate or Fraction(30)) / base
    end = max(*ends, times[-1] + (0 if ends[-1] > times[-1] else usual)) if times else origin
    starts = np.array(times, dtype=np.float64) - origin
    return Stamps(starts * float(base), float((end - origin) * base))


def decode_packets(packets: Iterable[Any]) -> Iterator[tuple[int, VideoFrame]]:
    """Decode from the first key frame on: (timestamp, frame) in the order of the screen.

    Raises:
        ValueError: Frames have no timestamps, or these run backwards.
    """
    begun, key, last, damaged = False, None, None, False
    for packet in packets:
        if not begun and not packet.is_keyframe:
            continue
        if not begun:
            begun, key = True, packet.pts
        for frame in packet.decode():
            if frame.pts is None:
                raise ValueError("its frames have no timestamps")
            if key is not None and frame.pts < key:
                continue  # it leans on frames before the key frame
            if last is not None and frame.pts <= last:
                raise ValueError("its timestamps run backwards")
            last = frame.pts
            # what leans on a damaged picture is damaged without a mark
            damaged = frame.is_corrupt or (damaged and not frame.key_frame)
            if damaged:
                frame.opaque = DAMAGED
            yield frame.pts, frame


def on_screen(
    timed: Iterable[tuple[float, T]], times_s: Iterable[float], hold_s: float
) -> Iterator[T]:
    """Choose the frame on the screen at each of some times; ends where the video does.

    Args:
        timed: (seconds, frame) in order, from the first time or before it on.
        times_s: Rising.
        hold_s: How long the last frame stays at least; it stays as long as the one before it.
    """
    due = iter(times_s)
    time_s = next(due, None)
    shown: T | None = None
    shown_s = step_s = 0.0
    for frame_s, frame in timed:
        while time_s is not None and time_s < frame_s - _EPSILON_S:
            yield frame if shown is None else shown
            time_s = next(due, None)
        if time_s is None:
            return
        step_s = frame_s - shown_s if shown is not None else 0.0
        shown, shown_s = frame, frame_s
    while shown is not None and time_s is not None and time_s < shown_s + max(step_s, hold_s):
        yield shown
        time_s = next(due, None)


def read_frames(
    path: Path, times_s: Sequence[float], limits: Limits | None = None
) -> Iterator[NDArray[np.uint8]]:
    """Decode the frames on the screen at given times.

    Args:
        path: The video.
        times_s: Rising, in seconds from the first frame.
        limits: What the video may declare.

    Yields:
        One (H, W, 3) uint8 RGB frame for each time, upright, in square pixels.

    Raises:
        ValueError: a time lies beyond the video's end, or the video is unfit.
        av.FFmpegError: the video cannot be decoded.
    """
    count = 0
    with Video(path, limits) as video:
        for frame in on_screen(video.frames(times_s[0]), times_s, hold_s=0.5):
            yield video.rgb(frame)
            count += 1
    if count < len(times_s):
        raise ValueError(f"{times_s[count]:.2f} s lies beyond its end")
