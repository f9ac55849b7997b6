"""A manifest for tars that exist already (video2dataset, open_clip, ours), which stay as they are.

A sample is what shares a key, the file name up to its first dot: a video, and a text in `KEY.txt`
or in `KEY.json` under `texts`, `caption` or `text`. The json may also hold `clip_id`, `video_id`,
`start_s`, `end_s`, `verb_classes` and `noun_classes`.
"""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from datamodules.manifest import (
    MANIFEST_NAME,
    ClipRecord,
    Manifest,
    Shard,
    ShardIndex,
    check_record,
    name_fault,
)
from datamodules.shards.build import BuildReport
from datamodules.shards.identity import save_index, tell_apart
from datamodules.shards.members import group_members, tar_members
from datamodules.shards.rejects import REJECTS_NAME, check_rejects, write_rejects
from datamodules.shards.writer import measure, write_shard
from datamodules.video.check import check_clip
from datamodules.video.decode import DamagedSample, Decoder, check_decoder, decoder_of
from datamodules.video.encode import EncodedClip, EncodeOptions, encode_whole
from datamodules.video.frames import Limits
from datamodules.video.pieces import RejectedClip
from datamodules.video.workers import Job, run_jobs

_VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi", "m4v", "mpg", "mpeg", "ts", "gif")
_ENTIRE_TAR = "(the tar)"
_REENCODED = ".reencoded.tar"
_MAX_TEXT_BYTES = 1 << 20


def index_tars(
    folder: str | Path,
    *,
    num_workers: int = 1,
    probe: bool = True,
    progress: bool = False,
    max_rejects: float = 1.0,
    decoder: Decoder = "auto",
    limits: Limits | None = None,
    timeout_s: float = 60.0,
    reencode: EncodeOptions | None = None,
) -> BuildReport:
    """Write an index beside each tar of a folder, and a manifest.

    Args:
        folder: Where the tars lie, at any depth; index files are written beside them.
        num_workers: Processes.
        probe: Decode each video in order and as training does, in a child process that may crash
            or hang, and compare the pictures.
        progress: Show a progress bar.
        max_rejects: Share of the samples that may be rejected.
        decoder: What training will decode them with; it is written into the manifest.
        limits: What a video may declare.
        timeout_s: The longest that a video may take.
        reencode: Store videos anew, in a tar of their own, which are not decoded to the frames that
            play; they are rejected by default.

    Returns:
        What was found; samples that cannot be used are in `rejects.jsonl`.

    Raises:
        ValueError: There are no tars, no usable sample in them, or too many rejects.
    """
    root = Path(folder)
    check_decoder(decoder)
    how = _Reading(decoder_of(decoder, {"index_only": True}), limits or Limits(), probe, reencode)
    found = sorted(root.rglob("*.tar"))
    if reencode is not None:  # those of an earlier run are made anew
        found = [path for path in found if not path.name.endswith(_REENCODED)]
    if not found:
        raise ValueError(f"there are no .tar files in {root}")
    tars, rejects = [], []
    for path in found:
        name = str(path.relative_to(root))
        # a pipe would be waited for for ever
        fault = name_fault(name) if path.is_file() else "it is no plain file"
        if fault is None:
            tars.append(name)
        else:
            rejects.append(_reject(_ENTIRE_TAR, name, fault))

    def work(job: Job, begin: Callable[[str | None], None]) -> list[Shard]:
        return _index_tar(root, tars[job.number], job.crashed, begin, how)

    shards: dict[int, list[Shard]] = {}
    jobs = [Job(number, None) for number in range(len(tars))]
    with tqdm(unit="clip", desc="index", disable=not progress) as bar:
        for event in run_jobs(work, jobs, num_workers, timeout_s):
            bar.update(event.item is not None)
            if event.item is None and event.result is not None:
                shards[event.job.number] = event.result
    indexed = tell_apart(root, [shard for number in sorted(shards) for shard in shards[number]])
    kept = [shard for shard in indexed if shard.num_samples]
    for shard in indexed:
        path = root / shard.index
        rejects += ShardIndex.from_bytes(path.read_bytes(), str(path)).rejects
    write_rejects(root, rejects)
    if not kept:
        raise ValueError(f"the tars in {root} hold no usable sample; see {root / REJECTS_NAME}")
    check_rejects(rejects, len(rejects) + sum(shard.num_samples for shard in kept), max_rejects)
    options = {"index_only": True, "decoder": how.decoder, "checked": probe}
    manifest = Manifest("", tuple(kept), options, {"tars": len(tars)})
    manifest.save(root / MANIFEST_NAME)
    return BuildReport(
        root / MANIFEST_NAME,
        manifest.num_samples,
        len(rejects),
        len(kept),
        sum(shard.num_bytes for shard in kept),
    )


def _reject(clip_id: str, tar: str, reason: str) -> dict[str, str]:
    return {"clip_id": clip_id, "video_id": tar, "reason": reason}


@dataclass(frozen=True)
class _Reading:
    """How videos are looked at."""

    decoder: Decoder
    limits: Limits
    probe: bool
    reencode: EncodeOptions | None

    def check(self, data: bytes) -> None:
        if self.probe:
            check_clip(data, self.decoder, self.limits)


