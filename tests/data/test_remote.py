"""Shards behind URLs and commands: retries, silence, damage, and a cache that stays small."""

import functools
import gc
import hashlib
import http.server
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from datamodules.manifest import Manifest
from datamodules.pretrain import PretrainDataModule
from datamodules.stream.cache import FileCache
from datamodules.stream.retry import Retry, StorageUnavailable
from datamodules.stream.stores import Fetcher, check_location, is_remote, join, read_bytes

QUICK = Retry(patience_s=0.5, first_s=0.01, longest_s=0.05)


@pytest.fixture
def server(shards):
    """The shards over HTTP; counts what was asked for."""

    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept, as stores do

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


def test_every_kind_of_location_gives_the_same_batches(shards, server, tmp_path):
    expected = batches(str(shards))
    places = (f"file:{shards}/manifest.json", f"{server[0]}/manifest.json", f"{server[0]}/{{}}")
    for number, place in enumerate((*places, f"pipe:cat {shards}/{{}}")):
        allowed = {"allow_pipe": True} if place.startswith("pipe:") else {}
        found = batches(place, cache_dir=str(tmp_path / str(number)), **allowed)
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


def test_a_missing_remote_manifest_is_one_clear_error(server):
    with pytest.raises(ValueError, match=r"no manifest at http.*nope"):
        Manifest.load(server[0] + "/nope/manifest.json")


def test_a_source_that_fails_twice_is_tried_again(tmp_path):
    counter = tmp_path / "count"
    (tmp_path / "data").write_bytes(b"x" * 1000)
    command = (
        f"pipe:echo >> {counter}; "
        f"if [ $(wc -l < {counter}) -lt 3 ]; then head -c 10 {tmp_path}/data; exit 1; fi; "
        f"cat {tmp_path}/data"
    )
    target = tmp_path / "target"
    Fetcher(QUICK).copy(command, target)
    assert target.read_bytes() == b"x" * 1000
    target.unlink()
    with pytest.raises(StorageUnavailable, match="exit code 3"):
        Fetcher(QUICK).copy("pipe:echo x; exit 3", target)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["count", "data"]


def test_a_silent_source_is_given_up_and_leaves_no_process(tmp_path):
    command = f"pipe:printf abc; sleep 60 & echo $! > {tmp_path}/pid; wait"
    with pytest.raises(StorageUnavailable, match=r"nothing came for 0.1 s"):
        Fetcher(QUICK, 0.1).copy(command, tmp_path / "x")
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and time.monotonic() < deadline:
        if not Path(f"/proc/{pid}/cmdline").read_bytes():
            break  # killed, and nobody has asked for its exit code yet
        time.sleep(0.01)
    assert time.monotonic() < deadline


def test_bytes_that_are_not_the_manifests_never_reach_the_cache(tmp_path):
    (tmp_path / "file").write_bytes(b"wrong")
    sha256 = hashlib.sha256(b"right").hexdigest()
    cache = FileCache(tmp_path / "cache", 10**6, Fetcher(QUICK))
    with pytest.raises(OSError, match="SHA-256 is another"):
        cache.open(f"pipe:cat {tmp_path}/file", sha256)
    assert not (tmp_path / "cache" / sha256).exists()
    (tmp_path / "file").write_bytes(b"right")
    with cache.open(f"pipe:cat {tmp_path}/file", sha256) as file:
        assert file.read() == b"right"


@pytest.mark.parametrize(
    "place",
    [
        "gopher://x/y",
        "ssh://host/set",
        "github://a:b@c/d",
        "simplecache::https://x/y",
        "https::zip://x",
        "reference://x",
        "local:///etc/passwd",
    ],
)
def test_unknown_schemes_are_one_clear_error(place):
    with pytest.raises(ValueError, match="a scheme that is not read; one of s3://"):
        Manifest.load(place)


