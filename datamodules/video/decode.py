"""From the bytes of a stored clip to a few frames, by whichever decoder serves.

decord is the fastest where it is installed, and right on clips that `shards build` made. It knows
nothing of edit lists, pixel aspect and display matrices, and loops for ever on some copied cuts, so
that other people's clips are decoded by PyAV unless the index was made with another decoder.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import io
import logging
import random
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from datamodules.video.frames import UNREADABLE, Limits, Stamps, Video, frame_indices

Decoder = Literal["auto", "decord", "torchcodec", "torchcodec-cuda", "pyav"]
DECODERS: tuple[Decoder, ...] = ("auto", "decord", "torchcodec", "torchcodec-cuda", "pyav")

logger = logging.getLogger(__name__)


class DamagedSample(Exception):
    """A sample that cannot be used; the message says why."""


def segment_times(
    duration_s: float, num_frames: int, generator: random.Random | None
) -> list[float]:
    """Choose one moment from each of `num_frames` equal segments of a clip.

    Args:
        duration_s: Length of the clip.
        num_frames: T.
        generator: Jitters uniformly within each segment (training); None takes the centres.
    """
    width_s = duration_s / num_frames
    return [
        (segment + (0.5 if generator is None else generator.random())) * width_s
        for segment in range(num_frames)
    ]


def decode_frames(
    data: bytes,
    num_frames: int,
    generator: random.Random | None = None,
    decoder: Decoder = "auto",
    limits: Limits | None = None,
) -> NDArray[np.uint8]:
    """Decode T frames of a clip held in memory, one from each of T equal segments.

    The caller has compared the checksum: damaged bytes can crash the decoder or give wrong frames
    without a word. A clip with fewer frames than wanted repeats some.

    Args:
        data: The file.
        num_frames: T.
        generator: Jitters the moments within the segments; None takes the centres.
        decoder: Which library decodes.
        limits: What the clip may declare.

    Returns:
        (T, H, W, 3) uint8, RGB.

    Raises:
        DamagedSample: The bytes cannot be decoded.
    """
    draw = functools.partial(segment_times, num_frames=num_frames, generator=generator)
    return _BACK_ENDS[stored_decoder(decoder)](data, draw, limits or Limits())


def _decode_decord(data: bytes, draw: Any, limits: Limits) -> NDArray[np.uint8]:
    import decord

    # decord raises RuntimeError for what it cannot open, and DECORDError, which is no RuntimeError,
    # for what it cannot decode
    try:
        reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
        if len(reader) == 0:
            raise DamagedSample("undecodable: no frames")
        stamps = reader.get_frame_timestamp(np.arange(len(reader)))
        duration_s = float(stamps[:, 1].max())
        return reader.get_batch(frame_indices(stamps[:, 0], duration_s, draw(duration_s))).asnumpy()
    except (RuntimeError, decord.DECORDError, IndexError) as error:
        raise DamagedSample(f"undecodable: {_last_line(error)}") from error


def _decode_torchcodec(
    data: bytes, draw: Any, limits: Limits, device: str = "cpu"
) -> NDArray[np.uint8]:
    from torchcodec.decoders import VideoDecoder  # optional: needs FFmpeg's shared libraries

    try:
        reader = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, device=device)
        metadata = reader.metadata
        start_s, end_s = metadata.begin_stream_seconds, metadata.end_stream_seconds
        tolerance_s = 1e-3 / (metadata.average_fps or 30)
        last_s = end_s - tolerance_s
        moments = [min(start_s + time_s + tolerance_s, last_s) for time_s in draw(end_s - start_s)]
        return reader.get_frames_played_at(moments).data.cpu().numpy()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise DamagedSample(f"undecodable: {_last_line(error)}") from error


def _decode_pyav(data: bytes, draw: Any, limits: Limits) -> NDArray[np.uint8]:
    def times_s(stamps: Stamps) -> list[float]:
        return draw(stamps.duration_s)

    try:
        with Video(data, limits) as video:
            return np.stack(video.at(times_s))
    except UNREADABLE as error:
        raise DamagedSample(f"undecodable: {_last_line(error)}") from error


_BACK_ENDS: dict[str, Callable[[bytes, Any, Limits], NDArray[np.uint8]]] = {
    "decord": _decode_decord,
    "torchcodec": _decode_torchcodec,
    "torchcodec-cuda": functools.partial(_decode_torchcodec, device="cuda"),  # NVDEC
    "pyav": _decode_pyav,
}
_INSTALL = {
    "decord": "install `decord` 0.6.0 (x86-64 only), or use 'auto' or 'pyav'",
    "torchcodec": "install `eva02-at[torchcodec]` and FFmpeg's shared libraries, or use 'auto'",
    "torchcodec-cuda": "install torchcodec's CUDA build (pytorch.org's index) and FFmpeg's shared "
    "libraries, or use 'auto'",
}


def check_decoder(decoder: Decoder) -> None:
    """Refuse a decoder that cannot be used here.

    Raises:
        ValueError: With the reason and what to install.
    """
    if decoder not in DECODERS:
        raise ValueError(f"decoder {decoder!r} is unknown; one of {', '.join(DECODERS)}")
    if decoder in _INSTALL and (problem := _problem(decoder)) is not None:
        raise ValueError(f"decoder {decoder!r} cannot be used: {problem}; {_INSTALL[decoder]}")


@functools.cache
def stored_decoder(decoder: Decoder) -> Decoder:
    """Say which decoder serves clips that `shards build` made: the fastest there is, for `auto`."""
    if decoder != "auto":
        return decoder
    for name in ("decord", "torchcodec"):
        if _problem(name) is None:
            return name
    logger.warning("neither decord nor torchcodec can be used; clips are decoded by PyAV")
    return "pyav"


def decoder_of(decoder: Decoder, options: Mapping[str, Any]) -> Decoder:
    """Say which decoder serves a manifest's clips.

    Args:
        decoder: What the user wants.
        options: The manifest's; tars that were indexed as they lay were checked with one decoder.

    Raises:
        ValueError: They were checked with another one.
    """
    if not options.get("index_only"):
        return stored_decoder(decoder)
    checked = options.get("decoder", "pyav" if decoder == "auto" else decoder)
    if decoder not in ("auto", checked):
        raise ValueError(
            f"decoder is {decoder!r}, but these tars were checked with {checked!r}; use 'auto', or "
            f"check them again: `eva02-at shards build --index-only --decoder {decoder}`"
        )
    return checked


def _problem(decoder: str) -> str | None:
    try:
        module = importlib.import_module(
            "torchcodec.decoders" if decoder.startswith("torchcodec") else decoder
        )
    except (ImportError, RuntimeError, OSError) as error:
        return str(error).splitlines()[0]
    version = getattr(module, "__version__", "0")
    if decoder == "decord" and not version.startswith("0."):
        # decord2 shares the name; 3.4.0 raises on clips 48, 96 or 144 wide, among other widths
        return f"decord2 {version} is installed in its place, which fails on some widths"
    return None


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else repr(error)
