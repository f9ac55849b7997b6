"""Names of clips that are unique in a whole set, where tars of other tools count anew in each."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from datamodules.files import write_atomically
from datamodules.manifest import Shard, ShardIndex, index_name


def save_index(root: Path, name: str, index: ShardIndex) -> Shard:
    """Write the index of a tar beside it; returns its entry of a manifest."""
    data = index.to_bytes()
    path = index_name(name)
    write_atomically(root / path, data)
    digest = hashlib.sha256(data).hexdigest()
    return Shard(name, path, len(index), **index.tar, index_sha256=digest)


def tell_apart(root: Path, shards: Sequence[Shard]) -> list[Shard]:
    """Make clip ids unique over all tars.

    img2dataset and video2dataset count their keys from 0 in each tar, and rows of two annotation
    files count from 0, too. A clip whose id is not the only one of its kind is called by its tar
    and its key instead (`00001/0007`), and so is a video that was called by its key.

    Args:
        root: Folder of the tars.
        shards: Their entries, whose indexes are written anew where a name changes.

    Returns:
        The entries.
    """
    counts: Counter[str] = Counter()
    for shard in shards:
        index = _load(root, shard)
        counts.update(index.record(row).clip_id for row in range(len(index)))
    again = {clip_id for clip_id, count in counts.items() if count > 1}
    if not again:
        return list(shards)
    return [save_index(root, s.name, _renamed(s.name, _load(root, s), again)) for s in shards]


def _load(root: Path, shard: Shard) -> ShardIndex:
    path = root / shard.index
    return ShardIndex.from_bytes(path.read_bytes(), str(path))


def _renamed(name: str, index: ShardIndex, again: set[str]) -> ShardIndex:
    keys = [index.key(row) for row in range(len(index))]
    records = []
    for row, key in enumerate(keys):
        record, unique = index.record(row), f"{PurePosixPath(name).with_suffix('')}/{key}"
        if record.clip_id in again:
            video_id = unique if record.video_id == key else record.video_id
            record = dataclasses.replace(record, clip_id=unique, video_id=video_id)
        records.append(record)
    renamed = ShardIndex.from_records([], keys, records, index.tar, index.rejects)
    return dataclasses.replace(renamed, rows=index.rows)
