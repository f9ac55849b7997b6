"""What is to be built, where its sources lie, and how much of it may be missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.manifest import ClipRecord
from datamodules.shards.layouts import Listing, VideoLayout
from datamodules.shards.rejects import check_rejects
from datamodules.shards.writer import shard_name, write_shard
from datamodules.video.encode import EncodedClip, EncodeOptions, encode_clip
from datamodules.video.frames import Limits
from datamodules.video.pieces import Piece, RejectedClip
from datamodules.video.workers import Job

_SHOWN_PATHS = 3


@dataclass(frozen=True)
class Survey:
    """What is there of the sources.

    Attributes:
        found: Each clip whose source is there, and its length in seconds.
        rejects: Rows, and clips without a source or a span.
        looked_for: The first paths that are not there.
    """

    found: list[tuple[ClipRecord, float]]
    rejects: list[dict[str, Any]]
    looked_for: list[str]


@dataclass(frozen=True)
class BuildPlan:
    """What is to be built: the arguments of `build_shards` that decide the bytes.

    Attributes:
        clips: The annotations; ids must be unique.
        videos: Folder of the source videos.
        layout: Where a video lies in it.
        output: Folder to write to.
        options: How clips are stored.
        samples_per_shard: Annotation rows a shard.
        lost_rows: Rejects of the reader: rows of the annotations that are no clips.
        max_rejects: Share of rows and clips that may be rejected.
        limits: What a source may declare.

    Raises:
        ValueError: No clips, an id twice, a missing video folder.
    """

    clips: Sequence[ClipRecord]
    videos: Path
    layout: VideoLayout
    output: Path
    options: EncodeOptions
    samples_per_shard: int
    lost_rows: Sequence[dict[str, Any]] = ()
    max_rejects: float = 1.0
    limits: Limits = Limits()  # noqa: RUF009 - frozen
    files: Listing = field(default_factory=Listing, repr=False)

    def __post_init__(self) -> None:
        if not self.clips:
            raise ValueError("there are no clips to build; the annotations are empty")
        if not self.videos.is_dir():
            raise ValueError(f"video folder {self.videos} does not exist; give an existing one")
        if self.samples_per_shard < 1:
            raise ValueError(f"samples_per_shard is {self.samples_per_shard}; at least 1 is needed")
        seen: set[str] = set()
        for record in self.clips:
            if record.clip_id in seen:
                raise ValueError(f"clip id {record.clip_id!r} occurs twice; ids must be unique")
            seen.add(record.clip_id)

    @property
    def num_shards(self) -> int:
        """Shards of the finished data set, those without a single good clip included."""
        return -(-len(self.clips) // self.samples_per_shard)

    def share(self, number: int) -> Sequence[ClipRecord]:
        """Annotation rows of a shard."""
        start = number * self.samples_per_shard
        return self.clips[start : start + self.samples_per_shard]

    def find(self, record: ClipRecord) -> tuple[list[Piece], float, float]:
        """Return the source files of a clip and its span.

        Raises:
            RejectedClip: The span is empty or its file is missing.
        """
        start_s, end_s = max(0.0, record.start_s), record.end_s
        if end_s <= start_s:
            raise RejectedClip(f"empty: the span is {start_s:.2f}-{end_s:.2f} s")
        pieces = self.layout.pieces(self.videos, record.video_id, start_s, end_s, self.files)
        return pieces, start_s, end_s

    def survey(self) -> Survey:
        """Look for every clip's source, without opening one."""
        found, rejects = [], list(self.lost_rows)
        for record in self.clips:
            try:
                _, start_s, end_s = self.find(record)
                found.append((record, end_s - start_s))
            except RejectedClip as error:
                rejects.append(
                    {
                        "clip_id": record.clip_id,
                        "video_id": record.video_id,
                        "reason": str(error),
                    }
                )
        return Survey(found, rejects, self._looked_for(rejects))

    def _looked_for(self, rejects: Sequence[dict[str, Any]]) -> list[str]:
        names = dict.fromkeys(
            str(self.videos / name)
            for kind, _, name in (reject["reason"].partition(": ") for reject in rejects)
            if kind == "missing"
        )
        return list(names)[:_SHOWN_PATHS]

    def check(self, rejects: Sequence[dict[str, Any]], total: int) -> None:
        """Refuse to go on if too much of what was looked at is rejected; see `check_rejects`."""
        paths = self._looked_for(rejects)
        hints = [f"Looked for {', '.join(paths)}."] if paths else []
        check_rejects(rejects, total, self.max_rejects, hints)

    def encode(self, record: ClipRecord) -> EncodedClip:
        """Make one clip.

        Raises:
            RejectedClip: With the reason.
        """
        return encode_clip(*self.find(record), self.options, self.limits)

    def build_shard(self, job: Job, begin: Callable[[str | None], None]) -> list[dict[str, str]]:
        """Build one shard, in a child process; returns what is not in it."""

        def encode(record: ClipRecord) -> EncodedClip:
            if record.clip_id in job.crashed:
                raise RejectedClip(job.crashed[record.clip_id])
            return self.encode(record)

        first_row = job.number * self.samples_per_shard
        share = self.share(job.number)
        name = shard_name(job.number)
        return write_shard(self.output, name, first_row, share, encode, begin).rejects
