"""Is a clip decoded to the frames that play? Asked once, when somebody else's tars are indexed.

A cut made by copying may hide frames behind an edit list, begin on a frame that leans on others,
or count frames that never come out: a decoder that jumps into it may then show other frames than a
player does, or loop for ever. So the clip is decoded once in order, and a few times as training
does it, and the pictures are compared.
"""

from __future__ import annotations

import random

import numpy as np
from numpy.typing import NDArray

from datamodules.video.decode import DamagedSample, Decoder, decode_frames, segment_times
from datamodules.video.frames import UNREADABLE, Limits, Video, frame_indices

# (T, seed of the jitter): few frames of many, as in pretraining, and many
_DRAWS = ((4, None), (4, 1), (4, 2), (16, 3))
# Two versions of swscale differ by a level at some pixels; another frame differs by more.
_TOLERANCE = 1.5


def check_clip(data: bytes, decoder: Decoder, limits: Limits) -> None:
    """Compare the frames that training would see with those that play.

    Call it in a child process: decoders crash and hang on some clips.

    Args:
        data: The file.
        decoder: The one that training will use.
        limits: What it may declare.

    Raises:
        DamagedSample: They differ, or the clip cannot be decoded.
    """
    try:
        duration_s, starts_s, pictures = _play(data, limits)
    except UNREADABLE as error:
        raise DamagedSample(f"undecodable: {error}") from error
    for num_frames, seed in _DRAWS:
        found = decode_frames(data, num_frames, _generator(seed), decoder, limits)
        times_s = segment_times(duration_s, num_frames, _generator(seed))
        indices = frame_indices(starts_s, duration_s, times_s)
        for time_s, index, picture in zip(times_s, indices, found, strict=True):
            _compare(picture, pictures[index], f"{decoder}, {num_frames} frames", time_s)


def _generator(seed: int | None) -> random.Random | None:
    return None if seed is None else random.Random(seed)


def _play(
    data: bytes, limits: Limits
) -> tuple[float, NDArray[np.float64], dict[int, NDArray[np.uint8]]]:
    """Decode in order; keep the pictures that `_DRAWS` ask for."""
    with Video(data, limits) as video:
        stamps = video.stamps()
        kept = {
            index
            for num_frames, seed in _DRAWS
            for index in frame_indices(
                stamps.starts_s,
                stamps.duration_s,
                segment_times(stamps.duration_s, num_frames, _generator(seed)),
            )
        }
        pictures, count = {}, 0
        for count, (_, frame) in enumerate(video.frames(), start=1):
            if count - 1 in kept:
                pictures[count - 1] = video.rgb(frame)
    if count != len(stamps.starts_s):
        raise ValueError(f"{count} frames come out of {len(stamps.starts_s)}")
    return stamps.duration_s, stamps.starts_s, pictures


def _compare(found: NDArray[np.uint8], right: NDArray[np.uint8], how: str, time_s: float) -> None:
    if found.shape != right.shape:
        sizes = [f"{picture.shape[1]} x {picture.shape[0]}" for picture in (found, right)]
        raise DamagedSample(f"shape: by {how} it is {sizes[0]}, and it plays as {sizes[1]}")
    difference = float(np.abs(found.astype(np.int16) - right).mean())
    if difference > _TOLERANCE:
        raise DamagedSample(
            f"frames: by {how} the picture at {time_s:.2f} s is not the one that plays (they "
            f"differ by {difference:.0f} levels on average); store it anew with --reencode"
        )
