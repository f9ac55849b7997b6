"""Damaged inputs: none reaches a batch, none kills or hangs the run, each is named and counted."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_records
from test_shards import foreign_tar
from torch.utils.data._utils import signal_handling

import datamodules.stream.clips
from datamodules.manifest import Manifest
from datamodules.module import RetrievalSplit
from datamodules.pretrain import PretrainDataModule
from datamodules.retrieval import RetrievalDataModule
from datamodules.shards import LAYOUTS, EncodeOptions, build_shards, index_tars
from datamodules.stream.faults import FaultMonitor, TooManyDamagedSamples


def pretrain(location, **kwargs):
    settings = {"num_workers": 0, "global_batch_size": 4, "num_frames": 2, "image_size": 16}
    return PretrainDataModule([str(location)], **{**settings, **kwargs})


def damage_sample(kind: str, path: Path, offset: int, size: int, generator: random.Random) -> None:
    """Damage a stored clip in its tar, in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        data = bytearray(file.read(size))
        if kind == "emptied":
            data[:] = bytes(size)
        elif kind == "cut":
            keep = generator.randrange(size)
            data[keep:] = bytes(size - keep)
        else:
            # the moov box, the header, lies behind the payload
            moov = data.rindex(b"moov")
            first, last = (moov, size) if kind.startswith("header") else (40, moov)
            for _ in range(10 if kind.endswith("ten bits") else 1):
                place = generator.randrange(first, last)
                data[place] ^= 1 << generator.randrange(8)
        file.seek(offset)
        file.write(data)


KINDS = (
    "header, one bit", "header, ten bits", "payload, one bit", "payload, ten bits", "cut", "emptied"
)  # fmt: skip


@pytest.fixture(scope="module")
def large(tmp_path_factory, videos) -> Path:
    """1,280 clips in 16 shards, made of one shard's 80 by copying."""
    folder = tmp_path_factory.mktemp("large")
    tiny = EncodeOptions(short_side=16, preset="ultrafast")
    source = folder / "source"
    build_shards(
        make_records(),
        videos=videos,
        layout=LAYOUTS["whole"],
        output=source,
        options=tiny,
        samples_per_shard=32,
    )
    for number in range(40):
        shutil.copy(source / "shard-000000.tar", folder / f"copy-{number:02d}.tar")
    shutil.rmtree(source)
    index_tars(folder, num_workers=2, probe=False)
    return folder


def test_a_thousand_damaged_samples(large, tmp_path):
    folder = shutil.copytree(large, tmp_path / "set")
    manifest, generator = Manifest.load(folder), random.Random(0)
    damaged: set[tuple[int, int]] = set()
    # whole tars: missing, cut in the middle, and without a usable index
    (folder / manifest.shards[0].name).unlink()
    damaged |= {(0, row) for row in range(32)}
    os.truncate(
        folder / manifest.shards[1].name, int(manifest.load_index(1).rows[8]["video_offset"]) + 9
    )
    damaged |= {(1, row) for row in range(8, 32)}
    (folder / manifest.shards[2].index).write_bytes(b"no index")
    damaged |= {(2, row) for row in range(32)}
    while len(damaged) < 1000:
        shard, row = generator.randrange(3, 40), generator.randrange(32)
        if (shard, row) not in damaged:
            place = manifest.load_index(shard).rows[row]
            damage_sample(
                KINDS[len(damaged) % len(KINDS)],
                folder / manifest.shards[shard].name,
                int(place["video_offset"]),
                int(place["video_bytes"]),
                generator,
            )
            damaged.add((shard, row))
    log, handler = tmp_path / "log", logging.FileHandler(tmp_path / "log")
    logging.getLogger("datamodules").addHandler(handler)
    try:
        module = pretrain(folder, num_workers=2, global_batch_size=16, max_fault_rate=1.0)
        seen = torch.cat([batch.clip_index for batch in module.train_dataloader()]).tolist()
    finally:
        logging.getLogger("datamodules").removeHandler(handler)
    assert len(seen) == 1280
    assert not {divmod(index, 32) for index in seen} & damaged
    told = log.read_text().splitlines()
    lines = [line for line in told if line.startswith("damaged sample")]
    assert module.fault_monitor.num_damaged == len(lines) >= 1000 - 64
    assert len({line.split(":")[0] for line in lines}) == 1000 - 64
    # those of the tars that are missing, or have no index, are told of as tars, once a worker
    assert module.fault_monitor.num_lost == 64
    assert module.fault_monitor.missing_shards == [0, 2]
    assert 2 <= len([line for line in told if " cannot be used: " in line]) <= 4


