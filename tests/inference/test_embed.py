"""`eva02-at embed`: rows belong to their windows, and nothing unreadable goes unnamed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from published_layouts import EVA, VIT, random_model
from pyarrow import parquet
from small_videos import write_video

from datamodules.video.crops import resize_and_centre_crop
from datamodules.video.decode import decode_frames
from datamodules.video.windows import Window
from lightning_modules.checkpoints.model_config import config_to_json
from lightning_modules.cli.main import main
from lightning_modules.inference import embedding
from lightning_modules.inference.embedding import Embedder, EmbedOptions
from lightning_modules.models import DualEncoder, DualEncoderConfig

# Sums of another order (batches of another size): fp32 rounding of unit vectors.
TOLERANCE = 1e-5


@pytest.fixture
def model(tmp_path: Path) -> DualEncoder:
    return save_model_as(tmp_path / "m.pt", EVA)


def save_model_as(path: Path, config: DualEncoderConfig, seed: int = 1) -> DualEncoder:
    model = random_model(config, seed)
    torch.save(model.state_dict(), path)
    path.with_suffix(".json").write_text(config_to_json(config))
    return model


def embed(folder: Path, *words: str | Path, name: str = "m") -> int:
    model = ["--checkpoint", folder / f"{name}.pt", "--config", folder / f"{name}.json"]
    return main([*map(str, ["embed", *model, *words]), "--workers", "2"])


def whole_clip(model: DualEncoder, path: Path) -> torch.Tensor:
    frames = resize_and_centre_crop(decode_frames(path.read_bytes(), 4), 16)
    with torch.inference_mode():
        return model.encode_video(frames[None])[0]


def test_a_parquet_file_holds_windows_and_embeddings(tmp_path: Path, model: DualEncoder) -> None:
    path = write_video(tmp_path / "v.mp4", 30)
    words = ["--videos", path, "--rate", "2", "--frames", "2"]
    for name in ("f.parquet", "f.npy"):
        assert embed(tmp_path, *words, "--output", tmp_path / name) == 0
    table = parquet.read_table(tmp_path / "f.parquet")
    rows, about = np.load(tmp_path / "f.npy"), json.loads((tmp_path / "f.json").read_text())
    assert len(rows) > 1
    assert table.select(["video", "start_s", "end_s"]).to_pylist() == about["windows"]
    assert np.array_equal(np.array(table["embedding"].to_pylist(), dtype=np.float32), rows)


def test_clips_of_a_folder(tmp_path: Path, model: DualEncoder, capsys) -> None:
    paths = [write_video(tmp_path / "v" / f"{n}.mp4", 12 + n, first=5 * n) for n in range(3)]
    (tmp_path / "v" / "1b.mp4").write_bytes(b"nothing")
    output = tmp_path / "out" / "f.npy"
    assert embed(tmp_path, "--videos", tmp_path / "v", "--output", output) == 0
    told = capsys.readouterr()
    assert "1b.mp4" in told.err and "1 unreadable in 1 videos" in told.err
    rows, about = np.load(output), json.loads(output.with_suffix(".json").read_text())
    assert [Path(w["video"]).name for w in about["windows"]] == ["0.mp4", "1.mp4", "2.mp4"]
    assert "1b.mp4" in about["unreadable"][0]
    for path, row in zip(paths, rows, strict=True):
        torch.testing.assert_close(
            torch.from_numpy(row), whole_clip(model, path), rtol=0, atol=TOLERANCE
        )
    assert abs(rows[0] - rows[2]).max() > 100 * TOLERANCE


def test_sliding_windows_keep_the_last_part(tmp_path: Path, model: DualEncoder) -> None:
    video = write_video(tmp_path / "v.mp4", 22)
    output = tmp_path / "f.pt"
    words = ["--videos", video, "--rate", "2", "--output", output]
    assert embed(tmp_path, *words, "--batch-size", "2") == 0
    rows = torch.load(output, weights_only=True)
    windows = json.loads(output.with_suffix(".json").read_text())["windows"]
    assert [w["start_s"] for w in windows] == [0, 0.5, 1.0, 1.5, 2.0]
    assert windows[-1]["end_s"] == pytest.approx(2.2) and rows.shape == (5, 12)
    # the third window alone, as a clip of a list, gives the third row
    (tmp_path / "clips.csv").write_text("video,start_s,end_s\nv.mp4,1.0,1.5\n")
    words = ["--videos", tmp_path / "clips.csv", "--output", tmp_path / "one.pt"]
    assert embed(tmp_path, *words) == 0
    one = torch.load(tmp_path / "one.pt", weights_only=True)
    torch.testing.assert_close(one[0], rows[2], rtol=0, atol=TOLERANCE)
    assert (rows[1] - rows[2]).abs().max() > 100 * TOLERANCE


def test_rows_keep_the_given_order_whatever_is_finished_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = [
        Window(write_video(tmp_path / f"{n}.mp4", 10, first=9 * n), 0.0, 1.0) for n in range(3)
    ]
    embedder = Embedder(random_model(EVA), EmbedOptions(batch_size=1))
    in_order = embedder.windows(windows)
    read = embedding.read_windows
    monkeypatch.setattr(embedding, "read_windows", lambda *a: reversed(list(read(*a))))
    backwards = embedder.windows(windows)
    assert in_order.windows == backwards.windows == windows
    assert torch.equal(in_order.embeddings, backwards.embeddings)
    assert not torch.equal(in_order.embeddings[0], in_order.embeddings[2])


def test_a_folder_gets_one_file_a_video_and_goes_on_where_it_stopped(
    tmp_path: Path, model: DualEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    for n in range(2):
        write_video(tmp_path / "v" / f"{n}.mp4", 20, first=9 * n)
    (tmp_path / "v" / "bad.mp4").write_bytes(b"nothing")
    words = ["--videos", tmp_path / "v", "--rate", "2", "--output", tmp_path / "features"]
    assert embed(tmp_path, *words) == 0
    told = capsys.readouterr()
    assert "features of 2 of 3 videos" in told.out and "bad.mp4" in told.err
    first = tmp_path / "features" / "0.pt"
    assert torch.load(first, weights_only=True).shape == (4, 12)
    written = first.stat().st_mtime_ns
    (tmp_path / "features" / "1.pt").unlink()
    assert embed(tmp_path, *words) == 0
    assert first.stat().st_mtime_ns == written
    assert (tmp_path / "features" / "1.pt").exists()
    save_model_as(tmp_path / "other.pt", EVA, seed=2)
    assert embed(tmp_path, *words, name="other") == 2
    assert "features of another model" in capsys.readouterr().err


def test_frames_and_precision_are_options(tmp_path: Path) -> None:
    model = save_model_as(tmp_path / "m.pt", VIT)
    video = write_video(tmp_path / "v.mp4", 16)
    rows = {}
    for words in (["--frames", "8"], ["--frames", "4"], ["--dtype", "bfloat16"]):
        assert embed(tmp_path, "--videos", video, "--output", tmp_path / "f.pt", *words) == 0
        rows[words[1]] = torch.load(tmp_path / "f.pt", weights_only=True)[0]
    torch.testing.assert_close(rows["4"], whole_clip(model, video), rtol=0, atol=TOLERANCE)
    assert (rows["8"] - rows["4"]).abs().max() > 100 * TOLERANCE
    difference = (rows["bfloat16"] - rows["4"]).abs().max()
    assert TOLERANCE < difference < 0.1 and rows["bfloat16"].dtype == torch.float32


def test_mistakes_are_one_line(
    tmp_path: Path, model: DualEncoder, capsys: pytest.CaptureFixture[str]
) -> None:
    video = write_video(tmp_path / "v.mp4", 4)
    (tmp_path / "clips.csv").write_text("video,start_s,end_s\nv.mp4,0,1\n")
    (tmp_path / "bad.mp4").write_bytes(b"nothing")
    out = ["--output", tmp_path / "f.pt"]
    for words, message in [
        (["--videos", video, "--output", tmp_path / "f.csv"], "must end in .pt, .npy, .parquet"),
        (["--videos", tmp_path / "nowhere", *out], "no such file or folder"),
        (["--videos", tmp_path / "clips.csv", video, *out], "stands alone"),
        (["--videos", video, "--rate", "0", *out], "rate is 0.0; it must be positive"),
        (["--videos", video, "--window-s", "2", *out], "window-s needs a rate"),
        (["--videos", tmp_path / "bad.mp4", *out], "no video could be read"),
    ]:
        assert embed(tmp_path, *words) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
