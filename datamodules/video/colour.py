"""Pictures in their own colour space to RGB, upright in square pixels, and RGB to the stored form.

Matrix and range are undone as the file's tags say. Primaries and transfer curve are left as they
are, as in every decoder this one is compared with: the RGB values of a BT.2020 (SDR) video are
those of its own primaries. HDR (PQ, HLG) has no such reading and is refused.

Stored clips are BT.601, limited range, and tagged so: a decoder that heeds tags and one that knows
BT.601 alone give the same picture.
"""

from __future__ import annotations

import struct
from fractions import Fraction
from typing import Any

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from numpy.typing import NDArray

# AVColorSpace -> swscale's matrices; the tag 0 is RGB, which has none
_MATRICES = {
    0: None,
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,  # 625 lines and 525 lines: one matrix
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
}
_UNSPECIFIED = 2
_STORED = {"dst_colorspace": Colorspace.ITU601, "dst_color_range": ColorRange.MPEG}
# Converted as decord does, to whose pictures the flags below would give other edges; 3 levels off.
_PLAIN = frozenset({"yuv420p", "yuvj420p"})
_HDR = {16: "PQ (SMPTE ST 2084)", 18: "HLG (ARIB STD-B67)"}
_HD_WIDTH, _SD_HEIGHT = 1280, 576
# Without these flags swscale is up to 4 levels off, and more after two conversions.
_EXACT = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
DAMAGED = "damaged"  # the mark of a picture that lacks a part of its data
# dihedral pictures: (transposed, left and right swapped, top and bottom swapped)
Turn = tuple[bool, bool, bool]


def matrix(frame: VideoFrame) -> Colorspace | None:
    """Return the matrix of a picture; untagged ones are BT.709 from HD on, else BT.601.

    Raises:
        ValueError: It is none that can be undone here.
    """
    if frame.color_trc in _HDR:
        raise ValueError(
            f"HDR: its transfer curve is {_HDR[frame.color_trc]}; map it to SDR first (FFmpeg's "
            "filters zscale and tonemap)"
        )
    if frame.colorspace == _UNSPECIFIED:
        hd = frame.width >= _HD_WIDTH or frame.height > _SD_HEIGHT
        return Colorspace.ITU709 if hd else Colorspace.ITU601
    if frame.colorspace not in _MATRICES:
        raise ValueError(f"colour matrix {frame.colorspace} (AVColorSpace) is not supported")
    return _MATRICES[frame.colorspace]


def turn(frame: VideoFrame) -> Turn:
    """Read the display matrix: telephones store upright videos lying down, or mirrored.

    Raises:
        ValueError: It is no multiple of a quarter turn.
    """
    side_data: Any = frame.side_data.get("DISPLAYMATRIX")
    if side_data is None:
        return False, False, False
    # a point (x, y) is shown at (a x + c y, b x + d y)
    a, b, _, c, d = struct.unpack("=5i", bytes(side_data)[:20])
    if b == c == 0 and a and d:
        return False, a < 0, d < 0
    if a == d == 0 and b and c:
        return True, c < 0, b < 0
    raise ValueError("it is turned by an angle that is no multiple of 90 degrees")


def shown_size(frame: VideoFrame, pixel_aspect: Fraction) -> tuple[int, int]:
    """Return width and height in square pixels, before any turn: nothing is made smaller."""
    width, height = Fraction(frame.width), Fraction(frame.height)
    if pixel_aspect > 1:
        width *= pixel_aspect
    else:
        height /= pixel_aspect
    return max(1, round(width)), max(1, round(height))


def tag_stored(codec: Any) -> None:
    """Tag an encoder's stream with the stored form's matrix and range; the rest is the source's."""
    codec.colorspace, codec.color_range = 6, ColorRange.MPEG  # SMPTE 170M: BT.601's matrix


class Painter:
    """Converts the pictures of one video; keeps swscale's tables between them."""

    def __init__(self) -> None:
        self._to_rgb, self._to_stored = VideoReformatter(), VideoReformatter()

    def rgb(self, frame: VideoFrame, pixel_aspect: Fraction = Fraction(1)) -> NDArray[np.uint8]:
        """Return (H, W, 3) uint8, upright, in square pixels.

        Raises:
            ValueError: The picture's colours or its angle are not supported.
        """
        size, how = shown_size(frame, pixel_aspect), Interpolation.BILINEAR
        if frame.format.name not in _PLAIN or size != (frame.width, frame.height):
            how |= _EXACT
        small = self._converted(frame, size, "rgb24", how)
        return np.ascontiguousarray(_turned(small.to_ndarray(), turn(frame)))

    def stored(self, frame: VideoFrame, width: int, height: int) -> VideoFrame:
        """Return a picture of the stored form: `width` x `height` are those it is shown with.

        Raises:
            ValueError: The picture's colours or its angle are not supported.
        """
        how = turn(frame)
        size = (height, width) if how[0] else (width, height)
        # ten bits: a second rounding of eight would show
        small = self._converted(frame, size, "gbrp10le", Interpolation.BICUBIC | _EXACT)
        if any(how):
            picture = np.ascontiguousarray(_turned(small.to_ndarray(), how))
            small = VideoFrame.from_ndarray(picture, format="gbrp10le")
        return self._to_stored.reformat(
            small,
            format="yuv420p",
            interpolation=Interpolation.BILINEAR | _EXACT,
            threads=1,
            **_STORED,
        )

    def _converted(
        self, frame: VideoFrame, size: tuple[int, int], form: str, how: Interpolation
    ) -> VideoFrame:
        if frame.opaque == DAMAGED:
            raise ValueError("damaged: a part of its data is missing or wrong")
        space, full = matrix(frame), frame.color_range == ColorRange.JPEG
        if frame.format.name.startswith("gray") and not full:
            frame = _stretched(frame)
            full = True
        return self._to_rgb.reformat(
            frame,
            *size,
            format=form,
            src_colorspace=space,
            src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            interpolation=how,
            threads=1,
        )


def _turned(picture: NDArray[Any], how: Turn) -> NDArray[Any]:
    transposed, mirrored, upside_down = how
    if transposed:
        picture = picture.transpose(1, 0, 2)
    if mirrored:
        picture = picture[:, ::-1]
    return picture[::-1] if upside_down else picture


def _stretched(frame: VideoFrame) -> VideoFrame:
    """Bring a grey picture of limited range, which swscale does not know, to the full range."""
    if frame.format.name not in ("gray", "gray10le", "gray12le"):
        raise ValueError(f"pixel format {frame.format.name} of limited range is not supported")
    bits = frame.format.components[0].bits
    step = 1 << (bits - 8)
    values = (frame.to_ndarray().astype(np.float32) - 16 * step) * (
        ((1 << bits) - 1) / (219 * step)
    )
    grey = np.clip(values.round(), 0, (1 << bits) - 1)
    return VideoFrame.from_ndarray(
        grey.astype(np.uint8 if bits == 8 else np.uint16), format=frame.format.name
    )
