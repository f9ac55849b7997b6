"""Choice of frames, crops, and the tokenizer against ids of the published one."""

import random
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import write_video

from datamodules.tokenizer import EOT_ID, SOT_ID, Tokenizer
from datamodules.video.crops import crop_and_resize, random_crop_box, resize_and_centre_crop
from datamodules.video.decode import (
    DamagedSample,
    check_decoder,
    decode_frames,
    decoder_of,
    segment_times,
    stored_decoder,
)
from datamodules.video.frames import frame_indices


def test_evaluation_takes_the_centres_of_equal_segments():
    assert segment_times(8.0, 4, None) == [1.0, 3.0, 5.0, 7.0]
    starts = np.arange(8) * 0.1
    assert frame_indices(starts, 0.8, segment_times(0.8, 4, None)) == [1, 3, 5, 7]
    # fewer frames than wanted: some twice
    assert frame_indices(starts[:2], 0.2, segment_times(0.2, 4, None)) == [0, 0, 1, 1]


def test_training_jitters_within_each_segment_and_reaches_all_of_it():
    drawn = np.array([segment_times(8.0, 4, random.Random(seed)) for seed in range(500)])
    for segment, times in enumerate(drawn.T):
        assert 2 * segment <= times.min() < 2 * segment + 0.05
        assert 2 * segment + 1.95 < times.max() < 2 * segment + 2


def test_an_odd_frame_rate_keeps_its_timing():
    starts = np.array([0.0, 0.1, 0.2, 1.2, 1.3])  # a camera that stalled for a second
    assert frame_indices(starts, 1.4, [0.05, 0.5, 1.1, 1.25]) == [0, 2, 2, 3]


def test_frames_come_in_time_order_at_their_place(tmp_path):
    data = write_video(tmp_path / "v.mp4", seconds=1.6).read_bytes()
    frames = decode_frames(data, 4)
    assert frames.shape == (4, 64, 80, 3) and frames.dtype == np.uint8
    # centres of 16 frames' quarters; brightness tells the frame
    assert np.allclose((frames.reshape(4, -1).mean(1) - 8) / 4, [2, 6, 10, 14], atol=0.5)
    again = [decode_frames(data, 4, random.Random(7)) for _ in range(2)]
    assert np.array_equal(*again)


@pytest.mark.parametrize("data", [b"", b"garbage", b"\0" * 1000])
def test_bytes_that_are_no_video_are_damaged_samples(data):
    with pytest.raises(DamagedSample, match="undecodable"):
        decode_frames(data, 2)


