"""Shards behind URLs and commands: retries, silence, damage, and a cache that stays small."""

import functools
import hashlib
import http.server
import io
import multiprocessing
import os
import threading
import time

import pytest
import torch

from datamodules.manifest import Manifest
from datamodules.pretrain import PretrainDataModule
from datamodules.stream.cache import Fetcher, FileCache, is_remote, read_bytes


@pytest.fixture
def server(shards):
    """The shards over HTTP; counts what was asked for."""

    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    handler = functools.partial(Handler, directory=str(shards))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def batches(location, **kwargs):
    module = PretrainDataModule(
        [location], global_batch_size=4, num_frames=2, image_size=32, **{"num_workers": 0, **kwargs}
    )
    return list(module.train_dataloader())


def test_every_kind_of_location_gives_the_same_batches(shards, server, tmp_path, monkeypatch):
    (tmp_path / "aws").write_text(f'#!/bin/sh\ncat "{shards}/${{3##*/}}"\n')
    (tmp_path / "aws").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    expected = batches(str(shards))
    url, _ = server
    places = (f"file:{shards}/manifest.json", f"{url}/manifest.json", f"pipe:cat {shards}/{{}}")
    for number, place in enumerate((*places, "s3://bucket/set/manifest.json")):
        found = batches(place, cache_dir=str(tmp_path / str(number)))
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a.video, b.video) and a.keys == b.keys


def test_workers_share_one_copy(shards, server, tmp_path):
    url, asked = server
    asked.clear()
    batches(url + "/manifest.json", cache_dir=str(tmp_path), num_workers=2)
    tars = [path for path in asked if path.endswith(".tar")]
    assert sorted(tars) == sorted(f"/{s.name}" for s in Manifest.load(shards).shards)


def test_a_remote_manifest_needs_a_cache(server):
    with pytest.raises(ValueError, match="cache_dir"):
        batches(server[0] + "/manifest.json")


def test_a_missing_remote_manifest_is_one_clear_error(server, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda s: None)
    with pytest.raises(ValueError, match=r"no manifest at http.*in 4 tries"):
        Manifest.load(server[0] + "/nope/manifest.json")


def test_a_source_that_fails_twice_is_tried_again(tmp_path):
    counter = tmp_path / "count"
    (tmp_path / "data").write_bytes(b"x" * 1000)
    command = (
        f"pipe:echo >> {counter}; "
        f"if [ $(wc -l < {counter}) -lt 3 ]; then head -c 10 {tmp_path}/data; exit 1; fi; "
        f"cat {tmp_path}/data"
    )
    target = io.BytesIO()
    Fetcher(tries=3, wait_s=0.01).copy(command, target)
    assert target.getvalue() == b"x" * 1000
    counter.unlink()
    with pytest.raises(OSError, match="in 2 tries"):
        Fetcher(tries=2, wait_s=0.01).copy(command, target)


def test_a_silent_source_is_given_up(tmp_path):
    started = time.monotonic()
    with pytest.raises(OSError, match=r"nothing came for 0.2 s"):
        Fetcher(tries=2, wait_s=0.01, timeout_s=0.2).copy("pipe:printf abc; sleep 60", io.BytesIO())
    assert time.monotonic() - started < 10


def test_bytes_that_are_not_the_manifests_never_reach_the_cache(tmp_path):
    (tmp_path / "file").write_bytes(b"wrong")
    sha256 = hashlib.sha256(b"right").hexdigest()
    cache = FileCache(tmp_path / "cache", 10**6, Fetcher(tries=2, wait_s=0.01))
    with pytest.raises(OSError, match="SHA-256 is another"):
        cache.open(f"pipe:cat {tmp_path}/file", sha256)
    assert not (tmp_path / "cache" / sha256).exists()
    (tmp_path / "file").write_bytes(b"right")
    with cache.open(f"pipe:cat {tmp_path}/file", sha256) as file:
        assert file.read() == b"right"


def test_unknown_schemes_are_one_clear_error():
    with pytest.raises(OSError, match="no gopen handler"):
        Fetcher(tries=1).copy("gopher://x/y", io.BytesIO())
    assert not is_remote("/a:b/c") and not is_remote("C:") and is_remote("pipe:cat x")
    with pytest.raises(FileNotFoundError):
        read_bytes("/nope/at/all")


def test_the_cache_keeps_its_limit_and_what_was_used_last(tmp_path):
    contents = [bytes([k]) * 1000 for k in range(5)]
    names = [hashlib.sha256(content).hexdigest() for content in contents]
    for k, content in enumerate(contents):
        (tmp_path / str(k)).write_bytes(content)
    cache = FileCache(tmp_path / "cache", 3000)
    opened = []
    for k in (0, 1, 2, 0, 3, 4):
        opened.append((k, cache.open(f"pipe:cat {tmp_path}/{k}", names[k])))
        time.sleep(0.02)  # modification times tell them apart
    kept = {path.name for path in (tmp_path / "cache").iterdir() if not path.suffix}
    assert kept == {names[0], names[3], names[4]}
    for k, file in opened:  # the deleted ones too
        assert file.read() == contents[k]
        file.close()


def _open_once(folder, url, name):
    with FileCache(folder, 10**6).open(url, name) as file:
        os._exit(0 if file.read() == b"x" else 1)


def test_processes_fetch_a_file_once(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    url = f"pipe:echo >> {tmp_path}/count; sleep 0.1; cat {tmp_path}/file"
    arguments = (tmp_path / "cache", url, hashlib.sha256(b"x").hexdigest())
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_open_once, args=arguments) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert (tmp_path / "count").read_text() == "\n"