def _index_tar(
    root: Path,
    name: str,
    crashed: dict[str, str],
    begin: Callable[[str | None], None],
    how: _Reading,
) -> list[Shard]:
    path = root / name
    members, damage = tar_members(path)
    rejects = []
    if damage is not None:
        rejects.append(_reject(_ENTIRE_TAR, name, damage))
    rows, keys, records = [], [], []
    anew: list[tuple[ClipRecord, tuple[int, int]]] = []
    with path.open("rb") as file:
        for group in group_members(members):
            key = group.key
            begin(key)
            try:
                if group.fault is not None:
                    raise DamagedSample(group.fault)
                row, record, data = _index_sample(file.fileno(), key, group.members)
                try:
                    if key in crashed:
                        raise DamagedSample(crashed[key])
                    how.check(data)
                except DamagedSample:
                    if how.reencode is None:
                        raise
                    anew.append((record, row[:2]))
                    continue
            except DamagedSample as error:
                rejects.append(_reject(key, name, str(error)))
                continue
            rows.append(row)
            keys.append(key)
            records.append(record)
    begin(None)
    tar = measure(path)
    shards = [save_index(root, name, ShardIndex.from_records(rows, keys, records, tar, rejects))]
    if how.reencode is not None and anew:
        shards.append(_store_anew(root, name, anew, crashed, begin, how))
    return shards


def _store_anew(
    root: Path,
    name: str,
    samples: list[tuple[ClipRecord, tuple[int, int]]],
    crashed: dict[str, str],
    begin: Callable[[str | None], None],
    how: _Reading,
) -> Shard:
    """Write samples of a tar, with the places of their videos, into another, in the stored form."""
    assert how.reencode is not None
    options, places = how.reencode, {id(record): place for record, place in samples}

    def label(clip_id: str) -> str:
        return f"{clip_id}, stored anew"

    def encode(record: ClipRecord) -> EncodedClip:
        if label(record.clip_id) in crashed:
            raise RejectedClip(crashed[label(record.clip_id)])
        offset, size = places[id(record)]
        return encode_whole(os.pread(file.fileno(), size, offset), options, how.limits)

    target = str(PurePosixPath(name).with_suffix("")) + _REENCODED
    records = [record for record, _ in samples]
    with (root / name).open("rb") as file:
        index = write_shard(root, target, 0, records, encode, lambda clip_id: begin(label(clip_id)))
    return save_index(root, target, index)


def _index_sample(
    descriptor: int, key: str, group: dict[str, tarfile.TarInfo]
) -> tuple[tuple[int, int, int, int, int], ClipRecord, bytes]:
    videos = [group[suffix] for suffix in _VIDEO_SUFFIXES if suffix in group]
    if len(videos) != 1:
        has = ", ".join(sorted(group))
        raise DamagedSample(f"no video: it has {has}" if not videos else f"two videos: {has}")
    video = videos[0]
    if video.size >= 2**32:
        raise DamagedSample(f"its video takes {video.size} bytes; 4 GiB is the most")
    data = os.pread(descriptor, video.size, video.offset_data)
    metadata = group.get("json")
    values = {} if metadata is None else _read_json(descriptor, metadata)
    if "txt" in group:
        try:
            text = _read_small(descriptor, group["txt"]).decode().strip()
        except UnicodeDecodeError as error:
            raise DamagedSample("its text is not UTF-8") from error
        values.setdefault("texts", [text])
    place = (0, 0) if metadata is None else (metadata.offset_data, metadata.size)
    row = (video.offset_data, video.size, *place, zlib.crc32(data))
    return row, _foreign_record(key, values), data


def _read_small(descriptor: int, member: tarfile.TarInfo) -> bytes:
    if member.size > _MAX_TEXT_BYTES:
        raise DamagedSample(f"{member.name!r:.200} takes {member.size} bytes; 1 MiB is the most")
    return os.pread(descriptor, member.size, member.offset_data)


def _read_json(descriptor: int, member: tarfile.TarInfo) -> dict[str, Any]:
    try:
        values = json.loads(_read_small(descriptor, member))
    except (ValueError, RecursionError) as error:
        raise DamagedSample(f"its json cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise DamagedSample(f"its json is no object but {json.dumps(values):.100}")
    return values


def _foreign_record(key: str, values: dict[str, Any]) -> ClipRecord:
    texts = values.get("texts") or values.get("caption") or values.get("text") or ()
    texts = (texts,) if isinstance(texts, str) else texts
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise DamagedSample(f"its text is none: {json.dumps(texts):.100}")
    texts = tuple(text for text in texts if text.strip())
    if not texts:
        raise DamagedSample("no text: neither KEY.txt nor texts, caption or text in KEY.json")
    names = [values.get(name, key) for name in ("clip_id", "video_id")]
    try:
        # a number is as good a name as a text
        clip_id, video_id = (str(name) if type(name) is int else name for name in names)
        return check_record(
            ClipRecord(
                clip_id=clip_id,
                video_id=video_id,
                start_s=values.get("start_s", 0.0),
                end_s=values.get("end_s", 0.0),
                texts=texts,
                verb_classes=tuple(values.get("verb_classes", ())),
                noun_classes=tuple(values.get("noun_classes", ())),
            )
        )
    except (TypeError, ValueError) as error:
        raise DamagedSample(f"its json is malformed: {error}") from error
