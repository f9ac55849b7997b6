"""Every kind of video through every path: the right picture in the right colours, or the reason."""

from __future__ import annotations

import random
from fractions import Fraction
from pathlib import Path

import pytest
from video_table import KINDS, PATHS, Result, indexed, usable_decoders
from videos_of_every_kind import Kind, Made, aspect

from datamodules.video.decode import DamagedSample, decode_frames
from datamodules.video.frames import Limits, Video, read_frames
from datamodules.video.windows import passed_over


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    folder = tmp_path_factory.mktemp("videos")
    return {kind.name: kind.write(folder) for kind in KINDS}


@pytest.fixture(scope="module")
def in_place(
    videos: dict[str, Made], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Result]:
    return indexed(list(videos.values()), Path(tmp_path_factory.mktemp("tars")))


@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
def test_a_video_is_right_on_every_path_or_refused_with_the_reason(name, videos, in_place) -> None:
    made = videos[name]
    results = {label: path(made) for label, path in PATHS.items()}
    results["--index-only, fit"] = in_place[name]
    wrong = {label: result for label, result in results.items() if result.wrong(made)}
    assert not wrong, wrong
    if made.kind.refused:
        assert all(result.reason for result in results.values())


@pytest.mark.parametrize("decoder", ["decord", "torchcodec"])
def test_the_index_lets_no_wrong_picture_of_a_decoder_pass(decoder, videos, tmp_path) -> None:
    if decoder not in usable_decoders():
        pytest.skip(f"{decoder} is not installed")
    kinds = [made for made in videos.values() if made.kind.refused is None]
    found = indexed(kinds, tmp_path, decoder, 5.0)
    passed = {name: result for name, result in found.items() if not result.reason}
    right = {made.kind.name: made for made in kinds}
    wrong = {name: result for name, result in passed.items() if result.wrong(right[name])}
    assert not wrong and len(passed) > 20


def test_flipped_bits_are_right_or_refused(tmp_path) -> None:
    """The decoder marks the picture whose data is wrong; those that lean on it are too."""
    kind = Kind("flipped", options={"crf": "20", "g": "10", "bf": "2"}, count=60)
    made = kind.write(tmp_path)
    whole = made.path.read_bytes()
    wrong = refused = 0
    for seed in range(20):
        generator, data = random.Random(seed), bytearray(whole)
        for _ in range(3):
            data[generator.randrange(48, whole.index(b"moov"))] ^= 1 << generator.randrange(8)
        made.path.write_bytes(bytes(data))
        results = [path(made) for path in PATHS.values()]
        refused += sum(bool(result.reason) for result in results)
        wrong += sum(result.frame_error > 0 for result in results)
    # a flip may decode to another picture without an error; without the marks, 25 are wrong
    assert wrong <= 2 and refused > 30, (wrong, refused)


def test_limits_are_options(tmp_path) -> None:
    made = Kind("v", options={"crf": "12"}).write(tmp_path)
    data = made.path.read_bytes()
    with pytest.raises(DamagedSample, match="a frame of 128 x 96 pixels, more than max_pixels=99"):
        decode_frames(data, 2, None, "pyav", Limits(max_pixels=99))
    with pytest.raises(DamagedSample, match="more than max_frames=29 frames"):
        decode_frames(data, 2, None, "pyav", Limits(max_frames=29))
    assert len(decode_frames(data, 2, None, "pyav", Limits(128 * 96, 30))) == 2
    with pytest.raises(ValueError, match="max_pixels=99"):
        next(read_frames(made.path, [0.0], Limits(max_pixels=99)))
    with pytest.raises(ValueError, match="max_frames is 0"):
        Limits(max_frames=0)
    wide = Kind("w", options={"crf": "12"}, change=aspect(Fraction(64))).write(tmp_path)
    with pytest.raises(ValueError, match="a frame of 8192 x 96 pixels"):
        Video(wide.path, Limits(max_pixels=8000 * 96))


def test_what_a_folder_holds_besides_videos_is_listed(tmp_path) -> None:
    for name in ("a.mp4", "b.gif", "sub/c.GIF", ".hidden/d.gif", "sub/.e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    others = [tmp_path / "b.gif", tmp_path / "sub/c.GIF"]
    assert passed_over([tmp_path, tmp_path / "a.mp4"]) == {tmp_path: others}
    assert passed_over([tmp_path / "a.mp4"]) == {}