def test_a_truncated_video_is_a_damaged_sample(tmp_path):
    data = write_video(tmp_path / "v.mp4", seconds=1).read_bytes()
    with pytest.raises(DamagedSample):
        decode_frames(data[: len(data) // 2], 2)


def test_a_missing_decoder_says_what_to_install(monkeypatch):
    check_decoder("decord")
    for name in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"eva02-at\[torchcodec\]"):
        check_decoder("torchcodec")


def test_without_decord_another_decoder_serves(tmp_path, monkeypatch):
    data = write_video(tmp_path / "v.mp4", seconds=1.6).read_bytes()
    expected = decode_frames(data, 4, None, "pyav")
    for name in ("decord", "torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, name, None)
    stored_decoder.cache_clear()
    try:
        assert stored_decoder("auto") == decoder_of("auto", {}) == "pyav"
        assert np.array_equal(decode_frames(data, 4), expected)
        with pytest.raises(ValueError, match="install `decord`"):
            check_decoder("decord")
    finally:
        stored_decoder.cache_clear()


def test_decord2_is_not_taken_for_decord(monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", types.SimpleNamespace(__version__="3.4.0"))
    stored_decoder.cache_clear()
    try:
        assert stored_decoder("auto") != "decord"
        with pytest.raises(ValueError, match=r"decord2 3\.4\.0 is installed in its place"):
            check_decoder("decord")
    finally:
        stored_decoder.cache_clear()


def test_torchcodec_gives_decords_frames(tmp_path):
    try:
        check_decoder("torchcodec")
    except ValueError as error:
        pytest.skip(str(error))
    data = write_video(tmp_path / "v.mp4", seconds=1.6).read_bytes()
    for generator in (None, 3):
        draws = [None if generator is None else random.Random(generator) for _ in range(2)]
        expected = decode_frames(data, 4, draws[0]).astype(int)
        got = decode_frames(data, 4, draws[1], "torchcodec").astype(int)
        assert np.abs(got - expected).max() <= 1  # two versions of FFmpeg's colour conversion


def test_crop_boxes_keep_to_scale_and_ratio_and_lie_within():
    for seed in range(300):
        draw = random.Random(seed)
        top, left, height, width = random_crop_box(256, 456, draw, (0.5, 1.0))
        assert 0 <= top <= 256 - height and 0 <= left <= 456 - width
        assert 0.74 < width / height < 1.35
        assert height * width <= 256 * 456
    # a frame so wide that no draw fits: the largest central box
    assert random_crop_box(10, 1000, random.Random(0), (0.9, 1.0)) == (0, 493, 10, 13)


def test_uint8_crop_is_the_float_crop_rounded():
    draw = np.random.default_rng(0)
    frames = draw.integers(0, 256, (3, 37, 53, 3), dtype=np.uint8)
    got = crop_and_resize(frames, (3, 5, 29, 31), 16)
    assert got.shape == (3, 3, 16, 16) and got.dtype == torch.uint8
    part = torch.from_numpy(frames[:, 3:32, 5:36]).permute(0, 3, 1, 2).float()
    exact = F.interpolate(part, (16, 16), mode="bilinear", antialias=True).transpose(0, 1)
    # the uint8 kernel works with 16-bit weights: one step of rounding
    assert (got.float() - exact).abs().max() <= 1.0


def test_evaluation_resizes_the_short_side_then_cuts_the_centre():
    frames = np.zeros((1, 20, 40, 3), dtype=np.uint8)
    frames[:, :, 10:30] = 200  # exactly the central square
    assert (resize_and_centre_crop(frames, 10)[..., 1:-1] == 200).all()
    assert resize_and_centre_crop(np.zeros((2, 41, 30, 3), np.uint8), 24).shape == (3, 2, 24, 24)


# ids of the published tokenizer (open_clip_torch 3.3.0), start and end left out
PUBLISHED = {
    "#C C opens a drawer": [258, 322, 322, 4801, 320, 23219],
    "hello  World!!": [3306, 1002, 748],
    "it's &amp;lt; 3 dogs' 1234": [585, 568, 283, 274, 3255, 262, 272, 273, 274, 275],
    "日本語テスト 🙂🙂 mixed": [
        39121,
        44353,
        34002,
        252,
        2429,
        228,
        32421,
        486,
        32006,
        14860,
        6780,
    ],
    "don't I'VE we'll": [847, 713, 328, 1200, 649, 1342],
    "": [],
}


@pytest.mark.parametrize("text", PUBLISHED)
def test_tokens_are_the_published_ones(text):
    row = Tokenizer()([text])[0].tolist()
    ids = PUBLISHED[text]
    assert row == [SOT_ID, *ids, EOT_ID] + [0] * (75 - len(ids))


def test_long_texts_keep_the_end_token_last():
    tokens = Tokenizer()(["a " * 100, "b"])
    assert tokens.shape == (2, 77) and tokens.dtype == torch.int64
    assert tokens[0, 0] == SOT_ID and tokens[0, -1] == EOT_ID and (tokens[0, 1:-1] == 320).all()
    assert Tokenizer(5)("a a a a").tolist() == [[SOT_ID, 320, 320, 320, EOT_ID]]
    with pytest.raises(ValueError, match="context_length is 2"):
        Tokenizer(2)


def test_short_rows_hold_the_longest_text():
    whole, short = Tokenizer(), Tokenizer(pad_to_multiple_of=16)
    cases = ((["a", "b " * 14], 16), (["a " * 15], 32), (["a " * 99, ""], 77), ([], 16))
    for words, length in cases:
        tokens = short(words)
        assert tokens.shape == (len(words), length)
        assert torch.equal(tokens, whole(words)[:, :length])
        assert tokens.eq(EOT_ID).sum() == len(words)


def test_mojibake_and_case_are_cleaned():
    assert Tokenizer().encode("CafÃ©  Au&nbsp;Lait") == Tokenizer().encode("café au lait")
