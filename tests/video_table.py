"""Every kind of video through every path: the table of docs/data.md.

.venv/bin/python tests/video_table.py
"""

from __future__ import annotations

import io
import re
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from videos_of_every_kind import (
    Kind,
    Made,
    aspect,
    cut,
    delayed,
    read,
    remuxed,
    rotate,
    squeezed,
    turned,
    with_cover_or_sound,
)

from datamodules.shards import EncodeOptions, index_tars
from datamodules.stream.clips import ClipOptions, EvalClips
from datamodules.stream.faults import FaultMonitor
from datamodules.stream.reader import Corpus, SampleReader
from datamodules.video.decode import DECODERS, Decoder, check_decoder, decode_frames
from datamodules.video.encode import encode_clip
from datamodules.video.frames import read_frames
from datamodules.video.pieces import Piece, RejectedClip
from datamodules.video.windows import (
    Unreadable,
    Window,
    probe_videos,
    read_windows,
    sliding_windows,
)

MATCHED = {"crf": "12", "preset": "veryfast", "g": "10"}
# a fine quantiser: what is measured is the conversion
OPTIONS = EncodeOptions(short_side=96, fps=10, crf=14)
UNEVEN = [0.0, 0.1, 0.2, 0.9, 1.0, 1.05, 1.1, 2.0, 2.5, 2.6, 2.7, 2.8]


def _x265(text: str) -> dict[str, str]:
    return {"crf": "12", "preset": "ultrafast", "x265-params": f"log-level=none:{text}"}


def _colours() -> list[Kind]:
    kinds = []
    for matrix in ("601", "709", "2020"):
        for full in (False, True):
            for bits in (8, 10):
                name = f"BT.{matrix}, {'full' if full else 'limited'} range, {bits} bit"
                codec = ("libx264", "yuv420p", MATCHED) if bits == 8 else (
                    "libx265", "yuv420p10le", _x265("keyint=10")
                )  # fmt: skip
                kinds.append(
                    Kind(name, ".mp4", *codec[:2], matrix=matrix, full=full, options=codec[2])
                )
    return kinds