def test_the_substitute_is_the_same_on_any_number_of_workers(shards, tmp_path):
    folder = shutil.copytree(shards, tmp_path / "set")
    manifest = Manifest.load(folder)
    for shard in range(4):
        place = manifest.load_index(shard).rows[2]
        name, generator = folder / manifest.shards[shard].name, random.Random(0)
        offset, size = int(place["video_offset"]), int(place["video_bytes"])
        damage_sample("emptied", name, offset, size, generator)
    runs = [
        torch.cat([batch.clip_index for batch in module.train_dataloader()])
        for module in (pretrain(folder, num_workers=n, max_fault_rate=1.0) for n in (0, 2))
    ]
    assert torch.equal(*runs) and len(set(runs[0].tolist())) == 28


def test_too_many_damaged_samples_end_the_run(large, tmp_path):
    folder = shutil.copytree(large, tmp_path / "set")
    for number in range(10):
        (folder / f"copy-{number:02d}.tar").unlink()
    with pytest.raises(TooManyDamagedSamples, match=r"max_fault_rate=0.1.*shards verify"):
        list(pretrain(folder, max_fault_rate=0.1, num_workers=2).train_dataloader())
    with pytest.raises(ValueError, match="max_fault_rate is 2"):
        FaultMonitor(0, 2)


def test_damaged_clips_are_left_out_of_an_evaluation(shards, tmp_path, caplog):
    folder = shutil.copytree(shards, tmp_path / "set")
    place = Manifest.load(folder).load_index(1).rows[2]
    name = folder / "shard-000001.tar"
    damage_sample(
        "emptied", name, int(place["video_offset"]), int(place["video_bytes"]), random.Random(0)
    )
    split = RetrievalSplit(str(folder))
    module = RetrievalDataModule(
        split, split, num_workers=0, eval_batch_size=8, num_frames=2, image_size=16,
        max_fault_rate=1.0,
    )  # fmt: skip
    batches = list(module.val_dataloader()[0])
    index = torch.cat([batch.clip_index[batch.mask] for batch in batches]).tolist()
    assert index == [k for k in range(32) if k != 11]
    assert "000000011 (clip v1_3)" in caplog.text and "left out" in caplog.text


def test_a_killed_loader_worker_is_reported_with_its_sample(shards, monkeypatch):
    decode = datamodules.stream.clips.decode_frames

    def deadly(data, *args):
        deadly.count += 1
        if deadly.count == 6:
            os.kill(os.getpid(), signal.SIGSEGV)
        return decode(data, *args)

    deadly.count = 0
    monkeypatch.setattr(datamodules.stream.clips, "decode_frames", deadly)
    with pytest.raises(RuntimeError, match=r"worker 0 \(exit code -11\) was at sample 0000000\d\d"):
        list(pretrain(shards, num_workers=1).train_dataloader())


def test_a_worker_outlives_a_signal_that_comes_while_it_starts(shards, monkeypatch):
    """The trainer stops on SIGTERM by itself; a worker that died of it would end the run."""
    start = signal_handling._set_worker_signal_handlers  # the first thing that a worker does

    def struck() -> None:
        start()
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(signal_handling, "_set_worker_signal_handlers", struck)
    settings = {"num_frames": 1, "image_size": 32, "num_workers": 2}
    module = PretrainDataModule([str(shards)], global_batch_size=8, **settings)
    assert len(list(module.train_dataloader())) == 4
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())  # in this process nothing is held back


def test_a_process_with_workers_left_ends(shards):
    """As a run does that was stopped: Python waits for its workers at exit."""
    program = f"""
from datamodules.pretrain import PretrainDataModule
data = PretrainDataModule([{str(shards)!r}], global_batch_size=4, num_frames=1, image_size=32,
                          num_workers=2)
batches = iter(data.train_dataloader())
next(batches)
raise SystemExit(85)
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 85


def test_untrusted_tars_are_probed_where_a_crash_does_no_harm(videos, tmp_path):
    """Without a checksum the decoder itself meets the damage; some of these files kill it."""
    video, generator = (videos / "v0.mp4").read_bytes(), random.Random(1)
    moov = video.rindex(b"moov")
    samples = {}
    for number in range(60):
        data = bytearray(video)
        for _ in range(10):
            data[generator.randrange(moov, len(data))] ^= 1 << generator.randrange(8)
        samples[f"{number:03d}"] = {"mp4": bytes(data), "txt": b"x"}
    foreign_tar(tmp_path / "a.tar", samples)
    report = index_tars(tmp_path)
    assert report.num_clips + report.num_rejected == 60 and report.num_rejected > 10
