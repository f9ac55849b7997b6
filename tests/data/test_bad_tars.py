"""Odd tars, indexes and manifests: each bad sample is rejected by name, the rest is read."""

import dataclasses
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datamodules.manifest import (
    INDEX_DTYPE,
    MAX_INDEX_BYTES,
    Manifest,
    ShardIndex,
    WrongManifest,
    load_records,
)
from datamodules.pretrain import PretrainDataModule
from datamodules.shards import index_tars
from datamodules.shards.identity import save_index
from datamodules.shards.members import group_members, tar_members
from datamodules.shards.verify import repair, verify
from datamodules.stream.reader import Corpus, SampleReader
from lightning_modules.cli.shards import main as shards
from lightning_modules.evaluation.run import open_benchmark

VIDEO = b"not looked at without a probe"


def tar_of(path: Path, members: list[tuple[str, bytes | tarfile.TarInfo]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
                continue
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def sample(key: str, text: str = "opens") -> list[tuple[str, bytes]]:
    return [(f"{key}.mp4", VIDEO), (f"{key}.txt", text.encode())]


def with_json(key: str, content: str | bytes) -> list[tuple[str, bytes]]:
    data = content if isinstance(content, bytes) else content.encode()
    return [(f"{key}.mp4", VIDEO), (f"{key}.json", data)]


def link(name: str, kind: bytes) -> tuple[str, tarfile.TarInfo]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "elsewhere"
    return name, info


def rejects_of(folder: Path) -> dict[str, str]:
    lines = map(json.loads, (folder / "rejects.jsonl").read_text().splitlines())
    return {line["clip_id"]: line["reason"] for line in lines}


BAD_SAMPLES = {
    "two of one key": ([*sample("x"), *sample("x")], "two members are called 'x.mp4'"),
    "its text after another sample": (
        [("x.mp4", VIDEO), *sample("other"), ("x.txt", b"another's")],
        "two samples are called 'x'",
    ),
    "two that differ in capitals": ([*sample("x"), ("x.MP4", VIDEO)], "two members are called"),
    "two videos": ([*sample("x"), ("x.webm", VIDEO)], "two videos: mp4, txt, webm"),
    "a link as its video": ([link("x.mp4", tarfile.SYMTYPE), ("x.txt", b"t")], "is no plain file"),
    "a hard link": ([link("x.mp4", tarfile.LNKTYPE), ("x.txt", b"t")], "is no plain file"),
    "a pipe": ([link("x.mp4", tarfile.FIFOTYPE), ("x.txt", b"t")], "is no plain file"),
    "no video": ([("x.txt", b"t")], "no video: it has txt"),
    "no text": ([("x.mp4", VIDEO)], "no text"),
    "a blank text": (sample("x", " \n"), "no text"),
    "a text that is not UTF-8": ([("x.mp4", VIDEO), ("x.txt", b"caf\xe9")], "text is not UTF-8"),
    "a text of 2 MiB": (sample("x", "t" * 2**21), "1 MiB is the most"),
}
BAD_JSON = {
    "[1]": "its json is no object but [1]",
    '"caption"': 'its json is no object but "caption"',
    "5": "its json is no object but 5",
    "null": "its json is no object but null",
    "": "its json cannot be read",
    "{": "its json cannot be read",
    "[" * 100_000: "its json cannot be read",
    '{"a":' * 100_000: "its json cannot be read",
    '{"caption": 5}': "its text is none: 5",
    '{"caption": {"a": 1}}': "its text is none",
    '{"texts": ["a", null]}': "its text is none",
    '{"texts": ["", " "]}': "no text",
    '{"caption": "\\ud800"}': "is no valid Unicode",
    '{"text": "t", "verb_classes": [Infinity]}': "class id inf is no integer",
    '{"text": "t", "verb_classes": [NaN]}': "class id nan is no integer",
    '{"text": "t", "verb_classes": [1.5]}': "class id 1.5 is no integer",
    '{"text": "t", "verb_classes": [true]}': "class id True is no integer",
    '{"text": "t", "verb_classes": ["1"]}': "class id '1' is no integer",
    '{"text": "t", "verb_classes": [-1]}': "class id -1 is no integer",
    f'{{"text": "t", "noun_classes": [{2**63}]}}': f"class id {2**63} is no integer",
    '{"text": "t", "noun_classes": 3}': "its json is malformed",
    '{"text": "t", "start_s": "1"}': "is no two times",
    '{"text": "t", "end_s": Infinity}': "is no two times",
    '{"text": "t", "start_s": NaN}': "is no two times",
    '{"text": "t", "clip_id": ["a"]}': "its clip id is missing",
    '{"text": "t", "clip_id": ""}': "its clip id is blank",
    '{"text": "t", "video_id": null}': "its video id is missing",
}
TABLE = BAD_SAMPLES | {json_[:60]: (with_json("x", json_), why) for json_, why in BAD_JSON.items()}


@pytest.mark.parametrize("name", TABLE)
def test_a_bad_sample_is_rejected_by_name_and_the_rest_indexed(tmp_path, name):
    members, reason = TABLE[name]
    tar_of(tmp_path / "a.tar", [*sample("before"), *members, *sample("after")])
    report = index_tars(tmp_path, probe=False)
    assert reason in rejects_of(tmp_path)["x"]
    kept = [record.clip_id for record in load_records(Manifest.load(tmp_path))]
    assert [name for name in kept if name != "other"] == ["before", "after"]
    assert report.num_rejected == 1


def test_json_is_read_whatever_it_holds(tmp_path):
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.dictionaries(
            st.sampled_from(
                ["clip_id", "video_id", "texts", "caption", "text", "start_s", "verb_classes"]
            ),
            st.recursive(
                st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
                lambda inner: st.lists(inner, max_size=3),
                max_leaves=4,
            ),
            max_size=4,
        )
    )
    def check(values):
        tar_of(tmp_path / "a.tar", [*with_json("x", json.dumps(values)), *sample("after")])
        report = index_tars(tmp_path, probe=False)
        assert report.num_clips + report.num_rejected == 2
        for record in load_records(Manifest.load(tmp_path)):
            np.array([*record.verb_classes], dtype=np.int64)  # what becomes a tensor

    check()


def broken_header(size: int, tmp_path: Path) -> Path:
    """A tar whose second sample's video says a size."""
    path = tar_of(tmp_path / "a.tar", [*sample("before"), *sample("x"), *sample("after")])
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        place = tar.getmember("x.mp4").offset
    info = tarfile.TarInfo("x.mp4")
    info.size = size
    data[place : place + 512] = info.tobuf(tarfile.GNU_FORMAT)[:512]
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("size", [-512, -(2**40), 2**70, 2**40])
@pytest.mark.timeout(60)
def test_a_size_that_cannot_be_ends_the_tar_there(tmp_path, size):
    broken_header(size, tmp_path)
    index_tars(tmp_path, probe=False)
    assert [r.clip_id for r in load_records(Manifest.load(tmp_path))] == ["before"]
    assert f"'x.mp4' would take {size} bytes" in rejects_of(tmp_path)["(the tar)"]


@given(st.binary(min_size=512, max_size=512), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_any_bytes_in_place_of_a_header_end_somewhere(tmp_path_factory, junk, block):
    path = tmp_path_factory.getbasetemp() / "junk.tar"
    tar_of(path, [*sample("a"), *sample("b")])
    data = bytearray(path.read_bytes())
    data[512 * block : 512 * block + 512] = junk
    path.write_bytes(data)
    group_members(tar_members(path)[0])


@pytest.mark.timeout(60)
def test_a_pipe_in_place_of_a_tar_is_named_and_hangs_nobody(tmp_path):
    tar_of(tmp_path / "a.tar", sample("x"))
    tar_of(tmp_path / "c.tar", sample("y"))
    os.mkfifo(tmp_path / "b.tar")
    tar_of(tmp_path / "odd;name.tar", sample("z"))
    index_tars(tmp_path, probe=False)
    lines = map(json.loads, (tmp_path / "rejects.jsonl").read_text().splitlines())
    assert [(line["video_id"], line["reason"][:20]) for line in lines] == [
        ("b.tar", "it is no plain file"),
        ("odd;name.tar", "name 'odd;name.tar':"),
    ]
    reader = SampleReader(Corpus.load([str(tmp_path)]))
    (tmp_path / "c.tar").unlink()
    os.mkfifo(tmp_path / "c.tar")
    assert reader.read(0, 0).video == VIDEO
    with pytest.raises(Exception, match="no plain file"):
        reader.read(1, 0)
    (fault,) = verify(Manifest.load(tmp_path), decode_every=0)
    assert fault.name == "c.tar" and "no plain file" in fault.reason
    with pytest.raises(ValueError, match=r"named after it; name 'my;set\.json'"):
        repair(Manifest.load(tmp_path), [fault], tmp_path / "my;set.json")
    with pytest.raises(ValueError, match="is remote"):
        verify(Manifest("s3://bucket/set", ()))
    manifest = tmp_path / "manifest.json"
    manifest.unlink()
    os.mkfifo(manifest)
    with pytest.raises(ValueError, match="no plain file"):
        Manifest.load(tmp_path)


def test_hidden_files_are_no_samples(tmp_path):
    tar_of(tmp_path / "a.tar", [("._x.mp4", b"mac"), *sample("x"), (".DS_Store", b"mac")])
    assert index_tars(tmp_path, probe=False).num_rejected == 0


def test_keys_that_start_anew_in_each_tar_name_different_clips(tmp_path):
    """As img2dataset and video2dataset write them."""
    for tar in range(2):
        members = [m for k in range(2) for m in sample(f"{tar:05d}{k:04d}"[5:], f"text {tar} {k}")]
        tar_of(tmp_path / f"{tar:05d}.tar", members)
    tar_of(tmp_path / "00002.tar", sample("unique"))
    index_tars(tmp_path, probe=False)
    records = load_records(Manifest.load(tmp_path))
    expected = ["00000/0000", "00000/0001", "00001/0000", "00001/0001", "unique"]
    assert [record.clip_id for record in records] == expected
    assert [record.video_id for record in records] == expected
    benchmark, _ = open_benchmark("text_video", str(tmp_path))
    assert list(benchmark.clip_ids) == expected
    reader = SampleReader(Corpus.load([str(tmp_path)]))
    assert [reader.read(shard, 0).record.clip_id for shard in range(3)] == [
        "00000/0000",
        "00001/0000",
        "unique",
    ]


def test_an_old_index_that_merges_clips_is_refused(tmp_path):
    for tar in "ab":
        tar_of(tmp_path / f"{tar}.tar", sample("0"))
        index_tars(tmp_path, probe=False)
    manifest = Manifest.load(tmp_path)
    index = manifest.load_index(0)
    same = dataclasses.replace(index.record(0), clip_id="0")
    both = []
    for shard in manifest.shards:
        old = ShardIndex.from_records([], ["0"], [same], index.tar, [])
        both.append(save_index(tmp_path, shard.name, dataclasses.replace(old, rows=index.rows)))
    Manifest(str(tmp_path), tuple(both)).save(tmp_path / "manifest.json")
    with pytest.raises(ValueError, match=r"a.tar and b.tar both hold a clip '0'.*--index-only"):
        open_benchmark("text_video", str(tmp_path))


def test_a_small_index_that_unpacks_to_much_is_refused(tmp_path):
    path = tmp_path / "a.index.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("rows.npy", "table.npy"):
            with file.open(name, "w", force_zip64=True) as member:
                for _ in range(MAX_INDEX_BYTES // 2**24):
                    member.write(bytes(2**23))
                member.write(b"x")
    assert path.stat().st_size < 2**20
    with pytest.raises(ValueError, match=rf"unpacks to \d+ bytes; {MAX_INDEX_BYTES} are the most"):
        ShardIndex.from_bytes(path.read_bytes(), str(path))


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 2**8 - 1))
def test_no_bytes_make_an_index_raise_anything_else(junk, place, value):
    rows = np.zeros(1, dtype=INDEX_DTYPE)
    sound = bytearray(ShardIndex(rows, [b'{"key": "k"}'], {"num_bytes": 1}, []).to_bytes())
    sound[place % len(sound)] = value
    for data in (junk, bytes(sound)):
        try:
            index = ShardIndex.from_bytes(data, "here")
            for row in range(len(index)):
                index.record(row)
        except ValueError as error:
            assert "here is no intact" in str(error) or "is no record" in str(error)


GONE = object()
BAD_MANIFESTS = {
    "no shards": ({"shards": GONE}, "its 'shards' is missing"),
    "shards of another kind": ({"shards": {}}, "its 'shards' is missing or no list"),
    "no options": ({"options": GONE}, "its 'options' is missing"),
    "another total": ({"num_samples": 7}, "hold 2 samples, not the 7"),
    "a shard without a count": ({"num_samples": GONE, "shard": {"num_samples": GONE}}, "must have"),
    "one more key": ({"shard": {"more": 1}}, "must have"),
    "a negative count": ({"shard": {"num_samples": -1}}, "num_samples -1 is no count"),
    "a count as text": ({"shard": {"num_bytes": "1"}}, "num_bytes '1' is no count"),
    "a command as index": ({"shard": {"index": "pipe:id > F; true"}}, "name 'pipe:id"),
    "a quote": ({"shard": {"index": "a';touch F;'.npz"}}, "names are relative"),
    "a scheme": ({"shard": {"name": "s3://bucket/a.tar"}}, "names are relative"),
    "a way up": ({"shard": {"name": "../outside/a.tar"}}, "no part of it may be"),
    "a way up inside": ({"shard": {"index": "a/../../b.npz"}}, "no part of it may be"),
    "an absolute name": ({"shard": {"name": "/etc/passwd"}}, "names are relative"),
    "an option": ({"shard": {"name": "-rf"}}, "begin with -"),
    "an empty name": ({"shard": {"name": ""}}, "names are relative"),
    "a line break": ({"shard": {"name": "a.tar\n"}}, "names are relative"),
    "braces": ({"shard": {"name": "{}.tar"}}, "names are relative"),
    "a hash that is a path": ({"shard": {"index_sha256": "../outside/planted"}}, "is no SHA-256"),
    "a hash in capitals": ({"shard": {"sha256": "A" * 64}}, "is no SHA-256"),
    "no hash": ({"shard": {"sha256": None}}, "is no SHA-256"),
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_a_manifest_that_cannot_be_used_is_one_line(tmp_path, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tar_of(tmp_path / "a.tar", [*sample("x"), *sample("y")])
    index_tars(tmp_path, probe=False)
    changes, message = BAD_MANIFESTS[name]
    content = json.loads((tmp_path / "manifest.json").read_text())
    for target, values in ((content, changes), (content["shards"][0], changes.get("shard", {}))):
        for key, value in values.items():
            if value is GONE:
                del target[key]
            elif key != "shard":
                target[key] = value
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    for place in (".", "manifest.json", str(tmp_path)):
        with pytest.raises(ValueError) as caught:
            Manifest.load(place)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "F").exists()


@pytest.mark.parametrize("change", [50, -1])
def test_a_count_that_is_not_the_indexs_ends_the_run_in_one_line(tmp_path, change):
    tar_of(tmp_path / "a.tar", [m for k in range(8) for m in sample(f"{k}")])
    index_tars(tmp_path, probe=False)
    content = json.loads((tmp_path / "manifest.json").read_text())
    content["num_samples"] += change
    content["shards"][0]["num_samples"] += change
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    message = f"a.tar holds {8 + change} samples, its index a.index.npz 8; write the manifest anew"
    with pytest.raises(WrongManifest, match=message):
        load_records(Manifest.load(tmp_path))
    for num_workers in (0, 1):
        module = PretrainDataModule(
            [str(tmp_path)], global_batch_size=2, num_workers=num_workers, max_fault_rate=1.0
        )
        with pytest.raises(WrongManifest) as caught:
            list(module.train_dataloader())
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_too_many_rejects_of_tars_end_the_index(tmp_path, videos, capsys):
    video = (videos / "v0.mp4").read_bytes()
    good = [m for k in range(3) for m in [(f"{k}.mp4", video), (f"{k}.txt", b"t")]]
    tar_of(tmp_path / "a.tar", [*good, *sample("x")])
    words = ["build", "--index-only", "--output", str(tmp_path)]
    with pytest.raises(ValueError, match=r"1 of 4 clips \(25.0%\) are rejected, more than --max-r"):
        shards(words)
    assert not (tmp_path / "manifest.json").exists()
    assert shards([*words, "--max-rejects", "0.25"]) == 0
    assert "3 clips in 1 shards" in capsys.readouterr().out
