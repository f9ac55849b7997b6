"""Checking shards against their manifest, and leaving the damaged samples out of a new one."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from datamodules.files import write_atomically
from datamodules.manifest import Manifest, Shard, ShardIndex, name_fault
from datamodules.shards.writer import measure
from datamodules.stream.reader import Corpus, SampleReader
from datamodules.stream.stores import is_remote, local_path
from datamodules.video.decode import DamagedSample, decode_frames, decoder_of
from datamodules.video.workers import ITEM_LIMIT_S, Job, run_jobs


@dataclass(frozen=True)
class Fault:
    """Something that is not as the manifest says.

    Attributes:
        shard: Number of the shard.
        row: Row of the sample; None where the tar as a whole is meant.
        name: The sample's or the tar's name.
        reason: What is wrong.
    """

    shard: int
    row: int | None
    name: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def verify(
    manifest: Manifest, *, decode_every: int = 100, num_workers: int = 1, progress: bool = False
) -> list[Fault]:
    """Compare every tar and sample with the manifest, in child processes.

    Args:
        manifest: What should be there; local.
        decode_every: Decode each N-th sample as well; 0 decodes none, 1 all.
        num_workers: Processes.
        progress: Show a progress bar.

    Returns:
        The faults in the manifest's order; empty if all is well.

    Raises:
        ValueError: The shards are remote.
    """
    if is_remote(manifest.root):
        raise ValueError(
            f"{manifest.root} is remote, and what is verified is read whole: copy the shards to a "
            "disk. (In training each copy is compared with its SHA-256 anyway.)"
        )

    def work(job: Job, begin: Callable[[str | None], None]) -> list[Fault]:
        return _verify_shard(manifest, job.number, job.crashed, decode_every, begin)

    found: dict[int, list[Fault]] = {}
    jobs = [Job(number, None) for number in range(len(manifest.shards))]
    with tqdm(total=manifest.num_samples, unit="clip", desc="verify", disable=not progress) as bar:
        for event in run_jobs(work, jobs, num_workers, ITEM_LIMIT_S):
            bar.update(event.item is not None)
            if event.item is None:
                found[event.job.number] = event.result
    return [fault for number in sorted(found) for fault in found[number]]


def repair(manifest: Manifest, faults: list[Fault], path: str | Path) -> Manifest:
    """Write a manifest without the damaged samples; tars stay as they are.

    Args:
        manifest: The manifest that was verified.
        faults: What `verify` found.
        path: Where to write, in the folder of the old manifest: names are relative to it.

    Raises:
        ValueError: Another folder, a name that may not stand in a manifest, or nothing is left.
    """
    path = Path(path)
    if (fault := name_fault(path.name)) is not None:
        raise ValueError(f"{path}: the new indexes are named after it; {fault}")
    root = local_path(manifest.root) if manifest.root else Path()
    if path.parent.resolve() != root.resolve():
        raise ValueError(f"{path} must lie in {root}, where the shards are")
    kept = []
    for number, shard in enumerate(manifest.shards):
        mine = [fault for fault in faults if fault.shard == number]
        whole = next((fault for fault in mine if fault.row is None), None)
        if whole is not None and not local_path(manifest.url(shard.name)).is_file():
            continue
        bad = {fault.row for fault in mine}
        if not mine:
            kept.append(shard)
        elif len(bad - {None}) < shard.num_samples:
            kept.append(_drop_rows(manifest, number, bad, path.stem))
    if not kept:
        raise ValueError("no sample is left; there is nothing to repair")
    result = Manifest(manifest.root, tuple(kept), manifest.options, manifest.source)
    result.save(path)
    return result


def _verify_shard(
    manifest: Manifest,
    number: int,
    crashed: dict[str, str],
    decode_every: int,
    begin: Callable[[str | None], None],
) -> list[Fault]:
    shard = manifest.shards[number]
    reader = SampleReader(Corpus((manifest,), (1.0,)))
    decoder = decoder_of("auto", manifest.options)
    faults = []
    try:
        if measure(local_path(manifest.url(shard.name)))["sha256"] != shard.sha256:
            faults.append(Fault(number, None, shard.name, "its SHA-256 is another"))
        manifest.load_index(number)
    except (OSError, ValueError) as error:
        return [Fault(number, None, shard.name, str(error))]
    for row in range(shard.num_samples):
        begin(str(row))
        try:
            if str(row) in crashed:
                raise DamagedSample(crashed[str(row)])
            sample = reader.read(number, row)
            if decode_every and row % decode_every == 0:
                decode_frames(sample.video, 4, None, decoder)
        except DamagedSample as error:
            faults.append(Fault(number, row, reader.describe(number, row), str(error)))
    return faults


def _drop_rows(manifest: Manifest, number: int, bad: set[int | None], label: str) -> Shard:
    shard, old = manifest.shards[number], manifest.load_index(number)
    keep = [row for row in range(len(old)) if row not in bad]
    tar = measure(local_path(manifest.url(shard.name)))
    new = ShardIndex(old.rows[np.array(keep)], [old.lines[row] for row in keep], tar, old.rejects)
    data = new.to_bytes()
    name = str(PurePosixPath(shard.name).with_suffix(f".{label}.index.npz"))
    write_atomically(local_path(manifest.url(name)), data)
    digest = hashlib.sha256(data).hexdigest()
    return dataclasses.replace(shard, index=name, num_samples=len(keep), index_sha256=digest, **tar)
