"""How much may be missing: rows and clips are counted, and too much ends a build by name."""

import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import FAST, make_records, write_video

from datamodules.manifest import ClipRecord, Manifest
from datamodules.shards import LAYOUTS, build_shards
from datamodules.shards.estimate import estimate_build
from datamodules.shards.layouts import Listing
from datamodules.shards.plan import BuildPlan
from lightning_modules.cli.shards import main

ENCODED = ["--short-side", "32", "--preset", "ultrafast"]


def table(folder: Path, bad_rows: int, good_rows: int = 8) -> Path:
    path = folder / "clips.csv"
    rows = [f"v{k % 4},{0.1 * k:.1f},{0.1 * k + 0.5:.1f},text {k}" for k in range(good_rows)]
    rows[1:1] = ["v0,x,1,odd"] * bad_rows
    path.write_text("\n".join(["video_id,start_second,end_second,text", *rows]) + "\n")
    return path


def build(annotations: Path, videos: Path, output: Path, *words: str) -> int:
    common = ["--annotations", str(annotations), "--format", "egohod", "--videos", str(videos)]
    return main(["build", *common, "--output", str(output), *ENCODED, *words])


def test_odd_rows_go_to_the_rejects_file_with_their_number(videos, tmp_path, capsys):
    output = tmp_path / "set"
    assert build(table(tmp_path, 1, 10), videos, output) == 0
    assert "10 clips in 1 shards" in capsys.readouterr().out
    (line,) = map(json.loads, (output / "rejects.jsonl").read_text().splitlines())
    assert line["row"] == 2 and line["reason"].startswith("start_second: 'x' is not a time")
    # ids are row numbers of the file, whatever was left out
    index = Manifest.load(output).load_index(0)
    assert [index.record(row).clip_id for row in range(3)] == ["0", "2", "3"]


def test_more_odd_rows_than_allowed_end_the_build_before_it_begins(videos, tmp_path):
    annotations, output = table(tmp_path, 3), tmp_path / "set"
    with pytest.raises(ValueError, match=r"3 of 11 clips \(27.3%\) are rejected.*\(row 2\): start"):
        build(annotations, videos, output)
    assert not output.exists()
    assert build(annotations, videos, output, "--max-rejects", "0.3") == 0
    with pytest.raises(ValueError, match="is a share"):
        build(annotations, videos, tmp_path / "other", "--max-rejects", "3")


def test_missing_videos_are_named_by_the_path_that_was_looked_for(videos, tmp_path, capsys):
    folder = shutil.copytree(videos, tmp_path / "videos")
    (folder / "v1.mp4").unlink()
    annotations = table(tmp_path, 0)
    with pytest.raises(ValueError, match=rf"2 missing.*Looked for {folder}/v1.mp4\. Check"):
        build(annotations, folder, tmp_path / "set")
    assert build(annotations, folder, tmp_path / "set", "--dry-run") == 0
    assert f"rejected: 2 missing\nnot there: {folder}/v1.mp4\n" in capsys.readouterr().out


def test_a_wrong_layout_ends_the_build(tmp_path):
    """AVION's chunks of 15 s read as LaViLa's of 300 s: only the first is found."""
    for start in (0, 15, 30, 45):
        write_video(tmp_path / "videos" / "v.mp4" / f"{start}.mp4", seconds=15, fps=2)
    clips = [ClipRecord(f"{k}", "v", 5.0 * k, 5.0 * k + 3, ("t",)) for k in range(12)]
    settings = {"videos": tmp_path / "videos", "options": FAST, "max_rejects": 0.1}
    with pytest.raises(ValueError, match=r"9 of 12 clips \(75.0%\) are rejected.*: 9 short; the f"):
        build_shards(clips, layout=LAYOUTS["lavila"], output=tmp_path / "wrong", **settings)
    assert not (tmp_path / "wrong" / "manifest.json").exists()
    report = build_shards(clips, layout=LAYOUTS["avion"], output=tmp_path / "right", **settings)
    assert (report.num_clips, report.num_rejected) == (12, 0)


def test_much_that_is_short_ends_the_build_on_the_way(videos, tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.shards.build._ENOUGH_ROWS", 8)
    late = [ClipRecord(f"late{k}", "v0", 60.0, 61.0, ("t",)) for k in range(4)]
    clips = [*make_records()[:4], *late, *make_records()[4:]]
    with pytest.raises(ValueError, match=r"4 of 8 clips.*4 short"):
        build_shards(
            clips,
            videos=videos,
            layout=LAYOUTS["whole"],
            output=tmp_path,
            options=FAST,
            samples_per_shard=4,
            max_rejects=0.2,
        )
    assert len(list(tmp_path.glob("*.tar"))) < 9


def test_each_folder_is_listed_once(videos, tmp_path, monkeypatch):
    listed, stated = [], []
    scandir, stat = os.scandir, os.stat
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(path) or scandir(path))
    monkeypatch.setattr(os, "stat", lambda path, **kw: stated.append(path) or stat(path, **kw))
    plan = BuildPlan(make_records(), videos, LAYOUTS["whole"], tmp_path, FAST, 9)
    stated.clear()
    assert len(plan.survey().found) == 32
    assert listed == [videos] and stated == []
    assert estimate_build(plan, num_trials=1).num_clips == 32


@pytest.mark.parametrize("name", ["v\0.mp4", "x" * 300 + ".mp4", "nope/v0.mp4", "", ".."])
def test_names_that_can_be_none_are_missing(videos, name):
    listing = Listing()
    assert not listing(videos / name)
    assert listing(videos / "v0.mp4")


def test_a_video_may_be_a_link(videos, tmp_path):
    (tmp_path / "a.mp4").symlink_to(videos / "v0.mp4")
    (tmp_path / "b.mp4").symlink_to(videos / "nope.mp4")
    (tmp_path / "c.mp4").mkdir()
    listing = Listing()
    assert [listing(tmp_path / f"{name}.mp4") for name in "abc"] == [True, False, False]
