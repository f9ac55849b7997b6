"""Shards in a bucket: the very batches of local files, whatever the store does meanwhile."""

import hashlib
import threading
from pathlib import Path

import pytest
import s3fs
from faulty_store import FaultyStore
from gloo_ranks import run_ranks

from datamodules.manifest import Manifest
from datamodules.pretrain import PretrainDataModule
from datamodules.stream.cache import FileCache
from datamodules.stream.reader import Corpus, SampleReader
from datamodules.stream.retry import Retry, StorageUnavailable
from datamodules.stream.stores import Fetcher, read_bytes

QUICK = Retry(patience_s=200.0, first_s=0.05, longest_s=0.5)


@pytest.fixture
def credentials(monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@pytest.fixture
def store(credentials, monkeypatch):
    store = FaultyStore()
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)  # as for any store that is not Amazon's
    s3fs.S3FileSystem.clear_instance_cache()  # which knows another test's address
    yield store
    store.stop()


def digest(batch) -> tuple[list[str], list[int], str]:
    video = hashlib.sha256(batch.video.numpy().tobytes()).hexdigest()
    return batch.keys, batch.clip_index.tolist(), video


def rank_batches(rank: int, location: str, cache_dir: str | None, num_workers: int):
    """One rank's batches of an epoch, and how many samples were damaged."""
    module = PretrainDataModule(
        [location],
        global_batch_size=4,
        num_frames=2,
        image_size=32,
        num_workers=num_workers,
        cache_dir=cache_dir,
    )
    if module.cache is not None:
        module.cache.fetcher = Fetcher(QUICK, timeout_s=10.0)
    loader = module.train_dataloader()
    found = [digest(batch) for batch in loader]
    module.teardown("fit")
    return found, module.fault_monitor.num_damaged


@pytest.mark.distributed
@pytest.mark.parametrize("away_s", [2.0, pytest.param(60.0, marks=pytest.mark.slow)])
def test_two_ranks_under_faults_see_the_batches_of_local_files(store, shards, tmp_path, away_s):
    place = store.upload(shards, "set")
    expected = run_ranks(2, rank_batches, str(shards), None, 0)
    store.throttled, store.cut, store.latency_s = 1, 1, 0.05
    pause = threading.Timer(0.2, store.away, [away_s])
    pause.start()
    found = run_ranks(2, rank_batches, place, str(tmp_path), 1)
    pause.join()
    assert found == expected
    assert [damaged for _, damaged in found] == [0, 0]
    # each file came whole once, for both ranks and all their processes: at the third try
    names = [name for s in Manifest.load(shards).shards for name in (s.name, s.index)]
    assert sorted(store.asked) == sorted(3 * names)
    assert store.faults == {"throttled": len(names), "cut": len(names)}
    assert len(list(tmp_path.glob("*.tmp"))) == 0


def test_a_store_that_stays_away_ends_with_its_name(store, shards, tmp_path):
    place = store.upload(shards, "set")
    store.stop()
    impatient = Fetcher(Retry(patience_s=0.5, first_s=0.1), timeout_s=5.0)
    with pytest.raises(StorageUnavailable, match=r"s3://shards/set/manifest.json: no answer in"):
        impatient.copy(place, tmp_path / "x")
    store.start()
    impatient.copy(place, tmp_path / "x")
    impatient.copy(place.replace("manifest.json", "shard-000000.tar"), tmp_path / "tar")
    assert store.asked == ["shard-000000.tar"]  # one request a file: see planning/store.py
    manifest = Manifest.load(place)
    cache = FileCache(tmp_path / "cache", 10**9, impatient)
    reader = SampleReader(Corpus((manifest,), (1.0,)), cache)
    assert reader.read(0, 0).key
    store.stop()
    # not a damaged sample, which would be replaced by another
    with pytest.raises(StorageUnavailable):
        reader.read(1, 0)
    store.start()
    assert reader.read(1, 0).key  # nothing was given up
    assert (tmp_path / "x").read_bytes() == (shards / "manifest.json").read_bytes()


def test_what_is_not_there_or_not_allowed_is_said_at_once(store, shards, monkeypatch):
    store.upload(shards, "set")
    with pytest.raises(ValueError, match=r"no manifest at s3://shards/nope/manifest\.json"):
        Manifest.load("s3://shards/nope/manifest.json")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", "/nonexistent")
    s3fs.S3FileSystem.clear_instance_cache()  # which knows the keys
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(PermissionError, match="NoCredentials"):
        read_bytes("s3://shards/set/manifest.json")


def test_a_silent_store_is_given_up(store, shards, tmp_path):
    place = store.upload(shards, "set")
    store.latency_s = 30.0
    tar = place.replace("manifest.json", "shard-000000.tar")
    fetcher = Fetcher(Retry(patience_s=0.1, first_s=0.1), timeout_s=0.5)
    with pytest.raises(StorageUnavailable, match=r"nothing came|timeout|Timeout"):
        fetcher.copy(tar, Path(tmp_path / "x"))
    assert not (tmp_path / "x").exists()
