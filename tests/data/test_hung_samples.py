"""Clips on which decord never ends: named, replaced, not met again, and no process is left."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import write_video
from small_recipe_of_tars import RECIPE
from test_shards import foreign_tar
from videos_of_every_kind import Kind, cut, draw

from datamodules.manifest import Manifest
from datamodules.shards import index_tars
from datamodules.stream.clips import ClipOptions, TrainStream, own_text
from datamodules.stream.faults import FaultMonitor
from datamodules.stream.hung import LIST_NAME, DecodeWatch, HungSamples
from datamodules.stream.loader import PlaceLoader, _Places
from datamodules.stream.order import StreamOrder
from datamodules.stream.reader import Corpus, SampleReader

pytest.importorskip("decord", reason="it is decord that hangs")


def copied(folder: Path, name: str, count: int, first: int) -> bytes:
    """A cut that an edit list makes of a video with one key frame, as stream copies are."""
    kind = Kind(
        name,
        size=(64, 48),
        options={"crf": "20", "g": "250", "bf": "0", "preset": "veryfast"},
        count=count,
        draw=lambda number, *size: draw(number % 64, *size),
        after=lambda path: cut(path, first),
    )
    return kind.write(folder).path.read_bytes()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("clips")
    return {
        "hanging": copied(folder, "hanging", 260, 200),
        "copied": copied(folder, "copied", 90, 40),
        "good": write_video(folder / "good.mp4", 1.0, size=(64, 48)).read_bytes(),
    }


def samples(names: list[str], clips: dict[str, bytes]) -> dict[str, dict[str, bytes]]:
    text = b"C opens the door"
    return {f"{k:02d}-{name}": {"mp4": clips[name], "txt": text} for k, name in enumerate(names)}


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory, clips: dict[str, bytes]) -> Path:
    """A set that nobody checked: three hanging clips and three damaged ones among thirty."""
    folder = tmp_path_factory.mktemp("tars")
    names = ["good"] * 30
    names[4] = names[13] = names[22] = "hanging"
    foreign_tar(folder / "a.tar", samples(names, clips))
    index_tars(folder, probe=False, decoder="decord")
    rows = Manifest.load(folder).load_index(0).rows
    with (folder / "a.tar").open("r+b") as tar:
        for row in (7, 16, 25):
            tar.seek(int(rows[row]["video_offset"]) + 40)
            tar.write(b"damage")
    return folder


def stream(tars: Path, watch: DecodeWatch) -> TrainStream:
    corpus = Corpus.load([str(tars)])
    order = StreamOrder(corpus.counts, global_batch_size=6)
    options, monitor = ClipOptions(4, 16), FaultMonitor(1, 1.0)
    reader = SampleReader(corpus)
    return TrainStream(reader, order, options, own_text, monitor, 0, 1, watch)


def test_the_index_rejects_by_name_what_the_decoder_would_get_wrong(clips, tmp_path) -> None:
    names = ["good", "hanging", "copied", "good"]
    foreign_tar(tmp_path / "a.tar", samples(names, clips))
    report = index_tars(tmp_path, decoder="decord", timeout_s=3)
    reasons = {
        reject["clip_id"]: reject["reason"]
        for reject in map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    }
    assert report.num_clips == 2 and set(reasons) == {"01-hanging", "02-copied"}
    assert reasons["01-hanging"] == "hung: not done within 3 s"
    assert "is not the one that plays" in reasons["02-copied"]
    # PyAV heeds edit lists: all four are right, and the manifest says with what
    assert index_tars(tmp_path).num_clips == 4
    assert Manifest.load(tmp_path).options["decoder"] == "pyav"
    with pytest.raises(ValueError, match="checked with 'pyav'"):
        order = StreamOrder([4], global_batch_size=2)
        reader, options = SampleReader(Corpus.load([str(tmp_path)])), ClipOptions(decoder="decord")
        TrainStream(reader, order, options, own_text, FaultMonitor(0, 1.0), 0, 1)


def test_rejected_clips_may_be_stored_anew(clips, tmp_path) -> None:
    from videos_of_every_kind import read

    from datamodules.shards import EncodeOptions
    from datamodules.video.decode import decode_frames

    names = ["good", "copied", "good"]
    foreign_tar(tmp_path / "a.tar", {**samples(names, clips), "bad": {"mp4": b"x", "txt": b"x"}})
    small = EncodeOptions(short_side=48, crf=12)
    for _ in range(2):  # again: what was stored anew is no input
        report = index_tars(tmp_path, decoder="decord", timeout_s=3, reencode=small)
        assert report.num_clips == 3 and report.num_rejected == 1
    manifest = Manifest.load(tmp_path)
    assert [shard.name for shard in manifest.shards] == ["a.tar", "a.reencoded.tar"]
    reader = SampleReader(Corpus.load([str(tmp_path)]))
    sample = reader.read(1, 0)
    assert sample.record.clip_id == "01-copied" and sample.record.texts == ("C opens the door",)
    for decoder in ("decord", "pyav"):
        shown = [read(frame)[0] for frame in decode_frames(sample.video, 5, None, decoder)]
        assert shown == [(40 + 5 + 10 * k) % 64 for k in range(5)]


def test_a_hanging_sample_costs_its_worker_once(clips, tmp_path, caplog) -> None:
    names = ["good"] * 12
    names[5] = "hanging"
    foreign_tar(tmp_path / "a.tar", samples(names, clips))
    index_tars(tmp_path, probe=False, decoder="decord")
    path = tmp_path / LIST_NAME
    watch = DecodeWatch(1, 1.0, HungSamples(path, "x"))
    data = stream(tmp_path, watch)
    places = [(0, step, 0) for step in range(2)]
    loader = PlaceLoader(
        data, lambda: places, 2, num_workers=1, monitor=data.monitor, watch=watch,
        describe=data.reader.describe,
    )  # fmt: skip
    torch.manual_seed(3)
    first = [batch.keys for batch in loader]
    drawn = torch.rand(1)
    assert "hanging" not in str(first) and sum(map(len, first)) == 12
    assert "decoding of 05-hanging (clip 05-hanging)" in caplog.text
    assert [json.loads(line)["row"] for line in path.open()] == [5]
    # a later start knows it, also where nobody could watch; in another set it is another one
    path.write_text(path.read_text() + '{"cut sho')
    again = stream(tmp_path, DecodeWatch(0, math.inf, HungSamples(path, "x")))
    assert [again[place].keys for place in places] == first
    assert (0, 5) not in HungSamples(path, "y")
    # what the model draws does not depend on how often the workers were started
    torch.manual_seed(3)
    whole = PlaceLoader(data, lambda: places, 2, num_workers=1, watch=watch)
    assert [batch.keys for batch in whole] == first and torch.equal(torch.rand(1), drawn)


def test_a_worker_that_hangs_before_it_is_watched_is_replaced(clips, tmp_path, monkeypatch) -> None:
    names = ["good"] * 12
    names[5] = "hanging"
    foreign_tar(tmp_path / "a.tar", samples(names, clips))
    index_tars(tmp_path, probe=False, decoder="decord")
    watch = DecodeWatch(1, 1.0)
    over = watch.over

    def late(*arguments):
        while not ((0, 5) in watch.hung or in_hanging()):
            time.sleep(0.01)
        return over(*arguments)

    def in_hanging() -> bool:
        _, row, turn = watch._table[0].tolist()
        return row == 5 and turn % 2 == 1

    monkeypatch.setattr(watch, "over", late)
    data = stream(tmp_path, watch)
    loader = PlaceLoader(data, lambda: [(0, 0, 0), (0, 1, 0)], 2, num_workers=1, watch=watch)
    keys = [key for batch in loader for key in batch.keys]
    assert len(keys) == 12 and "hanging" not in str(keys) and (0, 5) in watch.hung


def processes_of(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return [pid for pid in found if "Z (" not in Path(f"/proc/{pid}/status").read_text()]


@pytest.mark.slow  # three starts of the workers
def test_fit_ends_well_over_hanging_copied_and_damaged_clips(tars, clips, tmp_path) -> None:
    """Nine bad clips: three hang, three were copied so that decord shows others, three rot."""
    checked = tmp_path / "checked"
    checked.mkdir()
    names = ["good"] * 8 + ["copied"] * 3
    foreign_tar(checked / "b.tar", samples(names, clips))
    index_tars(checked, decoder="decord", timeout_s=3)
    rejected = (checked / "rejects.jsonl").read_text()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(tars=tars, checked=checked))
    words = ["fit", "--config", str(recipe), f"--run_dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "lightning_modules.cli.main", *words]
    done = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        told = done.communicate(timeout=240)[0]
    except subprocess.TimeoutExpired:
        os.killpg(done.pid, signal.SIGKILL)
        raise
    assert done.returncode == 0, told[-3000:]
    for row in (4, 13, 22):
        assert f"damaged sample {row:02d}-hanging (clip {row:02d}-hanging)" in told
    for row in (7, 16, 25):
        assert f"damaged sample {row:02d}-good (clip {row:02d}-good)" in told
    assert [f"{row:02d}-copied" in rejected for row in (8, 9, 10)] == [True] * 3
    assert len((tmp_path / "run" / LIST_NAME).read_text().splitlines()) == 3
    assert processes_of(done.pid) == []


PROGRAM = """
import sys, threading, time
from datamodules.pretrain import PretrainDataModule
data = PretrainDataModule([sys.argv[1]], global_batch_size=6, num_frames=4, image_size=16,
                          num_workers=1, max_fault_rate=1.0, decode_timeout_s=600)
