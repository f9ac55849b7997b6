"""Building shards: timing, layouts, rejects, reproducible bytes, resumption, repair."""

import dataclasses
import faulthandler
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import signal
import tarfile
import time
from pathlib import Path

import decord
import numpy as np
import pytest
import webdataset
from conftest import FAST, make_records, write_video

from datamodules.manifest import ClipRecord, Manifest, load_records
from datamodules.shards import LAYOUTS, EncodeOptions, VideoLayout, build_shards, index_tars
from datamodules.shards.estimate import estimate_build
from datamodules.shards.plan import BuildPlan
from datamodules.shards.verify import repair, verify
from datamodules.stream.reader import Corpus, SampleReader
from datamodules.video.encode import encode_clip
from datamodules.video.pieces import RejectedClip
from datamodules.video.workers import Job, run_jobs
from lightning_modules.cli.shards import main


def files(folder: Path) -> dict[str, str]:
    """Name to hash of everything that a build leaves, temporary and lock files aside."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if not path.name.startswith(".")
    }


def shown_frames(data: bytes) -> list[int]:
    """Which source frames a clip shows, read from their brightness."""
    frames = decord.VideoReader(io.BytesIO(data))[:].asnumpy()
    return [round((float(frame.mean()) - 8) / 4) for frame in frames]


def spans(root, layout, video_id, start_s, end_s, **options):
    pieces = layout.pieces(Path(root), video_id, start_s, end_s)
    return encode_clip(pieces, start_s, end_s, dataclasses.replace(FAST, **options))


def test_a_clip_shows_what_the_source_showed_at_its_times(tmp_path):
    write_video(tmp_path / "v.mp4", seconds=4)
    whole = LAYOUTS["whole"]
    clip = spans(tmp_path, whole, "v", 1.2, 2.0)
    assert shown_frames(clip.data) == [12, 13, 14, 15, 16, 17, 18, 19]
    assert (clip.num_frames, clip.fps, clip.height, clip.width) == (8, 10.0, 48, 60)
    # between two frames the earlier one is on the screen
    assert shown_frames(spans(tmp_path, whole, "v", 1.25, 1.65).data) == [12, 13, 14, 15]
    # a lower rate: 1.0, 1.4, 1.8
    assert shown_frames(spans(tmp_path, whole, "v", 1.0, 2.2, fps=2.5).data) == [10, 14, 18]
    # a higher rate than the source's is not made up
    assert spans(tmp_path, whole, "v", 0.0, 1.0, fps=60).num_frames == 10
    # a span shorter than a frame still has one
    assert shown_frames(spans(tmp_path, whole, "v", 3.05, 3.06).data) == [30]


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (VideoLayout("{video_id}/{index}.mp4", 1), "v/{index}.mp4"),
        (VideoLayout("{video_id}.mp4/{start}.mp4", 1), "v.mp4/{index}.mp4"),
    ],
)
def test_a_clip_may_span_chunks(tmp_path, layout, name):
    for index in range(3):
        write_video(tmp_path / name.format(index=index), seconds=1, first=10 * index)
    assert shown_frames(spans(tmp_path, layout, "v", 0.7, 2.2).data) == [*range(7, 22)]
    assert shown_frames(spans(tmp_path, layout, "v", 1.0, 2.0).data) == [*range(10, 20)]
    # the video ends at 3 s; more than half of the clip is there
    assert shown_frames(spans(tmp_path, layout, "v", 2.5, 3.2).data) == [*range(25, 30)]
    with pytest.raises(RejectedClip, match=r"short: the source covers 0.5"):
        spans(tmp_path, layout, "v", 2.5, 4.5)
    with pytest.raises(RejectedClip, match=r"missing: .*3.mp4"):
        spans(tmp_path, layout, "v", 3.0, 4.0)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("whole", ["P01_07.mp4"]),
        ("egovlp", ["P01_07/1.mp4", "P01_07/2.mp4"]),
        ("lavila", ["P01_07.mp4/900.mp4", "P01_07.mp4/1200.mp4"]),
        ("avion", ["P01_07.mp4/1185.mp4", "P01_07.mp4/1200.mp4"]),
        ("ek100", ["P01/P01_07.MP4"]),
        ("ek100_avion", ["P01/P01_07.MP4/1185.MP4", "P01/P01_07.MP4/1200.MP4"]),
    ],
)
def test_layouts_of_the_field(tmp_path, family, expected):
    for name in expected:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    pieces = LAYOUTS[family].pieces(tmp_path, "P01_07", 1199.0, 1201.0)
    assert [str(piece.source.relative_to(tmp_path)) for piece in pieces] == expected


def test_layouts_that_make_no_sense_are_refused():
    for pattern, chunk_s in (("{video_id}.mp4", 15), ("{video_id}/{start}.mp4", None)):
        with pytest.raises(ValueError, match="needs a chunk length"):
            VideoLayout(pattern, chunk_s)
    with pytest.raises(ValueError, match="unknown field"):
        VideoLayout("{video}.mp4")


def test_tars_are_plain_webdataset(shards, records):
    tars = sorted(map(str, shards.glob("*.tar")))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [json.loads(sample["json"])["clip_id"] for sample in samples] == [
        record.clip_id for record in records
    ]
    for sample in samples:
        assert hashlib.sha256(sample["mp4"]).hexdigest() == json.loads(sample["json"])["sha256"]


def test_index_and_tar_agree(shards, records):
    manifest = Manifest.load(shards)
    assert [s.num_samples for s in manifest.shards] == [9, 9, 9, 5]
    assert load_records(manifest) == records
    reader = SampleReader(Corpus.load([str(shards)]))
    for number, shard in enumerate(manifest.shards):
        with tarfile.open(shards / shard.name) as tar:
            stored = {m.name: tar.extractfile(m).read() for m in tar}
        rows = manifest.load_index(number).rows
        for row in range(shard.num_samples):
            sample = reader.read(number, row)
            assert sample.video == stored[f"{sample.key}.mp4"]
            begin, size = int(rows[row]["json_offset"]), int(rows[row]["json_bytes"])
            raw = (shards / shard.name).read_bytes()[begin : begin + size]
            assert raw == stored[f"{sample.key}.json"]


def build(records, videos, output, **kwargs):
    settings = {"layout": LAYOUTS["whole"], "options": FAST, "samples_per_shard": 9}
    return build_shards(records, videos=videos, output=output, **{**settings, **kwargs})


def test_parts_give_the_same_bytes_as_one_build(shards, records, videos, tmp_path):
    first = build(records, videos, tmp_path / "set", part=(1, 2))
    assert first.manifest is None and first.num_shards == 2
    second = build(records, videos, tmp_path / "set", part=(0, 2))
    assert second.manifest is not None
    assert files(tmp_path / "set") == files(shards)


def test_a_build_killed_ten_times_ends_in_the_same_bytes(shards, records, videos, tmp_path):
    output, generator = tmp_path / "set", random.Random(0)
    context = multiprocessing.get_context("fork")
    kills = 0
    while True:
        process = context.Process(
            target=build, args=(records, videos, output), kwargs={"num_workers": 2}
        )
        process.start()
        if kills == 10:
            break
        # wait until it works on a clip, then for a part of the time that a shard takes
        while process.is_alive() and not any(output.glob(".*.tmp")):
            time.sleep(0.001)
        time.sleep(generator.random() * 0.3)
        process.kill()
        process.join()
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode == 0 or kills == 5:  # start over, so that early shards are hit as well
            shutil.rmtree(output)
    process.join(120)
    assert process.exitcode == 0
    assert files(output) == files(shards)


def test_clips_that_cannot_be_made_are_listed_with_the_reason(videos, tmp_path):
    good = ClipRecord("good", "v0", 0.0, 1.0, ("t",))
    bad = {
        "gone": ("nope", 0.0, 1.0, "missing: nope.mp4"),
        "late": ("v0", 50.0, 51.0, "short: the source covers 0.00 s of 50.00-51.00 s"),
        "empty": ("v0", 2.0, 2.0, "empty: the span is 2.00-2.00 s"),
        "text": ("broken", 0.0, 1.0, "unreadable: "),
        "zero": ("zero", 0.0, 1.0, "unreadable: "),
    }
    folder = tmp_path / "videos"
    shutil.copytree(videos, folder)
    (folder / "broken.mp4").write_text("no video at all")
    (folder / "zero.mp4").touch()
    clips = [good] + [ClipRecord(k, v, s, e, ("t",)) for k, (v, s, e, _) in bad.items()]
    report = build(clips, folder, tmp_path / "set")
    assert (report.num_clips, report.num_rejected) == (1, 5)
    lines = (tmp_path / "set" / "rejects.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert line["reason"].startswith(bad[line["clip_id"]][3])
    with pytest.raises(ValueError, match="none of the 5 clips could be made"):
        build(clips[1:], folder, tmp_path / "none")


def test_a_clip_that_kills_the_decoder_is_rejected_and_the_rest_survives():
    def work(job, begin):
        done = []
        for name in "abc":
            begin(name)
            if name in job.crashed:
                continue
            if name == "b":
                faulthandler.disable()  # pytest's would print a report
                os.kill(os.getpid(), signal.SIGSEGV)
            done.append(name)
        return done, job.crashed

    results = [e.result for e in run_jobs(work, [Job(0, None), Job(1, None)], 2) if e.item is None]
    crashed = {"b": "crashed the decoder (SIGSEGV)"}
    assert results == [(["a", "c"], crashed)] * 2


def test_a_worker_killed_from_outside_is_started_anew_but_not_for_ever(tmp_path):
    def work(job, begin):
        begin("a")
        if not (tmp_path / "once").exists():
            (tmp_path / "once").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return job.crashed

    assert [e.result for e in run_jobs(work, [Job(0, None)], 1) if e.item is None] == [{}]

    def hopeless(job, begin):
        begin("a")
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RuntimeError, match="ended with exit code -9 4 times"):
        list(run_jobs(hopeless, [Job(0, None)], 1))


def test_errors_in_workers_reach_the_caller():
    def mistake(job, begin):
        raise ValueError("yours")

    def fault(job, begin):
        raise KeyError("ours")

    with pytest.raises(ValueError, match="yours"):
        list(run_jobs(mistake, [Job(0, None)], 1))
    with pytest.raises(ValueError, match="number of workers is 0"):  # it would wait for ever
        list(run_jobs(mistake, [Job(0, None)], 0))
    with pytest.raises(RuntimeError, match="KeyError"):
        list(run_jobs(fault, [Job(0, None)], 1))


def test_a_folder_holds_one_build(shards, records, videos, tmp_path):
    output = shutil.copytree(shards, tmp_path / "set")
    with pytest.raises(ValueError, match=r"another build|another options.crf"):
        build(records, videos, output, options=dataclasses.replace(FAST, crf=30))
    with pytest.raises(ValueError, match=r"another source.clips_sha256"):
        build([dataclasses.replace(records[0], end_s=0.9), *records[1:]], videos, output)
    build(records, videos, output)  # nothing left to do
    assert files(output) == files(shards)


def test_the_same_part_does_not_run_twice_at_a_time(records, videos, tmp_path):
    with (tmp_path / ".part-0-of-1.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="being built by another process"):
            build(records, videos, tmp_path)


def test_mistakes_are_refused(records, videos, tmp_path):
    with pytest.raises(ValueError, match="annotations are empty"):
        build([], videos, tmp_path)
    with pytest.raises(ValueError, match="'v0_0' occurs twice"):
        build([records[0], records[0]], videos, tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        build(records, tmp_path / "nope", tmp_path)
    for name, value in (("crf", 99), ("gop", 0), ("short_side", 2), ("preset", "x"), ("fps", 0)):
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            EncodeOptions(**{name: value})


def test_a_dry_run_counts_and_estimates_without_writing(records, videos, tmp_path):
    clips = [*records, ClipRecord("x", "nope", 0, 1, ("t",))]
    plan = BuildPlan(clips, videos, LAYOUTS["whole"], tmp_path / "set", FAST, 9)
    estimate = estimate_build(plan, num_trials=8)
    assert estimate.num_clips == 32 and estimate.num_rejected == {"missing": 1}
    assert estimate.hours == pytest.approx(32 * 0.8 / 3600)
    build(records, videos, tmp_path / "set")
    size = sum(path.stat().st_size for path in (tmp_path / "set").glob("*.tar"))
    assert 0.5 < estimate.num_bytes / size < 2  # tiny clips: the tar's overhead dominates
    assert estimate.num_trials == 8


def foreign_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_existing_tars_get_a_manifest(videos, tmp_path):
    video = (videos / "v0.mp4").read_bytes()
    foreign_tar(
        tmp_path / "00000.tar",
        {
            "0001": {"mp4": video, "txt": b" opens \n", "json": b'{"url": "u"}'},
            "0002": {"mp4": video, "json": b'{"caption": "closes"}'},
            "0003": {"json": b'{"caption": "no video"}'},
            "0004": {"mp4": video},
            "0005": {"mp4": b"garbage", "txt": b"x"},
            "0006": {"mp4": video, "json": b"{"},
        },
    )
    report = index_tars(tmp_path)
    assert (report.num_clips, report.num_rejected) == (2, 4)
    manifest = Manifest.load(tmp_path)
    assert [record.texts for record in load_records(manifest)] == [("opens",), ("closes",)]
    reader = SampleReader(Corpus.load([str(tmp_path)]))
    assert reader.read(0, 1).video == video
    rejects = [json.loads(r) for r in (tmp_path / "rejects.jsonl").read_text().splitlines()]
    reasons = [reject["reason"].split(":")[0] for reject in rejects]
    assert reasons == ["no video", "no text", "undecodable", "its json cannot be read"]


def test_indexing_our_own_tars_gives_their_index(shards, tmp_path):
    for path in shards.glob("*.tar"):
        shutil.copy(path, tmp_path)
    index_tars(tmp_path, num_workers=2)
    for path in shards.glob("*.index.npz"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("damage", ["cut in data", "cut at header", "garbage header"])
def test_a_damaged_tar_is_indexed_up_to_the_damage_and_named(shards, tmp_path, damage):
    name = "shard-000000.tar"
    data = bytearray((shards / name).read_bytes())
    middle = int(Manifest.load(shards).load_index(0).rows[4]["json_offset"])
    if damage == "garbage header":
        data[middle - 512 : middle] = os.urandom(512)
    else:
        del data[middle + 5 if damage == "cut in data" else middle - 512 :]
    (tmp_path / name).write_bytes(data)
    report = index_tars(tmp_path)
    assert report.num_clips == 4
    (reject,) = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    assert reject["video_id"] == name and "byte" in reject["reason"]


def test_verify_names_damage_and_repair_leaves_it_out(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "set")
    manifest = Manifest.load(folder)
    assert verify(manifest, decode_every=1) == []
    rows = manifest.load_index(1).rows
    with (folder / "shard-000001.tar").open("r+b") as file:
        file.seek(int(rows[3]["video_offset"]) + 100)
        file.write(b"\xff\x00")
    os.truncate(folder / "shard-000002.tar", int(manifest.load_index(2).rows[6]["video_offset"]))
    (folder / "shard-000003.tar").unlink()
    faults = verify(manifest, num_workers=2)
    assert [(fault.shard, fault.row) for fault in faults] == [
        (1, None), (1, 3), (2, None), (2, 6), (2, 7), (2, 8), (3, None)
    ]  # fmt: skip
    assert "checksum" in str(faults[1]) and "000000012" in str(faults[1])
    with pytest.raises(ValueError, match="must lie in"):
        repair(manifest, faults, tmp_path / "elsewhere.json")
    repair(manifest, faults, folder / "mended.json")
    mended = Manifest.load(folder / "mended.json")
    assert [shard.num_samples for shard in mended.shards] == [9, 8, 6]
    assert verify(mended, decode_every=1) == []
    assert mended.fingerprint != manifest.fingerprint


def test_the_command_line_builds_verifies_and_describes(videos, tmp_path, capsys):
    table = tmp_path / "clips.csv"
    lines = [f"{r.clip_id},{r.video_id},{r.start_s},{r.end_s},{r.texts[0]}" for r in make_records()]
    table.write_text("\n".join(["id,video_id,start_second,end_second,text", *lines]) + "\n")
    words = [
        "build", "--annotations", str(table), "--format", "csv", "--columns", "clip_id=id",
        "--videos", str(videos), "--output", str(tmp_path / "set"), "--samples-per-shard", "20",
        "--recipe", "pretrain", "--short-side", "32", "--preset", "ultrafast",
    ]  # fmt: skip
    assert main([*words, "--dry-run"]) == 0 and not (tmp_path / "set").exists()
    assert "32 clips" in capsys.readouterr().out
    assert main(words) == 0
    assert "32 clips in 2 shards" in capsys.readouterr().out
    options = Manifest.load(tmp_path / "set").options
    assert (options["short_side"], options["fps"], options["preset"]) == (32, 15.0, "ultrafast")
    assert main(["info", str(tmp_path / "set"), "--json", str(tmp_path / "info.json")]) == 0
    assert json.loads((tmp_path / "info.json").read_text())["samples"] == 32
    assert main(["verify", str(tmp_path / "set")]) == 0
    (tmp_path / "set" / "shard-000001.tar").unlink()
    assert main(["verify", str(tmp_path / "set")]) == 1
    mended = str(tmp_path / "set" / "mended.json")
    assert main(["verify", str(tmp_path / "set"), "--repair", mended]) == 0
    with pytest.raises(ValueError, match="--format"):
        main(["build", "--annotations", str(table), "--output", "x"])
    with pytest.raises(ValueError, match="unrecognized arguments"):
        main([*words, "--nope"])


def test_the_frames_of_a_batch_are_those_of_its_segments(videos, tmp_path):
    """End to end in time: eight stored frames, four segments, their centres."""
    clip = ClipRecord("a", "v0", 1.0, 1.8, ("t",))
    build([clip], videos, tmp_path / "set")
    reader = SampleReader(Corpus.load([str(tmp_path / "set")]))
    from datamodules.video.decode import decode_frames

    frames = decode_frames(reader.read(0, 0).video, 4)
    brightness = (frames.reshape(4, -1).mean(1) - 8) / 4
    assert np.allclose(brightness, [11, 13, 15, 17], atol=0.5)
