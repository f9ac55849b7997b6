"""A manifest for tars that exist already (video2dataset, open_clip, ours), which stay as they are.

A sample is what shares a key, the file name up to its first dot: a video, and a text in `KEY.txt`
or in `KEY.json` under `texts`, `caption` or `text`. The json may also hold `clip_id`, `video_id`,
`start_s`, `end_s`, `verb_classes` and `noun_classes`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datamodules.files import write_atomically
from datamodules.manifest import (
    MANIFEST_NAME,
    ClipRecord,
    Manifest,
    Shard,
    ShardIndex,
    index_name,
)
from datamodules.shards.build import REJECTS_NAME, BuildReport
from datamodules.shards.writer import measure
from datamodules.video.decode import DamagedSample, decode_frames
from datamodules.video.workers import Job, run_jobs

_VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi", "m4v")
_ENTIRE_TAR = "(the tar)"


def index_tars(
    folder: str | Path, *, num_workers: int = 1, probe: bool = True, progress: bool = False
) -> BuildReport:
    """Write an index beside each tar of a folder, and a manifest.

    Args:
        folder: Where the tars lie, at any depth; index files are written beside them.
        num_workers: Processes.
        probe: Decode two frames of each video, in a child process that may crash.
        progress: Show a progress bar.

    Returns:
        What was found; samples that cannot be used are in `rejects.jsonl`.

    Raises:
        ValueError: There are no tars, or no usable sample in them.
    """
    root = Path(folder)
    tars = sorted(str(path.relative_to(root)) for path in root.rglob("*.tar"))
    if not tars:
        raise ValueError(f"there are no .tar files in {root}")

    def work(job: Job, begin: Callable[[str], None]) -> Shard | None:
        return _index_tar(root, tars[job.number], job.crashed, begin, probe)

    shards: dict[int, Shard] = {}
    rejects: list[dict[str, str]] = []
    jobs = [Job(number, None) for number in range(len(tars))]
    with tqdm(unit="clip", desc="index", disable=not progress) as bar:
        for event in run_jobs(work, jobs, num_workers):
            bar.update(event.item is not None)
            if event.item is None and event.result is not None:
                shards[event.job.number] = event.result
    kept = [shards[number] for number in sorted(shards) if shards[number].num_samples]
    for number in sorted(shards):
        path = root / shards[number].index
        rejects += ShardIndex.from_bytes(path.read_bytes(), str(path)).rejects
    write_atomically(
        root / REJECTS_NAME, "".join(json.dumps(reject) + "\n" for reject in rejects).encode()
    )
    if not kept:
        raise ValueError(f"the tars in {root} hold no usable sample; see {root / REJECTS_NAME}")
    manifest = Manifest("", tuple(kept), {"index_only": True}, {"tars": len(tars)})
    manifest.save(root / MANIFEST_NAME)
    return BuildReport(
        root / MANIFEST_NAME,
        manifest.num_samples,
        len(rejects),
        len(kept),
        sum(shard.num_bytes for shard in kept),
    )


def tar_members(path: Path) -> tuple[list[tarfile.TarInfo], str | None]:
    """List the members of a tar whose data is all there, and say what is wrong with the rest.

    Python's reader, and webdataset's on top of it, end without a word at a damaged header: the
    rest of the tar vanishes. A sound tar ends with a block of zeros.
    """
    members: list[tarfile.TarInfo] = []
    size = path.stat().st_size
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                while (member := tar.next()) is not None:
                    if member.isfile() and member.offset_data + member.size <= size:
                        members.append(member)
            except tarfile.TarError:
                return members, f"cut short: it ends at byte {size} within a member"
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                return members, f"what follows byte {tar.offset} cannot be read"
    except (tarfile.TarError, OSError) as error:
        return members, f"no tar: {error}"
    return members, None


def _index_tar(
    root: Path, name: str, crashed: dict[str, str], begin: Callable[[str], None], probe: bool
) -> Shard:
    path = root / name
    members, damage = tar_members(path)
    rejects = []
    if damage is not None:
        rejects.append({"clip_id": _ENTIRE_TAR, "video_id": name, "reason": damage})
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        parent, _, base = member.name.rpartition("/")
        stem, _, suffix = base.partition(".")
        groups.setdefault(f"{parent}/{stem}" if parent else stem, {})[suffix.lower()] = member
    rows, keys, records = [], [], []
    with path.open("rb") as file:
        for key, group in groups.items():
            begin(key)
            try:
                if key in crashed:
                    raise DamagedSample(crashed[key])
                row, record = _index_sample(file.fileno(), key, group, probe)
            except DamagedSample as error:
                rejects.append({"clip_id": key, "video_id": name, "reason": str(error)})
                continue
            rows.append(row)
            keys.append(key)
            records.append(record)
    tar = measure(path)
    data = ShardIndex.from_records(rows, keys, records, tar, rejects).to_bytes()
    index = index_name(name)
    write_atomically(root / index, data)
    return Shard(name, index, len(rows), **tar, index_sha256=hashlib.sha256(data).hexdigest())


def _index_sample(
    descriptor: int, key: str, group: dict[str, tarfile.TarInfo], probe: bool
) -> tuple[tuple[int, int, int, int, int], ClipRecord]:
    video = next((group[suffix] for suffix in _VIDEO_SUFFIXES if suffix in group), None)
    if video is None:
        raise DamagedSample(f"no video: it has {', '.join(sorted(group)) or 'nothing'}")
    data = os.pread(descriptor, video.size, video.offset_data)
    if probe:
        decode_frames(data, 2)
    metadata = group.get("json")
    values: dict[str, Any] = {}
    if metadata is not None:
        try:
            values = json.loads(os.pread(descriptor, metadata.size, metadata.offset_data))
        except ValueError as error:
            raise DamagedSample(f"its json cannot be read: {error}") from error
    if "txt" in group:
        text = os.pread(descriptor, group["txt"].size, group["txt"].offset_data)
        values.setdefault("texts", [text.decode("utf-8", "replace").strip()])
    place = (0, 0) if metadata is None else (metadata.offset_data, metadata.size)
    row = (video.offset_data, video.size, *place, zlib.crc32(data))
    return row, _foreign_record(key, values)


def _foreign_record(key: str, values: dict[str, Any]) -> ClipRecord:
    texts = values.get("texts") or values.get("caption") or values.get("text") or ()
    texts = (texts,) if isinstance(texts, str) else tuple(texts)
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DamagedSample("no text: neither KEY.txt nor texts, caption or text in KEY.json")
    try:
        return ClipRecord(
            clip_id=str(values.get("clip_id", key)),
            video_id=str(values.get("video_id", key)),
            start_s=float(values.get("start_s", 0.0)),
            end_s=float(values.get("end_s", 0.0)),
            texts=texts,
            verb_classes=tuple(map(int, values.get("verb_classes", ()))),
            noun_classes=tuple(map(int, values.get("noun_classes", ()))),
        )
    except (TypeError, ValueError) as error:
        raise DamagedSample(f"its json is malformed: {error}") from error