def test_what_is_remote():
    assert not is_remote("/a:b/c") and not is_remote("C:") and is_remote("pipe:cat x")
    with pytest.raises(FileNotFoundError):
        read_bytes("/nope/at/all")
    assert join("s3://b/set", "a b.tar") == "s3://b/set/a b.tar"
    assert join("https://h/{}?key=1", "a b%.tar") == "https://h/a%20b%25.tar?key=1"


def test_commands_run_only_where_they_are_allowed(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = f"pipe:touch F; cat {shards}/{{}}"
    for load in (Manifest.load, check_location, lambda place: batches(place, cache_dir="cache")):
        with pytest.raises(ValueError, match="runs a command on this machine; allow it with"):
            load(place)
    assert not Path("F").exists()
    assert Manifest.load(place, allow_pipe=True).num_samples == 32
    assert Path("F").exists()
    with pytest.raises(ValueError, match="where the file's name belongs"):
        Manifest.load("pipe:cat manifest.json", allow_pipe=True)


def test_a_name_is_one_word_of_a_command(tmp_path):
    (tmp_path / "a b.tar").write_bytes(b"x")
    assert read_bytes(join(f"pipe:cat {tmp_path}/{{}}", "a b.tar")) == b"x"
    # what the rules for names keep out would be one word, too
    hostile = join(f"pipe:cat {tmp_path}/{{}}", f"a';touch {tmp_path}/F;'.npz")
    with pytest.raises(OSError, match="exit code 1"):
        Fetcher(QUICK).copy(hostile, tmp_path / "target")
    assert not (tmp_path / "F").exists()


def test_a_store_whose_package_is_missing_says_which(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ValueError, match=r"gs:// needs a package.*pip install 'eva02-at\[gs\]'"):
        Manifest.load("gs://bucket/set/manifest.json")


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
    assert _kept(tmp_path) == {names[0], names[3], names[4]}
    for k, file in opened:  # the deleted ones too
        assert file.read() == contents[k]
        file.close()


def _kept(tmp_path):
    return {path.name for path in (tmp_path / "cache").iterdir() if not path.suffix}


def test_what_is_used_next_stays_and_what_nobody_plans_to_use_goes_first(tmp_path):
    contents = [bytes([k]) * 1000 for k in range(6)]
    names = [hashlib.sha256(content).hexdigest() for content in contents]
    for k, content in enumerate(contents):
        (tmp_path / str(k)).write_bytes(content)
    cache = FileCache(tmp_path / "cache", 3000)
    cache.folder.mkdir()
    cache.publish("rank0", [names[4], names[0], names[3], names[1]])
    cache.publish("rank1", [names[5], names[1], names[3]])
    # 2 is in no plan; the least of 3's places is 2, that of 1's and 0's is 1
    for k, kept in ((3, {3}), (2, {3, 2}), (0, {3, 2, 0}), (1, {3, 0, 1}), (4, {4, 0, 1})):
        cache.open(f"pipe:cat {tmp_path}/{k}", names[k]).close()
        time.sleep(0.02)
        assert _kept(tmp_path) == {names[k] for k in kept}
    cache.withdraw("rank0")
    os.utime(cache.folder / "rank1.plan", (0, 0))  # its reader is gone
    cache.open(f"pipe:cat {tmp_path}/5", names[5]).close()
    assert len(_kept(tmp_path)) == 3 and not (cache.folder / "rank1.plan").exists()


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


def _read_in_child(url):
    gc.collect()
    read_bytes(url)
    gc.collect()
    os._exit(0)


def test_a_forked_reader_leaves_the_parents_connections_alone(server, caplog):
    """Both share the poll set of the parent's event loop: see `stores._KEPT`."""
    url = server[0] + "/manifest.json"
    fetcher = Fetcher(QUICK, timeout_s=3.0)
    context = multiprocessing.get_context("fork")
    assert read_bytes(url, fetcher)
    child = context.Process(target=_read_in_child, args=(url,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert read_bytes(url, fetcher)
    assert "nothing came" not in caplog.text