KINDS = [
    *_colours(),
    Kind("no tags, SD", matrix="untagged 601", options=MATCHED),
    Kind("no tags, HD", size=(1280, 720), matrix="untagged 709", options=MATCHED, count=12),
    *(
        Kind(f"turned by {90 * q}", change=rotate(90 * q), draw=turned(q), options=MATCHED)
        for q in (1, 2, 3)
    ),
    Kind("mirrored", change=rotate(0, True), draw=turned(0, True), options=MATCHED),
    Kind("turned and mirrored", change=rotate(90, True), draw=turned(1, True), options=MATCHED),
    Kind("turned by 30", change=rotate(30), options=MATCHED, refused="multiple of 90"),
    Kind("MPEG-TS, H.264", ".ts", options=MATCHED | {"g": "12"}),
    Kind("MPEG-TS, MPEG-2", ".ts", "mpeg2video", options={"qscale": "2", "g": "12", "bf": "2"}),
    Kind(
        "MPEG-PS", ".mpg", "mpeg2video", options={"qscale": "2", "g": "12", "bf": "2"}, matrix="601"
    ),
    Kind("Matroska", ".mkv", options=MATCHED),
    Kind(
        "WebM, VP9",
        ".webm",
        "libvpx-vp9",
        options={"crf": "10", "b": "0", "cpu-used": "8", "g": "10"},
    ),
    Kind(
        "WebM, VP9, alpha",
        ".webm",
        "libvpx-vp9",
        "yuva420p",
        options={"crf": "10", "b": "0", "cpu-used": "8", "auto-alt-ref": "0"},
    ),
    Kind("MP4, AV1", ".mp4", "libsvtav1", options={"crf": "12", "preset": "10", "g": "10"}),
    Kind(
        "AVI, MPEG-4, B-frames",
        ".avi",
        "mpeg4",
        options={"qmin": "1", "qmax": "1", "bf": "2", "g": "12"},
        matrix="601",
    ),
    Kind("AVI, H.264, B-frames", ".avi", options=MATCHED | {"bf": "3"}, refused="run backwards"),
    Kind("AVI, H.264", ".avi", options=MATCHED | {"bf": "0"}),
    Kind("one key frame in all", options={"crf": "12", "g": "250", "bf": "3"}),
    Kind(
        "H.265, open GOP",
        ".mp4",
        "libx265",
        options=_x265("keyint=8:min-keyint=8:open-gop=1:bframes=3"),
    ),
    Kind(
        "H.264, open GOP",
        options={"crf": "12", "x264-params": "open-gop=1:keyint=8:min-keyint=8:bframes=3"},
    ),
    Kind(
        "copied cut, edit list",
        options={"crf": "12", "g": "250", "bf": "0"},
        after=lambda p: cut(p, 13),
    ),
    Kind(
        "copied cut, edit list, B-frames",
        options={"crf": "12", "g": "250", "bf": "3"},
        after=lambda p: cut(p, 13),
    ),
    Kind(
        "copied cut, H.265, open GOP",
        ".mp4",
        "libx265",
        options=_x265("keyint=8:min-keyint=8:open-gop=1:bframes=3"),
        after=lambda p: cut(p, 13),
    ),
    Kind("uneven frame times", ".mkv", options=MATCHED, times=UNEVEN),
    Kind("uneven frame times, MP4", ".mp4", options=MATCHED | {"bf": "0"}, times=UNEVEN),
    Kind("first frame at 5 s", ".mkv", options=MATCHED, after=lambda p: delayed(p, 5)),
    Kind(
        "negative offsets",
        options=MATCHED | {"bf": "3"},
        after=lambda p: remuxed(p, list, movflags="negative_cts_offsets", use_editlist="0"),
    ),
    Kind("interlaced", options=MATCHED | {"flags": "+ildct+ilme"}),
    Kind(
        "pixels 4:3",
        size=(96, 96),
        change=aspect(Fraction(4, 3)),
        draw=squeezed(Fraction(4, 3)),
        options=MATCHED,
    ),
    Kind(
        "pixels 3:4",
        size=(128, 72),
        change=aspect(Fraction(3, 4)),
        draw=squeezed(Fraction(3, 4)),
        options=MATCHED,
    ),
    Kind("odd size", ".mkv", "ffv1", "yuv420p", size=(131, 97)),
    Kind("odd size, H.264", form="yuv444p", size=(131, 97), options=MATCHED),
    Kind("alpha", ".mov", "qtrle", "argb"),
    Kind("RGB", ".mov", "qtrle", "rgb24"),
    Kind("grey, limited range", ".mp4", "libx264", "gray", options=MATCHED, matrix="601"),
    Kind("grey, H.265", ".mp4", "libx265", "gray", options=_x265("keyint=10"), matrix="601"),
    Kind("grey, FFV1, full range", ".mkv", "ffv1", "gray", matrix="601", full=True),
    Kind("grey, full range", ".mp4", "libx264", "gray", options=MATCHED, matrix="601", full=True),
    Kind(
        "HDR, PQ",
        ".mp4",
        "libx265",
        "yuv420p10le",
        matrix="2020",
        trc=16,
        options=_x265("keyint=10"),
        refused="HDR.*PQ",
    ),
    Kind(
        "HDR, HLG",
        ".mp4",
        "libx265",
        "yuv420p10le",
        matrix="2020",
        trc=18,
        options=_x265("keyint=10"),
        refused="HDR.*HLG",
    ),
    Kind("one frame", options=MATCHED, count=1),
    Kind("two frames", options=MATCHED, count=2),
    Kind(
        "cover picture first", options=MATCHED, after=lambda p: with_cover_or_sound(p, cover=True)
    ),
    Kind(
        "sound longer than video",
        options=MATCHED,
        after=lambda p: with_cover_or_sound(p, sound_s=6),
    ),
    Kind("GIF", ".gif", "gif", "rgb8"),
    Kind(
        "16384 x 8192",
        ".mov",
        "mjpeg",
        "yuvj420p",
        (16384, 8192),
        count=1,
        refused="too large",
    ),
]


@dataclass(frozen=True)
class Result:
    """What a path made of a video.

    Attributes:
        reason: Why it was refused; "" if it was not.
        frame_error: Pictures between the right one and the one that came, at worst.
        colour_error: Levels of 256, at worst.
    """

    reason: str = ""
    frame_error: int = 0
    colour_error: float = 0.0

    def __str__(self) -> str:
        if self.reason:
            return "refused"
        return f"{self.frame_error} / {self.colour_error:.1f}"

    def wrong(self, made: Made) -> bool:
        """Neither right nor refused with a reason that the kind allows."""
        if self.reason:
            allowed = made.kind.refused or made.kind.indexed
            return allowed is None or re.search(allowed, self.reason) is None
        palette = 5 if made.kind.form == "rgb8" else 3  # 256 colours in all
        return self.frame_error > 0 or self.colour_error > palette


def _compared(made: Made, pairs: Iterable[tuple[int, np.ndarray]]) -> Result:
    errors = [(abs(n - want), c) for want, p in pairs for n, c in [read(p, made.grey)]]
    assert errors
    return Result("", max(e for e, _ in errors), max(c for _, c in errors))


