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
from pathlib import Path
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
from datamodules.shards.writer import measure
from datamodules.video.decode import DamagedSample, decode_frames
from datamodules.video.workers import Job, run_jobs

_VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi", "m4v", "mpg", "mpeg", "ts", "gif")
_ENTIRE_TAR = "(the tar)"
_MAX_TEXT_BYTES = 1 << 20


def index_tars(
    folder: str | Path,
    *,
    num_workers: int = 1,
    probe: bool = True,
    progress: bool = False,
    max_rejects: float = 1.0,
) -> BuildReport:
    """Write an index beside each tar of a folder, and a manifest.

    Args:
        folder: Where the tars lie, at any depth; index files are written beside them.
        num_workers: Processes.
        probe: Decode two frames of each video, in a child process that may crash.
        progress: Show a progress bar.
        max_rejects: Share of the samples that may be rejected.

    Returns:
        What was found; samples that cannot be used are in `rejects.jsonl`.

    Raises:
        ValueError: There are no tars, no usable sample in them, or too many rejects.
    """
    root = Path(folder)
    found = sorted(root.rglob("*.tar"))
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

    def work(job: Job, begin: Callable[[str], None]) -> Shard | None:
        return _index_tar(root, tars[job.number], job.crashed, begin, probe)

    shards: dict[int, Shard] = {}
    jobs = [Job(number, None) for number in range(len(tars))]
    with tqdm(unit="clip", desc="index", disable=not progress) as bar:
        for event in run_jobs(work, jobs, num_workers):
            bar.update(event.item is not None)
            if event.item is None and event.result is not None:
                shards[event.job.number] = event.result
    indexed = tell_apart(root, [shards[number] for number in sorted(shards)])
    kept = [shard for shard in indexed if shard.num_samples]
    for shard in indexed:
        path = root / shard.index
        rejects += ShardIndex.from_bytes(path.read_bytes(), str(path)).rejects
    write_rejects(root, rejects)
    if not kept:
        raise ValueError(f"the tars in {root} hold no usable sample; see {root / REJECTS_NAME}")
    check_rejects(rejects, len(rejects) + sum(shard.num_samples for shard in kept), max_rejects)
    manifest = Manifest("", tuple(kept), {"index_only": True}, {"tars": len(tars)})
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


def _index_tar(
    root: Path, name: str, crashed: dict[str, str], begin: Callable[[str], None], probe: bool
) -> Shard:
    path = root / name
    members, damage = tar_members(path)
    rejects = []
    if damage is not None:
        rejects.append(_reject(_ENTIRE_TAR, name, damage))
    rows, keys, records = [], [], []
    with path.open("rb") as file:
        for group in group_members(members):
            key = group.key
            begin(key)
            try:
                fault = crashed.get(key) or group.fault
                if fault is not None:
                    raise DamagedSample(fault)
                row, record = _index_sample(file.fileno(), key, group.members, probe)
            except DamagedSample as error:
                rejects.append(_reject(key, name, str(error)))
                continue
            rows.append(row)
            keys.append(key)
            records.append(record)
    tar = measure(path)
    return save_index(root, name, ShardIndex.from_records(rows, keys, records, tar, rejects))


def _index_sample(
    descriptor: int, key: str, group: dict[str, tarfile.TarInfo], probe: bool
) -> tuple[tuple[int, int, int, int, int], ClipRecord]:
    videos = [group[suffix] for suffix in _VIDEO_SUFFIXES if suffix in group]
    if len(videos) != 1:
        has = ", ".join(sorted(group))
        raise DamagedSample(f"no video: it has {has}" if not videos else f"two videos: {has}")
    video = videos[0]
    if video.size >= 2**32:
        raise DamagedSample(f"its video takes {video.size} bytes; 4 GiB is the most")
    data = os.pread(descriptor, video.size, video.offset_data)
    if probe:
        decode_frames(data, 2, None, "pyav")
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
    return row, _foreign_record(key, values)


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