loader = data.train_dataloader()
threading.Thread(target=lambda: list(loader), daemon=True).start()
last, since = None, time.monotonic()
while time.monotonic() - since < 1.5:  # the worker has been at one clip for so long
    now = loader.watch._table.tolist()
    if now != last or now[0][2] % 2 == 0:
        last, since = now, time.monotonic()
    time.sleep(0.05)
print("stuck", flush=True)
if sys.argv[2] == "wait":
    time.sleep(60)
raise SystemExit(85)
"""


@pytest.mark.parametrize("ending", ["killed", pytest.param("leaves", marks=pytest.mark.slow)])
def test_a_stuck_worker_does_not_outlive_its_trainer(tars, tmp_path, ending) -> None:
    words = ["wait" if ending == "killed" else "go"]
    run = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tars), *words],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None and run.stdout.readline() == "stuck\n"
    assert len(processes_of(run.pid)) >= 2
    if ending == "killed":
        run.send_signal(signal.SIGKILL)
    assert run.wait(timeout=60) == (-9 if ending == "killed" else 85)
    deadline = time.monotonic() + 20
    while processes_of(run.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(run.pid) == []


def test_places_whose_batches_never_came_are_visited_again() -> None:
    places = _Places(iter(range(6)))
    first = iter(places)
    assert [next(first) for _ in range(4)] == [0, 1, 2, 3]
    places.done()
    second = iter(places)
    assert [next(second) for _ in range(2)] == [1, 2]
    places.done()
    assert list(places) == [2, 3, 4, 5]


def test_a_limit_must_be_one() -> None:
    with pytest.raises(ValueError, match="decode_timeout_s is 0"):
        DecodeWatch(1, 0)