def built(made: Made) -> Result:
    """`shards build`, then every decoder that training may use."""
    length = made.duration_s
    pairs: list[tuple[int, np.ndarray]] = []
    for start_s, end_s in ((0.0, length), (0.37 * length, 0.37 * length + min(1.0, 0.6 * length))):
        try:
            source = Piece(made.path, 0.0)
            clip = encode_clip([source], start_s, end_s, OPTIONS)
        except RejectedClip as error:
            return Result(str(error))
        for decoder in usable_decoders():
            frames = decode_frames(clip.data, 4, None, decoder)
            for k, frame in enumerate(frames):
                shown = int((k + 0.5) / 4 * clip.num_frames)
                pairs.append((made.at(start_s + shown / clip.fps), frame))
    return _compared(made, pairs)


def usable_decoders() -> list[Decoder]:
    """Those that are installed here."""

    def usable(decoder: Decoder) -> bool:
        try:
            check_decoder(decoder)
        except ValueError:
            return False
        return True

    return [
        decoder
        for decoder in DECODERS
        if decoder not in ("auto", "torchcodec-cuda") and usable(decoder)
    ]


def indexed(
    videos: list[Made], folder: Path, decoder: Decoder = "auto", timeout_s: float = 60.0
) -> dict[str, Result]:
    """Index a tar of all the videos as they are, and read them as `fit` and `test` do."""
    with tarfile.open(folder / "all.tar", "w") as tar:
        for number, made in enumerate(videos):
            for suffix, data in ((made.path.suffix, made.path.read_bytes()), (".txt", b"a video")):
                member = tarfile.TarInfo(f"{number:03d}{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    index_tars(folder, decoder=decoder, timeout_s=timeout_s)
    corpus = Corpus.load([str(folder)])
    index, reader = corpus.manifests[0].load_index(0), SampleReader(corpus)
    found = {videos[int(r["clip_id"])].kind.name: Result(r["reason"]) for r in index.rejects}
    for row in range(len(index)):
        made = videos[int(index.key(row))]
        clips = EvalClips(reader, ClipOptions(4, 96), FaultMonitor(0, 1.0))
        batch = clips[(row, 1)]
        assert batch.mask.all(), made.kind.name
        frames = batch.video[0].permute(1, 2, 3, 0).numpy()
        wanted = [made.at((k + 0.5) / 4 * made.duration_s) for k in range(4)]
        found[made.kind.name] = _compared(made, zip(wanted, frames, strict=True))
    return found


def embedded(made: Made) -> Result:
    """`embed`: a video as one window."""
    ((_, length),) = probe_videos([made.path], 1)
    if isinstance(length, Unreadable):
        return Result(length.reason)
    return _windows(made, [Window(made.path, 0.0, length.duration_s)], 4)


def searched(made: Made) -> Result:
    """`search`: sliding windows, and the pictures of the page."""
    ((_, length),) = probe_videos([made.path], 1)
    if isinstance(length, Unreadable):
        return Result(length.reason)
    windows = sliding_windows(made.path, length, 2.0)
    result = _windows(made, windows, 2)
    if result.reason:
        return result
    times = [(window.start_s + window.end_s) / 2 for window in windows]
    page = _compared(made, [(made.at(t), p) for t in times for p in read_frames(made.path, [t])])
    return Result(
        "",
        max(result.frame_error, page.frame_error),
        max(result.colour_error, page.colour_error),
    )


def _windows(made: Made, windows: list[Window], num_frames: int) -> Result:
    pairs: list[tuple[int, np.ndarray]] = []
    for kept, clips, lost in read_windows(windows, num_frames, 96, 1, len(windows)):
        if lost:
            return Result(lost[0].reason)
        for window, clip in zip(kept, clips, strict=True):
            span = window.end_s - window.start_s
            times = [window.start_s + (k + 0.5) / num_frames * span for k in range(num_frames)]
            pairs += zip(map(made.at, times), clip.permute(1, 2, 3, 0).numpy(), strict=True)
    return _compared(made, pairs)


PATHS: dict[str, Callable[[Made], Result]] = {
    "`shards build`": built,
    "`embed`": embedded,
    "`search`": searched,
}


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as work:
        folder, tars = Path(work), Path(work) / "tars"
        tars.mkdir()
        videos = [kind.write(folder) for kind in KINDS]
        in_place = indexed(videos, tars)
        columns = list(PATHS)
        columns.insert(1, "`--index-only`, `fit`")
        print(f"decoders of the stored form: {', '.join(usable_decoders())}\n")
        print(f"| video | {' | '.join(columns)} | reason |")
        print("|---" * (len(columns) + 2) + "|")
        for made in videos:
            cells = [path(made) for path in PATHS.values()]
            cells.insert(1, in_place[made.kind.name])
            reasons = {cell.reason.split("able: ")[-1] for cell in cells if cell.reason}
            flag = " **wrong**" if any(cell.wrong(made) for cell in cells) else ""
            print(
                f"| {made.kind.name} | {' | '.join(map(str, cells))} | {'; '.join(reasons)}{flag} |"
            )


if __name__ == "__main__":
    main()
