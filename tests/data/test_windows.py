"""Windows, frames at given times, and videos that cannot be read."""

from __future__ import annotations

import faulthandler
import os
import signal
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_videos import brightness, write_video

from datamodules.video.crops import resize_and_centre_crop
from datamodules.video.decode import decode_frames
from datamodules.video.frames import Video, read_frames
from datamodules.video.windows import (
    Length,
    Unreadable,
    Window,
    find_videos,
    probe_videos,
    read_clip_list,
    read_windows,
    sliding_windows,
)


@settings(max_examples=200, deadline=None)
@given(
    num_frames=st.integers(1, 5000),
    fps=st.floats(5, 120),
    rate=st.floats(0.1, 10),
    factor=st.sampled_from([None, 0.3, 1.0, 2.5]),
)
def test_windows_cover_every_frame(num_frames: int, fps: float, rate: float, factor) -> None:
    length = Length(num_frames / fps, 1 / fps)
    window_s = None if factor is None else factor / rate
    windows = sliding_windows(Path("v"), length, rate, window_s)
    assert all(0 <= w.start_s < w.end_s <= length.duration_s for w in windows)
    assert len(windows) == 1 or (len(windows) - 1) / rate <= (num_frames - 1) / fps + 1e-6
    if factor is None or factor >= 1:
        assert windows[-1].end_s > (num_frames - 1) / fps  # the last frame is in the last window
        edges = [0.0, *(w.end_s for w in windows)]
        assert all(w.start_s <= edge + 1e-6 for w, edge in zip(windows, edges, strict=False))


def test_windows_by_hand() -> None:
    def spans(duration_s: float, frame_s: float, rate: float, window_s: float | None = None):
        windows = sliding_windows(Path("v"), Length(duration_s, frame_s), rate, window_s)
        return [(w.start_s, w.end_s) for w in windows]

    assert np.allclose(spans(1.7, 0.1, 2.0), [(0, 0.5), (0.5, 1), (1, 1.5), (1.5, 1.7)])
    assert np.allclose(spans(3.0, 0.1, 1.0, 2.0), [(0, 1.5), (0.5, 2.5), (1.5, 3.0)])
    # one feature for each 16 frames at 30 a second, the trailing 4 frames included
    assert len(spans(100 / 30, 1 / 30, 1.875)) == 7
    # 120 frames at 29.97 a second end 4 ms after the second window: there is no frame there
    assert len(spans(4.004, 1001 / 30000, 0.5)) == 2


@pytest.mark.parametrize("fps", [10, Fraction(30000, 1001), 50])
def test_frames_are_those_on_the_screen(tmp_path: Path, fps) -> None:
    path = write_video(tmp_path / "v.mp4", 45, fps)
    times = [(k + 0.5) / float(fps) for k in (0, 1, 7, 20, 44)]
    shown = [round(brightness(frame)) for frame in read_frames(path, times)]
    assert shown == [0, 1, 7, 20, 44]
    late = [(k + 0.5) / float(fps) for k in (30, 31)]  # reached by a seek
    assert [round(brightness(frame)) for frame in read_frames(path, late)] == [30, 31]


def test_uneven_frame_times_keep_their_timing(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.2, 1.5, 1.6, 3.0]
    path = write_video(tmp_path / "v.mkv", 6, times_s=times)
    wanted = [0.05, 0.25, 1.45, 1.55, 2.9, 3.1]
    assert [round(brightness(frame)) for frame in read_frames(path, wanted)] == [0, 2, 2, 3, 4, 5]
    with pytest.raises(ValueError, match=r"9\.00 s lies beyond its end"):
        list(read_frames(path, [0.1, 9.0]))


