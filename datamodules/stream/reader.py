"""Random access to the samples of one or several manifests."""

from __future__ import annotations

import errno
import hashlib
import os
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datamodules.files import open_plain_file
from datamodules.manifest import ClipRecord, Manifest, Shard, ShardIndex, WrongManifest
from datamodules.stream.cache import FileCache
from datamodules.stream.retry import Retry, StorageUnavailable, is_infrastructure, wait_out
from datamodules.stream.stores import is_remote, local_path
from datamodules.video.decode import DamagedSample

MAX_OPEN_SHARDS = 256


@dataclass(frozen=True)
class Corpus:
    """Several manifests seen as one list of shards.

    Attributes:
        manifests: The sets, in order.
        weights: How often each set is seen in an epoch.
    """

    manifests: tuple[Manifest, ...]
    weights: tuple[float, ...]

    @classmethod
    def load(
        cls,
        locations: Sequence[str],
        weights: Sequence[float] | None = None,
        allow_pipe: bool = False,
    ) -> Corpus:
        """Read the manifests.

        Args:
            locations: As `Manifest.load` takes them.
            weights: How often each set is seen in an epoch.
            allow_pipe: Locations may be commands.

        Raises:
            ValueError: None is given, one cannot be read, or the weights are not one a manifest.
        """
        if not locations:
            raise ValueError("no manifest is given; name at least one")
        if weights is not None and len(weights) != len(locations):
            raise ValueError(
                f"{len(weights)} weights for {len(locations)} manifests; give one each"
            )
        manifests = tuple(Manifest.load(location, allow_pipe) for location in locations)
        return cls(manifests, tuple(weights or [1.0] * len(manifests)))

    @cached_property
    def counts(self) -> list[int]:
        """Samples in each shard."""
        return [shard.num_samples for manifest in self.manifests for shard in manifest.shards]

    @cached_property
    def shard_weights(self) -> list[float]:
        """Weight of each shard."""
        return [
            weight
            for manifest, weight in zip(self.manifests, self.weights, strict=True)
            for _ in manifest.shards
        ]

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(S + 1,) global row of each shard's first sample: `clip_index` = starts[shard] + row."""
        return np.concatenate([[0], np.cumsum(self.counts, dtype=np.int64)])

    @cached_property
    def _shards(self) -> list[tuple[Manifest, int]]:
        return [(m, number) for m in self.manifests for number in range(len(m.shards))]

    def shard(self, number: int) -> tuple[Manifest, int]:
        """Return the manifest of a shard and its number there."""
        return self._shards[number]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the manifests and their weights."""
        parts = zip(self.manifests, self.weights, strict=True)
        text = " ".join(f"{manifest.fingerprint}*{weight!r}" for manifest, weight in parts)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class MissingShard(DamagedSample):
    """A sample's whole shard cannot be used: one fault, not one for each of its samples."""


def _is_unmounted(root: str) -> bool:
    """True where a folder with a manifest is gone, or empty as a mount point without its mount."""
    try:
        return not any(local_path(root).iterdir())
    except OSError:
        return True


@dataclass(frozen=True)
class StoredSample:
    """A sample as it lies in its shard.

    Attributes:
        key: Its name in the tar.
        record: Its metadata.
        video: The bytes of its mp4, checked.
    """

    key: str
    record: ClipRecord
    video: bytes


