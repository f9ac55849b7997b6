"""The manifest of a set of shards, and the index that lies beside each shard.

    train/manifest.json             shards with sample counts, byte sizes and hashes; build options
    train/shard-000000.tar          samples KEY.json + KEY.mp4, readable by webdataset alone
    train/shard-000000.index.npz    where each sample lies in the tar, its checksum and metadata

Starting a run reads the manifest alone; an index is read when its shard is first used.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.files import write_atomically
from datamodules.manifest_rules import check_record as check_record
from datamodules.manifest_rules import manifest_fault
from datamodules.manifest_rules import name_fault as name_fault
from datamodules.stream.cache import FileCache
from datamodules.stream.retry import StorageUnavailable
from datamodules.stream.stores import check_location, is_remote, join, read_bytes, scheme_of

FORMAT = "eva02-at-shards-1"
MANIFEST_NAME = "manifest.json"
# An index has some hundred bytes a sample; a few MB of zip can hold any number of zeros.
MAX_INDEX_BYTES = 1 << 28
# One row a sample: where the video and the metadata lie, and the CRC-32 of the video's bytes.
INDEX_DTYPE = np.dtype(
    [
        ("video_offset", "<u8"),
        ("video_bytes", "<u4"),
        ("json_offset", "<u8"),
        ("json_bytes", "<u4"),
        ("crc32", "<u4"),
    ]
)


class WrongManifest(ValueError):
    """A manifest and an intact index contradict each other: no damage, but a mistake."""


@dataclass(frozen=True, slots=True)
class ClipRecord:
    """What is known of one clip besides its pixels; the json member of a sample.

    Attributes:
        clip_id: The annotation's own name of the clip, unique in a data set (`P01_11_0`).
        video_id: The source video.
        start_s: Start of the clip in the source video, seconds.
        end_s: End of the clip in the source video, seconds.
        texts: Narrations to choose from.
        verb_classes: Verb class ids; empty where unknown.
        noun_classes: Noun class ids; empty where unknown.
    """

    clip_id: str
    video_id: str
    start_s: float
    end_s: float
    texts: tuple[str, ...]
    verb_classes: tuple[int, ...] = ()
    noun_classes: tuple[int, ...] = ()


def record_from_json(values: dict[str, Any]) -> ClipRecord:
    """Build a record from parsed JSON, which knows no tuples; other keys are left out."""
    return ClipRecord(
        clip_id=values["clip_id"],
        video_id=values["video_id"],
        start_s=values["start_s"],
        end_s=values["end_s"],
        texts=tuple(values["texts"]),
        verb_classes=tuple(values["verb_classes"]),
        noun_classes=tuple(values["noun_classes"]),
    )


@dataclass(frozen=True)
class ShardIndex:
    """One shard's samples.

    Attributes:
        rows: (n,) of `INDEX_DTYPE`.
        lines: n lines of JSON, each a record and its `key`. They are kept as bytes and parsed when
            asked for: a loader worker has hundreds of indexes open and needs few rows of each.
        tar: The tar's `num_bytes` and `sha256`.
        rejects: Clips of the shard's share of the annotations that are not in it:
            `clip_id`, `video_id`, `reason`.
    """

    rows: NDArray[Any]
    lines: list[bytes]
    tar: dict[str, Any]
    rejects: list[dict[str, str]]

    @classmethod
    def from_records(
        cls,
        rows: Sequence[tuple[int, int, int, int, int]],
        keys: Sequence[str],
        records: Sequence[ClipRecord],
        tar: dict[str, Any],
        rejects: list[dict[str, str]],
    ) -> ShardIndex:
        """Build an index from one tuple of `INDEX_DTYPE`, one key and one record a sample."""
        lines = [
            json.dumps({"key": key, **asdict(record)}, separators=(",", ":")).encode()
            for key, record in zip(keys, records, strict=True)
        ]
        return cls(np.array(rows, dtype=INDEX_DTYPE), lines, tar, rejects)

    def __len__(self) -> int:
        return len(self.rows)

    def key(self, row: int) -> str:
        """Name that a sample's members share in the tar."""
        return json.loads(self.lines[row])["key"]

    def record(self, row: int) -> ClipRecord:
        """Metadata of a sample.

        Raises:
            ValueError: Its line is no record.
        """
        try:
            return record_from_json(json.loads(self.lines[row]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"row {row} of the index is no record: {error!r:.200}") from error

    def to_bytes(self) -> bytes:
        """Serialise; the same index gives the same bytes."""
        head = json.dumps({"tar": self.tar, "rejects": self.rejects}, separators=(",", ":"))
        table = np.frombuffer(b"\n".join([head.encode(), *self.lines]), dtype=np.uint8)
        buffer = io.BytesIO()
        np.savez(buffer, rows=self.rows, table=table)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> ShardIndex:
        """Read what `to_bytes` wrote; `where` names the file in the error."""
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as packed:
                size = sum(member.file_size for member in packed.infolist())
            if size > MAX_INDEX_BYTES:
                raise ValueError(f"it unpacks to {size} bytes; {MAX_INDEX_BYTES} are the most")
            with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
                rows = arrays["rows"]
                head, *lines = arrays["table"].tobytes().split(b"\n")
            content = json.loads(head)
            if rows.dtype != INDEX_DTYPE or len(lines) != len(rows):
                raise ValueError("its columns do not fit each other")
            return cls(rows, lines, content["tar"], content["rejects"])
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OSError,
            EOFError,
            MemoryError,
            RecursionError,
            NotImplementedError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise ValueError(
                f"{where} is no intact shard index ({error}); rebuild it with "
                "`eva02-at shards build --index-only`"
            ) from error


@dataclass(frozen=True)
class Shard:
    """One tar of a manifest.

    Attributes:
        name: File name, relative to the manifest's place.
        index: File name of its index.
        num_samples: Samples in it.
        num_bytes: Size of the tar.
        sha256: Of the tar.
        index_sha256: Of its index file.
    """

    name: str
    index: str
    num_samples: int
    num_bytes: int
    sha256: str
    index_sha256: str


def index_name(tar_name: str) -> str:
    """`a/shard-000000.tar` -> `a/shard-000000.index.npz`."""
    return str(PurePosixPath(tar_name).with_suffix("")) + ".index.npz"


@dataclass(frozen=True)
class Manifest:
    """All that is known of a set of shards without opening one.

    Attributes:
        root: Folder or URL that the shards' names are relative to.
        shards: The tars, in the order that numbers the clips.
        options: How they were built.
        source: The annotations they were built from.
    """

    root: str
    shards: tuple[Shard, ...]
    options: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return sum(shard.num_samples for shard in self.shards)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(S + 1,) global row of each shard's first sample: `clip_index` = starts[shard] + row."""
        counts = [shard.num_samples for shard in self.shards]
        return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of what the order of samples depends on; moving the files does not change it."""
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.num_samples} {shard.index_sha256}\n".encode())
        return digest.hexdigest()[:16]

    def url(self, name: str) -> str:
        """Full path or URL of a file of the set."""
        return join(self.root, name)

    def to_json(self) -> str:
        """Serialise; the same manifest gives the same text."""
        content = {
            "format": FORMAT,
            "num_samples": self.num_samples,
            "num_bytes": sum(shard.num_bytes for shard in self.shards),
            "source": self.source,
            "options": self.options,
            "shards": [asdict(shard) for shard in self.shards],
        }
        return json.dumps(content, indent=1, sort_keys=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Write to a local path, whole or not at all."""
        write_atomically(Path(path), self.to_json().encode())

    @classmethod
    def load(cls, location: str | Path, allow_pipe: bool = False) -> Manifest:
        """Read a manifest.

        Args:
            location: A file, a folder that holds `manifest.json`, a URL (`file:`, `https://`,
                `s3://`, ...), or `pipe:` and a command with `{}` where the file's name belongs,
                such as `pipe:ssh host cat /data/egoclip/{}`.
            allow_pipe: The location may be a command. Nothing within a manifest ever is.

        Raises:
            ValueError: It is missing, no manifest of this format, or a command that is not allowed.
        """
        place = str(location)
        check_location(place, allow_pipe)
        if scheme_of(place) == "pipe" and "{}" not in place:
            raise ValueError(f"{place!r:.200} has no {{}} where the file's name belongs")
        root = place if "{}" in place else place.rpartition("/")[0]
        place = place.replace("{}", MANIFEST_NAME)
        if not is_remote(place) and Path(place).is_dir():
            root, place = place, str(Path(place) / MANIFEST_NAME)
        try:
            content = json.loads(read_bytes(place))
        except StorageUnavailable:
            raise
        except OSError as error:
            raise ValueError(
                f"no manifest at {place} ({error}); `eva02-at shards build` writes one"
            ) from error
        except ValueError as error:
            raise ValueError(f"{place} is not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(
                f"{place} is no manifest of format {FORMAT!r}; write one with "
                "`eva02-at shards build`, or for existing tars with its --index-only"
            )
        fault = manifest_fault(content)
        if fault is not None:
            raise ValueError(f"{place} is no manifest that can be used: {fault}")
        return cls(
            root=root,
            shards=tuple(Shard(**shard) for shard in content["shards"]),
            options=content["options"],
            source=content["source"],
        )

    def load_index(self, number: int, cache: FileCache | None = None) -> ShardIndex:
        """Read the index of one shard.

        Args:
            number: Which.
            cache: Keeps a copy of a remote one.

        Raises:
            ValueError: It is missing, damaged, or belongs to another build; `WrongManifest` if it
                is what the manifest names and holds another number of samples.
        """
        shard = self.shards[number]
        where = self.url(shard.index)
        try:
            if cache is not None and is_remote(where):
                with cache.open(where, shard.index_sha256) as file:
                    data = file.read()
            else:
                data = read_bytes(where)
        except StorageUnavailable:
            raise
        except OSError as error:
            raise ValueError(f"cannot read {where}: {error}") from error
        if hashlib.sha256(data).hexdigest() != shard.index_sha256:
            raise ValueError(
                f"{where} is not the file that the manifest names (its SHA-256 differs); copy it "
                "again or rebuild the manifest"
            )
        index = ShardIndex.from_bytes(data, where)
        if len(index) != shard.num_samples:
            raise WrongManifest(
                f"the manifest says that {shard.name} holds {shard.num_samples} samples, its index "
                f"{shard.index} {len(index)}; write the manifest anew"
            )
        return index


def load_records(manifest: Manifest) -> list[ClipRecord]:
    """Read the metadata of all clips, in `clip_index` order.

    For data sets of some hundred thousand clips (EK-100: 67,217 in well under a second); the
    training stream of larger ones never needs it.

    Raises:
        ValueError: An index cannot be read, or two clips have one name.
    """
    records: list[ClipRecord] = []
    seen: dict[str, str] = {}
    for number, shard in enumerate(manifest.shards):
        index = manifest.load_index(number)
        for row in range(len(index)):
            record = index.record(row)
            if record.clip_id in seen:
                raise ValueError(
                    f"{seen[record.clip_id]} and {shard.name} both hold a clip "
                    f"{record.clip_id!r:.200}; index the tars anew with `eva02-at shards build "
                    "--index-only`, which tells them apart"
                )
            seen[record.clip_id] = shard.name
            records.append(record)
    return records
