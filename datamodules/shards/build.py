"""`build_shards`: annotations and videos to a resumable, reproducible set of shards.

Shard k holds the clips of annotation rows [k * n, (k + 1) * n) that could be made. Shards do not
depend on each other, so they are built in parallel, by any number of machines, in any order, and a
build that was killed goes on with the shards that are not finished.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from operator import attrgetter
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
from datamodules.shards.layouts import VideoLayout
from datamodules.shards.plan import BuildPlan
from datamodules.shards.rejects import REJECTS_NAME, write_rejects
from datamodules.shards.writer import shard_name
from datamodules.video.encode import EncodeOptions
from datamodules.video.frames import Limits
from datamodules.video.workers import ITEM_LIMIT_S, Job, run_jobs

_ENOUGH_ROWS = 10_000  # of which the share of rejects says something about the rest
_LOCK_WAIT_S = 2.0
_FIELDS = attrgetter(*(column.name for column in fields(ClipRecord)))


@dataclass(frozen=True)
class BuildReport:
    """What a build left behind.

    Attributes:
        manifest: Path of the manifest; None while other parts of the build are unfinished.
        num_clips: Clips in the finished shards.
        num_rejected: Clips that could not be made, all listed in `rejects.jsonl`.
        num_shards: Finished shards.
        num_bytes: Their size.
    """

    manifest: Path | None
    num_clips: int
    num_rejected: int
    num_shards: int
    num_bytes: int

    def __str__(self) -> str:
        lines = [
            f"{self.num_clips} clips in {self.num_shards} shards, {self.num_bytes / 1e6:.1f} MB; "
            f"{self.num_rejected} rejected"
        ]
        if self.manifest is None:
            return "\n".join([*lines, "the manifest is written when all parts are built"])
        if self.num_rejected:
            lines.append(f"reasons in {self.manifest.with_name(REJECTS_NAME)}")
        return "\n".join([*lines, f"manifest: {self.manifest}"])


def build_shards(
    clips: Sequence[ClipRecord],
    *,
    videos: str | Path,
    layout: VideoLayout,
    output: str | Path,
    options: EncodeOptions | None = None,
    source: dict[str, Any] | None = None,
    samples_per_shard: int = 1000,
    num_workers: int = 1,
    part: tuple[int, int] = (0, 1),
    progress: bool = False,
    lost_rows: Sequence[dict[str, Any]] = (),
    max_rejects: float = 1.0,
    limits: Limits | None = None,
) -> BuildReport:
    """Build the shards of a data set, or go on with a build that was stopped.

    The bytes depend on the clips, the videos and the options alone: not on the workers, the parts,
    or how often the build was killed.

    Args:
        clips: The annotations; ids must be unique.
        videos: Folder of the source videos.
        layout: Where a video lies in it.
        output: Folder to write to.
        options: How clips are stored.
        source: What to note about the annotations in the manifest (file name, format).
        samples_per_shard: Annotation rows a shard; 1,000 clips of 200 kB make 200 MB.
        num_workers: Processes that make clips.
        part: (i, n): build only the shards k with k % n == i. Whichever part finds all shards
            finished writes the manifest.
        progress: Show a progress bar.
        lost_rows: Rejects of the annotations' reader, to be listed with the others.
        max_rejects: Share of rows and clips above which the build ends: before it begins if
            already the sources are missing, else as soon as 10,000 rows show it, or at the end.
        limits: What a source may declare.

    Raises:
        ValueError: No clips, an id twice, a missing video folder, another build in the same
            folder, or too many rejects.
    """
    plan = BuildPlan(
        clips,
        Path(videos),
        layout,
        Path(output),
        options or EncodeOptions(),
        samples_per_shard,
        lost_rows,
        max_rejects,
        limits or Limits(),
    )
    if num_workers < 1:
        raise ValueError(f"num_workers is {num_workers}; at least 1 is needed")
    if not 0 <= part[0] < part[1]:
        raise ValueError(f"part {part[0]} of {part[1]}: parts count from 0")
    if max_rejects < 1:
        plan.check(plan.survey().rejects, len(clips) + len(lost_rows))
    with _exclusive(plan.output, part):
        recipe = _pin_recipe(plan, source or {})
        todo = [
            Job(number, None)
            for number in range(part[0], plan.num_shards, part[1])
            if not _is_finished(plan.output, number)
        ]
        bar = tqdm(
            total=sum(len(plan.share(job.number)) for job in todo),
            unit="clip",
            desc="shards",
            disable=not progress,
        )
        rejects, rows = list(plan.lost_rows), len(plan.lost_rows)
        with bar:
            for event in run_jobs(plan.build_shard, todo, num_workers, ITEM_LIMIT_S):
                bar.update(event.item is not None)
                if event.item is None:
                    rejects += event.result
                    rows += len(plan.share(event.job.number))
                    if rows >= _ENOUGH_ROWS:
                        plan.check(rejects, rows)
    return collect_manifest(plan, recipe)


def parse_part(text: str) -> tuple[int, int]:
    """Read `I/N`, such as `0/8`.

    Raises:
        ValueError: The text is no such thing.
    """
    number, slash, total = text.partition("/")
    if not (slash and number.isdecimal() and total.isdecimal()):
        raise ValueError(f"--part {text!r}: write I/N, such as 0/8")
    return int(number), int(total)


def collect_manifest(plan: BuildPlan, recipe: dict[str, Any]) -> BuildReport:
    """Write manifest and rejects file if all shards are finished; report either way.

    Raises:
        ValueError: Nothing could be made, or too much is rejected.
    """
    output = plan.output
    shards: list[Shard] = []
    rejects: list[dict[str, Any]] = list(plan.lost_rows)
    finished = 0
    for number in range(plan.num_shards):
        path = output / index_name(shard_name(number))
        if not path.is_file():
            continue
        data = path.read_bytes()
        index = ShardIndex.from_bytes(data, str(path))
        finished += 1
        rejects += index.rejects
        if len(index):
            digest = hashlib.sha256(data).hexdigest()
            name = shard_name(number)
            shards.append(Shard(name, path.name, len(index), **index.tar, index_sha256=digest))
    manifest = None
    if finished == plan.num_shards:
        write_rejects(output, rejects)
        if not shards:
            raise ValueError(
                f"none of the {len(rejects)} clips could be made; the first: {rejects[0]}. "
                f"See {output / REJECTS_NAME}; check the video folder and the layout"
            )
        plan.check(rejects, len(plan.clips) + len(plan.lost_rows))
        manifest = output / MANIFEST_NAME
        Manifest("", tuple(shards), recipe["options"], recipe["source"]).save(manifest)
    return BuildReport(
        manifest,
        num_clips=sum(shard.num_samples for shard in shards),
        num_rejected=len(rejects),
        num_shards=finished,
        num_bytes=sum(shard.num_bytes for shard in shards),
    )


def _is_finished(output: Path, number: int) -> bool:
    tar = output / shard_name(number)
    return (output / index_name(tar.name)).is_file() and tar.is_file()


def _pin_recipe(plan: BuildPlan, source: dict[str, Any]) -> dict[str, Any]:
    """Write down what is being built; refuse to go on in a folder that holds something else."""
    digest = hashlib.sha256()
    for record in plan.clips:
        digest.update(json.dumps(_FIELDS(record)).encode())
    layout = {"pattern": plan.layout.pattern, "chunk_s": plan.layout.chunk_s}
    recipe = {
        "options": {**asdict(plan.options), "samples_per_shard": plan.samples_per_shard},
        "source": {
            **source,
            "layout": layout,
            "num_clips": len(plan.clips),
            "clips_sha256": digest.hexdigest(),
        },
    }
    path = plan.output / "build.json"
    if path.is_file():
        found = json.loads(path.read_text())
        if found != recipe:
            changed = [
                f"{group}.{key}"
                for group in recipe
                for key in {*recipe[group], *found.get(group, {})}
                if recipe[group].get(key) != found.get(group, {}).get(key)
            ]
            raise ValueError(
                f"{plan.output} holds a build with another {', '.join(sorted(changed))}; use "
                "another output folder, or remove this one"
            )
    write_atomically(path, (json.dumps(recipe, indent=1) + "\n").encode())
    return recipe


@contextlib.contextmanager
def _exclusive(output: Path, part: tuple[int, int]) -> Iterator[None]:
    """Hold the folder's lock of this part, so that the same part does not run twice."""
    output.mkdir(parents=True, exist_ok=True)
    with (output / f".part-{part[0]}-of-{part[1]}.lock").open("w") as lock:
        # the children of a killed build hold the lock, too, for the moment that they outlive it
        deadline = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"part {part[0]} of {part[1]} of {output} is being built by another "
                        "process; let it finish, or stop it"
                    ) from error
                time.sleep(0.05)
        yield