class SampleReader:
    """Reads samples by (shard, row) with one `pread` each; keeps the files in use open.

    Each process needs one of its own; a copy made by fork or pickle starts with nothing open.

    Args:
        corpus: What to read.
        cache: Where remote shards go; needed if there are any.
        retry: How long to wait for local files whose file system fails: what is read late is the
            same sample, so that the order never changes for it.

    Raises:
        ValueError: A shard is remote and there is no cache.
    """

    def __init__(
        self, corpus: Corpus, cache: FileCache | None = None, retry: Retry | None = None
    ) -> None:
        self.corpus, self.cache, self.retry = corpus, cache, retry or Retry()
        self._pid = 0
        self._open: OrderedDict[int, tuple[int, ShardIndex]] = OrderedDict()
        self._given_up: dict[int, str] = {}
        remote = [m.root for m in corpus.manifests if is_remote(m.root)]
        if remote and cache is None:
            raise ValueError(
                f"{remote[0]} is remote: name a folder for copies of its shards with "
                "data.init_args.cache_dir (evaluate: --cache-dir)"
            )

    def close(self) -> None:
        """Close the files that this process opened."""
        if self._pid == os.getpid():  # after a fork they are the parent's
            for descriptor, _ in self._open.values():
                os.close(descriptor)
        self._open = OrderedDict()

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        fresh = {"_pid": 0, "_open": OrderedDict(), "_given_up": {}}
        return {"corpus": self.corpus, "cache": self.cache, "retry": self.retry, **fresh}

    def name(self, shard: int) -> str:
        """Where a shard lies."""
        manifest, number = self.corpus.shard(shard)
        return manifest.url(manifest.shards[number].name)

    def describe(self, shard: int, row: int) -> str:
        """Name a sample for a log line: key, clip id and tar."""
        manifest, number = self.corpus.shard(shard)
        name = manifest.url(manifest.shards[number].name)
        try:
            index = self._shard(shard)[1]
            return f"{index.key(row)} (clip {index.record(row).clip_id}) of {name}"
        except (DamagedSample, ValueError):
            return f"row {row} of {name}"

    def read(self, shard: int, row: int) -> StoredSample:
        """Read one sample.

        Raises:
            DamagedSample: It is missing, cut short, or not what was stored (CRC-32).
            StorageUnavailable: The file system failed for longer than `retry` waits.
        """
        index, place, video = self._read(shard, row)
        size = int(place["video_bytes"])
        if len(video) != size:
            raise DamagedSample(f"truncated: {len(video)} of {size} bytes")
        if zlib.crc32(video) != place["crc32"]:
            raise DamagedSample("checksum: the bytes are not those that were stored")
        try:
            return StoredSample(index.key(row), index.record(row), video)
        except ValueError as error:
            raise DamagedSample(str(error)) from error

    def _read(self, shard: int, row: int) -> tuple[ShardIndex, Any, bytes]:
        manifest, number = self.corpus.shard(shard)

        def attempt() -> tuple[ShardIndex, Any, bytes]:
            descriptor, index = self._shard(shard)
            place = index.rows[row]
            try:
                video = os.pread(descriptor, int(place["video_bytes"]), int(place["video_offset"]))
            except OSError:
                os.close(self._open.pop(shard)[0])  # a stale one stays stale
                raise
            return index, place, video

        try:
            return wait_out(attempt, manifest.url(manifest.shards[number].name), self.retry)
        except StorageUnavailable:
            raise
        except OSError as error:
            raise DamagedSample(f"unreadable: {error}") from error

    def _shard(self, number: int) -> tuple[int, ShardIndex]:
        if self._pid != os.getpid():
            self.close()
            self._pid = os.getpid()
        if number in self._open:
            self._open.move_to_end(number)
            return self._open[number]
        if number in self._given_up:
            raise MissingShard(self._given_up[number])
        manifest, local = self.corpus.shard(number)
        try:
            index = manifest.load_index(local, self.cache)
            descriptor = self._open_tar(manifest, manifest.shards[local])
        except (WrongManifest, StorageUnavailable):
            # nothing is damaged: the order of samples rests on wrong numbers, or the store is away
            raise
        except (OSError, ValueError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, OSError) and not is_remote(manifest.root):
                if is_infrastructure(cause):
                    raise cause from None
                if isinstance(cause, FileNotFoundError) and _is_unmounted(manifest.root):
                    raise OSError(errno.ESTALE, f"{manifest.root} is not mounted") from None
            # not tried again for each of its samples: a remote one has had its retries
            self._given_up[number] = f"unreadable: {error}"
            raise MissingShard(self._given_up[number]) from error
        self._open[number] = descriptor, index
        if len(self._open) > MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
        return descriptor, index

    def _open_tar(self, manifest: Manifest, shard: Shard) -> int:
        where = manifest.url(shard.name)
        if self.cache is not None and is_remote(where):
            with self.cache.open(where, shard.sha256) as file:
                return os.dup(file.fileno())
        return open_plain_file(local_path(where))
