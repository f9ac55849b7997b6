"""Videos of every kind that people have, made here: each picture tells its number and its colours.

    +----+----+----+----+----+----+    the central square of a picture, upright
    | 32 | 16 |  8 |  4 |  2 |  1 |    its number, light for 1
    +----+----+----+----+----+----+
    |  green  |   red   |  blue   |
    +---------+---------+---------+
    |    light     |     dark     |
    +--------------+--------------+

Pictures are converted to YUV by the matrices' definitions, not by the library under test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

BITS, LIGHT, DARK = 6, 210, 30
COLOURS = np.array([(40, 180, 40), (180, 50, 60), (50, 60, 190)])
# Kr, Kb and the tag (AVColorSpace) of each matrix
MATRICES = {"601": (0.299, 0.114, 6), "709": (0.2126, 0.0722, 1), "2020": (0.2627, 0.0593, 9)}
MATRICES |= {"untagged 601": (0.299, 0.114, 2), "untagged 709": (0.2126, 0.0722, 2)}


def draw(number: int, width: int, height: int) -> np.ndarray:
    """(H, W, 3) float picture."""
    side, picture = min(width, height), np.full((height, width, 3), 110.0)
    top, left = (height - side) // 2, (width - side) // 2
    x = (np.arange(side) + 0.5) / side
    bits = [LIGHT if number >> (BITS - 1 - b) & 1 else DARK for b in range(BITS)]
    square = np.empty((side, side, 3))
    square[: side // 3] = np.array(bits)[(x * BITS).astype(int)][None, :, None]
    square[side // 3 : 2 * side // 3] = COLOURS[(x * 3).astype(int)][None]
    square[2 * side // 3 :] = np.where(x < 0.5, LIGHT, DARK)[None, :, None]
    picture[top : top + side, left : left + side] = square
    return picture


def read(picture: np.ndarray, grey: bool = False) -> tuple[int, float]:
    """Return a picture's number and its worst colour error."""
    height, width = picture.shape[:2]
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    square = picture[top : top + side, left : left + side].astype(float)

    def at(x: float, y: float) -> np.ndarray:
        r = max(1, side // 32)
        row, column = round(y * side), round(x * side)
        return square[row - r : row + r, column - r : column + r].mean((0, 1))

    bits = [at((b + 0.5) / BITS, 1 / 6).mean() > (LIGHT + DARK) / 2 for b in range(BITS)]
    number = sum(int(bit) << (BITS - 1 - b) for b, bit in enumerate(bits))
    found = np.array([at((c + 0.5) / 3, 0.5) for c in range(3)])
    true = COLOURS @ np.array([[0.299], [0.587], [0.114]]) if grey else COLOURS
    return number, float(np.abs(found - true).max())


@dataclass
class Kind:
    """One kind of video.

    Attributes:
        name: What the table calls it.
        suffix: Of the file.
        codec: Encoder.
        form: Pixel format.
        size: Stored width and height.
        matrix: Of `MATRICES`.
        full: Full range.
        options: The encoder's.
        times: When each frame appears, seconds; every 0.1 s by default.
        count: Frames.
        change: Called with the encoder's stream before it opens.
        draw: Draws a picture as it is stored, for turned ones.
        after: Called with the written file; changes it and returns (first number, times).
        refused: Words of the reason with which it may be refused on every path.
        indexed: Words with which the index may refuse it, while files are right.
    """

    name: str
    suffix: str = ".mp4"
    codec: str = "libx264"
    form: str = "yuv420p"
    size: tuple[int, int] = (128, 96)
    matrix: str = "709"
    full: bool = False
    options: dict[str, str] = field(default_factory=dict)
    times: Sequence[float] | None = None
    count: int = 30
    change: Callable[[Any], None] = lambda stream: None
    draw: Callable[[int, int, int], np.ndarray] = draw
    after: Callable[[Path], Any] | None = None
    refused: str | None = None
    trc: int | None = None

    def write(self, folder: Path) -> Made:
        """Make it."""
        path = folder / (
            self.name.replace(" ", "-").replace(",", "").replace("/", "-") + self.suffix
        )
        times = list(self.times or [k / 10 for k in range(self.count)])
        container: Any = av.open(str(path), "w")
        with container:
            stream = container.add_stream(self.codec, rate=10, options=self.options)
            stream.width, stream.height, stream.pix_fmt = *self.size, self.form
            codec = stream.codec_context
            codec.thread_count = 1
            codec.time_base = Fraction(1, 1000) if self.times else Fraction(1, 10)
            if self.form.startswith(("yuv", "gray")):
                tag = MATRICES[self.matrix][2]
                codec.colorspace, codec.color_range = tag, 2 if self.full else 0 if tag == 2 else 1
            if self.trc is not None:
                codec.color_trc = self.trc
            self.change(stream)
            for number, time in enumerate(times):
                frame = self._frame(number)
                frame.pts, frame.time_base = round(time / codec.time_base), codec.time_base
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        made = Made(self, path, list(range(len(times))), times)
        if self.after is not None:
            made = replace(made, **(self.after(path) or {}))
        return made

    def _frame(self, number: int) -> Any:
        frame = av.VideoFrame(*self.size, self.form)
        if max(self.size) > 8000:  # nobody will see it
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            return frame
        rgb = self.draw(number, *self.size)
        if self.form in ("rgb24", "argb", "rgb8"):
            picture = rgb.round().astype(np.uint8)
            if self.form == "argb":
                alpha = np.full((*rgb.shape[:2], 1), 120, np.uint8)
                return av.VideoFrame.from_ndarray(np.concatenate([alpha, picture], -1), "argb")
            return av.VideoFrame.from_ndarray(picture, "rgb24").reformat(format=self.form)
        kr, kb, tag = MATRICES[self.matrix]
        bits = 10 if "10" in self.form else 8
        red, green, blue = np.moveaxis(rgb / 255, -1, 0)
        luma = kr * red + (1 - kr - kb) * green + kb * blue
        chroma = [(blue - luma) / (2 - 2 * kb), (red - luma) / (2 - 2 * kr)]
        step = 1 << (bits - 8)
        low, high, wide = (0, 255, 255) if self.full else (16, 219, 224)
        planes = [(luma * high + low) * step]
        if not self.form.startswith("gray"):
            planes += [(_halved(c, self.form) * wide + 128) * step for c in chroma]
        if self.form.startswith("yuva"):
            planes.append(np.full_like(luma, 120))
        for plane, values in zip(frame.planes, planes, strict=True):
            kind = np.uint16 if bits > 8 else np.uint8
            lines = np.zeros((plane.height, plane.line_size // kind().itemsize), kind)
            lines[:, : values.shape[1]] = values.round().clip(0, 256 * step - 1)
            plane.update(lines.tobytes())
        frame.colorspace, frame.color_range = tag, 2 if self.full else 0 if tag == 2 else 1
        return frame


@dataclass(frozen=True)
class Made:
    """A written video: which picture appears when."""

    kind: Kind
    path: Path
    numbers: list[int]
    times: list[float]

    @property
    def grey(self) -> bool:
        return self.kind.form.startswith("gray")

    @property
    def duration_s(self) -> float:
        return self.times[-1] + (self.times[-1] - self.times[-2] if len(self.times) > 1 else 0.1)

    def at(self, time_s: float) -> int:
        """The number of the picture on the screen."""
        place = int(np.searchsorted(np.array(self.times) - 1e-4, time_s, side="right")) - 1
        return self.numbers[min(max(place, 0), len(self.numbers) - 1)]


def _halved(values: np.ndarray, form: str) -> np.ndarray:
    if "420" not in form:
        return values
    height, width = (side + side % 2 for side in values.shape)
    even = np.pad(
        values, ((0, height - values.shape[0]), (0, width - values.shape[1])), mode="edge"
    )
    return even.reshape(height // 2, 2, width // 2, 2).mean((1, 3))


def turned(quarters: int, mirrored: bool = False) -> Callable[[int, int, int], np.ndarray]:
    """Draw as a camera stores that is held so that players turn `quarters` to the left."""

    def lying(number: int, width: int, height: int) -> np.ndarray:
        size = (height, width) if quarters % 2 else (width, height)
        picture = draw(number, *size)
        return np.rot90(picture[:, ::-1] if mirrored else picture, -quarters)

    return lying


def remuxed(
    path: Path,
    select: Callable[[list[Any]], Iterable[Any]],
    suffix: str | None = None,
    **options: str,
) -> None:
    """Copy the packets that `select` returns, without encoding, in place."""
    with av.open(str(path)) as source:
        stream = source.streams.video[0]
        packets = [p for p in source.demux(stream) if p.size]
        target = path.with_name("copy" + (suffix or path.suffix))
        output: Any = av.open(str(target), "w", options=options)
        with output:
            copy = output.add_stream_from_template(stream)
            for packet in select(packets):
                packet.stream = copy
                output.mux(packet)
    target.rename(path)


def cut(path: Path, first: int, suffix: str | None = None) -> dict[str, Any]:
    """Cut as `ffmpeg -ss ... -c copy` does: from the key frame before, which an edit list hides."""

    def shifted(packets: list[Any]) -> Iterable[Any]:
        base = packets[0].time_base
        zero = round(Fraction(first, 10) / base) + min(p.pts for p in packets)
        keys = [n for n, p in enumerate(packets) if p.is_keyframe and p.pts <= zero]
        for packet in packets[keys[-1] :]:
            packet.pts, packet.dts = packet.pts - zero, packet.dts - zero
            yield packet

    remuxed(path, shifted, suffix)
    count = 30 - first
    return {"numbers": [first + k for k in range(count)], "times": [k / 10 for k in range(count)]}


def delayed(path: Path, seconds: float) -> None:
    """Let the first frame appear later, or before 0."""

    def later(packets: list[Any]) -> Iterable[Any]:
        for packet in packets:
            shift = round(Fraction(seconds) / packet.time_base)
            packet.pts += shift
            if packet.dts is not None:
                packet.dts += shift
            yield packet

    remuxed(path, later, avoid_negative_ts="disabled")


def with_cover_or_sound(path: Path, cover: bool = False, sound_s: float = 0.0) -> None:
    """Add a picture of another size in front of the video, or sound."""
    with av.open(str(path)) as source:
        stream = source.streams.video[0]
        target = path.with_name("more" + path.suffix)
        output: Any = av.open(str(target), "w")
        with output:
            if cover:
                art = output.add_stream("mjpeg", rate=10)
                art.width, art.height, art.pix_fmt = 200, 200, "yuvj420p"
                art.disposition = av.stream.Disposition.attached_pic
            copy = output.add_stream_from_template(stream)
            if cover:
                black = np.zeros((200, 200, 3), np.uint8)
                output.mux(art.encode(av.VideoFrame.from_ndarray(black, format="rgb24")))
                output.mux(art.encode())
            sound = output.add_stream("aac", rate=16000) if sound_s else None
            for packet in source.demux(stream):
                if packet.size:
                    packet.stream = copy
                    output.mux(packet)
            if sound is not None:
                for k in range(int(sound_s * 16000) // 1024):
                    silence = av.AudioFrame.from_ndarray(
                        np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
                    )
                    silence.sample_rate, silence.pts = 16000, 1024 * k
                    output.mux(sound.encode(silence))
                output.mux(sound.encode())
    target.rename(path)


def aspect(ratio: Fraction) -> Callable[[Any], None]:
    def change(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = ratio
        stream.sample_aspect_ratio = ratio

    return change


def squeezed(ratio: Fraction) -> Callable[[int, int, int], np.ndarray]:
    """Draw in square pixels, then squeeze into the stored size."""

    def narrow(number: int, width: int, height: int) -> np.ndarray:
        wide = draw(number, round(width * ratio * 8), height * 8)
        rows = (np.arange(height) * 8 + 4).astype(int)
        columns = ((np.arange(width) + 0.5) * float(ratio) * 8).astype(int)
        return wide[rows][:, columns]

    return narrow


def rotate(degrees: int, mirrored: bool = False) -> Callable[[Any], None]:
    return lambda stream: stream.set_display_rotation(degrees, hflip=mirrored)