def test_a_stream_without_an_index_is_read_from_its_start(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.ts", 60, gop=20)
    wanted = [(k + 0.5) / 10 for k in (33, 45, 59)]
    assert [round(brightness(frame)) for frame in read_frames(path, wanted)] == [33, 45, 59]
    assert dict(probe_videos([path], 1))[path].duration_s == pytest.approx(6.0, abs=1e-3)


def test_a_whole_clip_is_read_as_in_evaluation(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mp4", 37, 10, gop=8)
    ((video, length),) = probe_videos([path], 1)
    assert video == path
    assert length == Length(pytest.approx(3.7), pytest.approx(0.1))
    ((kept, clips, lost),) = read_windows([Window(path, 0.0, length.duration_s)], 4, 32, 1)
    expected = resize_and_centre_crop(decode_frames(path.read_bytes(), 4), 32)
    assert len(kept) == 1 and not lost and torch.equal(clips[0], expected)


def test_batches_hold_the_right_frames_over_several_videos(tmp_path: Path) -> None:
    paths = [write_video(tmp_path / f"{n}.mp4", 30, 10, first=n) for n in range(3)]
    windows = [w for path in paths for w in sliding_windows(path, Length(3.0, 0.1), 2.0, 1.0)]
    seen = {}
    for kept, clips, lost in read_windows(windows, 2, 32, 2, batch_size=4):
        assert not lost and len(kept) == len(clips) <= 4
        seen |= dict(zip(kept, clips, strict=True))
    assert set(seen) == set(windows)
    for window, clip in seen.items():
        span = window.end_s - window.start_s
        centres = [window.start_s + part * span for part in (0.25, 0.75)]
        first = int(window.video.stem)
        expected = [first + int(t * 10 + 1e-6) for t in centres]
        got = [brightness(frame.permute(1, 2, 0).numpy()) for frame in clip.unbind(1)]
        assert np.allclose(got, expected, atol=0.7)  # of a picture: rounding of a brightness of 3


def damaged_videos(folder: Path) -> dict[str, Path]:
    whole = write_video(folder / "whole.mp4", 20)
    content = whole.read_bytes()
    bad = {name: folder / f"{name}.mp4" for name in ("empty", "cut", "text")}
    bad["empty"].write_bytes(b"")
    bad["cut"].write_bytes(content[: len(content) // 2])
    bad["text"].write_text("not a video " * 100)
    return {"whole": whole, **bad, "absent": folder / "absent.mp4"}


def test_unreadable_videos_are_named_with_the_reason(tmp_path: Path) -> None:
    found = damaged_videos(tmp_path)
    measured = dict(probe_videos(list(found.values()), 2))
    assert measured[found["whole"]].duration_s == pytest.approx(2.0)
    for name in ("empty", "cut", "text", "absent"):
        problem = measured[found[name]]
        assert isinstance(problem, Unreadable) and problem.reason
        assert str(found[name]) in str(problem)
    windows = [Window(path, 0.0, 1.0) for path in found.values()]
    kept, lost = [], []
    for read, _, problems in read_windows(windows, 2, 32, 1, batch_size=3):
        kept += read
        lost += problems
    assert [w.video.stem for w in kept] == ["whole"]
    assert {p.video.stem for p in lost} == {"empty", "cut", "text", "absent"}
    assert all("0.00-1.00 s" in str(p) for p in lost)


def test_a_video_that_crashes_the_decoder_is_met_in_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [write_video(tmp_path / f"{n}.mp4", 10) for n in ("a", "b", "c")]
    opened = Video._open

    def crash(self: Video):
        if self.source.stem == "b":
            faulthandler.disable()  # the death is meant, its trace is noise
            os.kill(os.getpid(), signal.SIGSEGV)
        return opened(self)

    monkeypatch.setattr(Video, "_open", crash)
    windows = [Window(path, 0.0, 1.0) for path in paths]
    ((kept, clips, lost),) = read_windows(windows, 2, 32, 2)
    assert [w.video.stem for w in kept] == ["a", "c"] and len(clips) == 2
    assert [p.reason for p in lost] == ["crashed the decoder (SIGSEGV)"]
    assert isinstance(dict(probe_videos(paths, 1))[paths[1]], Unreadable)


def test_folders_lists_and_files_are_searched(tmp_path: Path) -> None:
    for name in ("a.MP4", "sub/b.webm", ".hidden/c.mp4", "notes.txt", "d.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [p.name for p in find_videos([tmp_path])] == ["a.MP4", "b.webm"]
    (tmp_path / "list.txt").write_text("a.MP4\n\n.hidden/c.mp4\n")
    assert [p.name for p in find_videos([tmp_path / "list.txt"])] == ["a.MP4", "c.mp4"]
    assert [p.name for p in find_videos([tmp_path / "d.tar"])] == ["d.tar"]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"no video in .*\.mp4"):
        find_videos([tmp_path / "none"])
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_videos([tmp_path / "nowhere"])


def test_clip_list(tmp_path: Path) -> None:
    table = tmp_path / "clips.csv"
    table.write_text("video,start_s,end_s,note\nv/a.mp4,0,1.5,x\n")
    assert read_clip_list(table) == [Window(tmp_path / "v/a.mp4", 0.0, 1.5)]
    for text, message in [
        ("video,start_s\na,0\n", "lacks the column end_s"),
        ("video,start_s,end_s\n", "lists no clip"),
        ("video,start_s,end_s\na,zero,1\n", "line 2: start_s and end_s must be seconds"),
        ("video,start_s,end_s\na,0,1\nb,3,2\n", "line 3: 0 <= start_s < end_s"),
    ]:
        table.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_clip_list(table)


def test_telephone_videos_are_turned_upright(tmp_path: Path) -> None:
    """The display matrix of a telephone held upright: x' = -y, y' = x, a quarter turn clockwise."""
    path = write_video(tmp_path / "v.mp4", 3)
    stored = next(read_frames(path, [0.1]))
    one = 0x10000  # 16.16 fixed point
    identity = struct.pack(">9i", one, 0, 0, 0, one, 0, 0, 0, 0x40000000)
    turned = struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 0x40000000)
    content = path.read_bytes()
    track = content.index(b"tkhd")
    assert identity in content[track:]
    path.write_bytes(content[:track] + content[track:].replace(identity, turned, 1))
    upright = next(read_frames(path, [0.1]))
    assert upright.shape == (64, 48, 3)
    assert np.array_equal(upright[0], stored[::-1, 0])  # the left column becomes the top row
