"""Writing one shard: a tar of KEY.json + KEY.mp4, and its index."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from datamodules.files import open_plain_file, write_atomically
from datamodules.manifest import ClipRecord, ShardIndex, index_name
from datamodules.video.encode import EncodedClip
from datamodules.video.pieces import RejectedClip

_BLOCK = tarfile.BLOCKSIZE


def shard_name(number: int) -> str:
    """`shard-000003.tar`."""
    return f"shard-{number:06d}.tar"


def write_shard(
    output: Path,
    name: str,
    first_row: int,
    clips: Sequence[ClipRecord],
    encode: Callable[[ClipRecord], EncodedClip],
    on_clip: Callable[[str], None],
) -> ShardIndex:
    """Build one shard, whole or not at all: the index appears last and marks it as finished.

    Everything in the tar's headers is fixed, so the same clips give the same bytes.

    Args:
        output: Folder of the data set.
        name: The tar's, relative to it.
        first_row: Row of the first clip in the annotations; sample keys are row numbers.
        clips: The shard's share of the annotations.
        encode: Makes a clip, or raises `RejectedClip` with the reason.
        on_clip: Called with each clip's id before it is made.
    """
    target = output / name
    temporary = target.with_name(f".{target.name}.tmp")
    rows: list[tuple[int, int, int, int, int]] = []
    keys: list[str] = []
    kept: list[ClipRecord] = []
    rejects: list[dict[str, str]] = []
    with temporary.open("wb") as file:
        writer = TarWriter(file, user="", group="", mtime=0, encoder=False)
        for row, record in enumerate(clips, start=first_row):
            on_clip(record.clip_id)
            try:
                clip = encode(record)
            except RejectedClip as error:
                reject = {"clip_id": record.clip_id, "video_id": record.video_id}
                rejects.append({**reject, "reason": str(error)})
                continue
            key, start = f"{row:09d}", writer.tarstream.offset
            metadata = _metadata(record, clip)
            writer.write({"__key__": key, "json": metadata, "mp4": clip.data})
            # the writer sorts the members by extension: json, then mp4
            video = start + _BLOCK + _padded(len(metadata)) + _BLOCK
            crc = zlib.crc32(clip.data)
            rows.append((video, len(clip.data), start + _BLOCK, len(metadata), crc))
            keys.append(key)
            kept.append(record)
        writer.close()
        file.flush()
        os.fsync(file.fileno())
    index = ShardIndex.from_records(rows, keys, kept, measure(temporary), rejects)
    temporary.replace(target)
    write_atomically(output / index_name(name), index.to_bytes())
    return index


def measure(path: Path) -> dict[str, Any]:
    """Size and hash of a tar, as a manifest's entry holds them."""
    with os.fdopen(open_plain_file(path), "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return {"num_bytes": file.tell(), "sha256": sha256}


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _metadata(record: ClipRecord, clip: EncodedClip) -> bytes:
    content: dict[str, Any] = {
        "clip_id": record.clip_id,
        "video_id": record.video_id,
        "start_s": record.start_s,
        "end_s": record.end_s,
        "texts": record.texts,
        "verb_classes": record.verb_classes,
        "noun_classes": record.noun_classes,
        "num_frames": clip.num_frames,
        "fps": round(clip.fps, 6),
        "width": clip.width,
        "height": clip.height,
        "sha256": hashlib.sha256(clip.data).hexdigest(),
    }
    return json.dumps(content, separators=(",", ":")).encode()
