"""A directory of checkpoints in which only complete, undamaged ones count. Plain files, no torch.

    checkpoints/
      latest                    name of the newest complete checkpoint (replaced atomically)
      step-00000400/
        manifest.json           files, sizes, SHA-256, step, world size ...: written last
        state ...               what the strategy wrote: one file, or a DeepSpeed directory
        config.yaml             the recipe that it was trained with
      .tmp-1-step-00000500/     being written, or left over from a process that died
      .replaced-step-00000400/  one of the same step, until the new one is in its place

DeepSpeed notices neither a flipped bit nor files of two steps side by side, so completeness is
judged here and before anything is loaded.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

MANIFEST, LATEST, STATE, UNIVERSAL = "manifest.json", "latest", "state", "universal"
RECIPE = "config.yaml"  # the resolved recipe, in a run's folder and in each checkpoint
FOLDER_KEY = "eva02_at_folder"  # tells callbacks which checkpoint folder was loaded
_TEMPORARY, _TRASH, _REPLACED = ".tmp-", ".trash-", ".replaced-"


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint: path relative to it, size in bytes, SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint consists of and where in the run it was taken.

    Attributes:
        step: Optimiser steps done.
        epoch: Epoch in progress.
        world_size: Ranks that wrote it.
        strategy: `plain` or `zero1` .. `zero3`.
        metrics: Metrics at that time, for keep-best.
        files: Every file but the manifest itself.
    """

    step: int
    epoch: int
    world_size: int
    strategy: str
    metrics: dict[str, float] = field(default_factory=dict)
    files: list[FileRecord] = field(default_factory=list)

    @staticmethod
    def read(folder: Path) -> Manifest:
        """Read the manifest of a checkpoint folder.

        Raises:
            ValueError: There is none, or it cannot be understood: the checkpoint is incomplete.
        """
        try:
            raw: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
            return Manifest(**{**raw, "files": [FileRecord(**row) for row in raw["files"]]})
        except FileNotFoundError as error:
            raise ValueError(f"{folder.name}: no {MANIFEST}, it was never completed") from error
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{folder.name}: unreadable {MANIFEST} ({error})") from error

    def write(self, folder: Path) -> None:
        """Write it into a checkpoint folder and flush it to the disk."""
        _write_durably(folder / MANIFEST, json.dumps(asdict(self), indent=1))


def file_record(root: Path, path: Path) -> FileRecord:
    """Flush a file that was just written to the disk and describe it."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(str(path.relative_to(root)), file.tell(), digest)


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Raise ValueError where a file is missing or has another size than the manifest says."""
    for record in manifest.files:
        path = folder / record.path
        if not path.is_file():
            raise ValueError(f"{folder.name}: {record.path} is missing")
        if path.stat().st_size != record.size:
            raise ValueError(
                f"{folder.name}: {record.path} has {path.stat().st_size} bytes, not {record.size}"
            )


def check_contents(folder: Path, records: Iterable[FileRecord]) -> None:
    """Raise ValueError where a file's contents are not those that were written."""
    for record in records:
        with (folder / record.path).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != record.sha256:
                raise ValueError(f"{folder.name}: the contents of {record.path} have changed")


_OF_THE_FILE = (None, errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL)


def is_of_the_machine(error: BaseException | None) -> bool:
    """Whether an error or what it was raised from (a stale mount, say) says nothing of the file.

    A checkpoint may not be passed over for it. A read error is the file's own.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno not in _OF_THE_FILE:
            return True
        error = error.__cause__
    return False


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a file of tensors, with what the storage says where it fails.

    safetensors says that there is no such file whatever made it impossible to open one.

    Raises:
        OSError: The storage fails.
        FileNotFoundError: There is no such file.
        safetensors.SafetensorError: The file is damaged.
    """
    path.open("rb").close()
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise OSError(errno.ESTALE, "it was there and cannot be opened any more", path) from error


class CheckpointFolder:
    """The checkpoints of one run; every method that writes is for one process at a time.

    A process that was declared dead may wake and write on. Its `check` comes last before the
    rename that makes a checkpoint count, and `clean`, with which its successor begins, takes away
    what it would rename: whichever comes first, the successor sees the checkpoint or it never is.

    Args:
        root: The folder.
        owner: Number of the run's owner: no two write under the same temporary name.
        check: Raises OSError where the run has been taken over.
    """

    def __init__(
        self, root: str | Path, owner: int = 0, check: Callable[[], None] = lambda: None
    ) -> None:
        self.root, self.owner, self.check = Path(root), owner, check

    def temporary(self, name: str) -> Path:
        """Where the checkpoint `name` is written before it counts."""
        return self.root / f"{_TEMPORARY}{self.owner}-{name}"

    def begin(self, name: str) -> Path:
        """Make the empty folder in which the checkpoint `name` is to be written."""
        self.check()
        self.discard(name)
        folder = self.temporary(name)
        folder.mkdir(parents=True)
        return folder

    def discard(self, name: str) -> None:
        """Remove what was written of a checkpoint that failed."""
        shutil.rmtree(self.temporary(name), ignore_errors=True)

    def commit(self, name: str, manifest: Manifest) -> Path:
        """Make the written checkpoint count: manifest, rename, then the `latest` pointer."""
        folder, final = self.temporary(name), self.root / name
        pointer = self.root / f".{LATEST}-{self.owner}"
        # everything that needs disk space comes before the first rename
        _write_durably(pointer, name + "\n")
        manifest.write(folder)
        self.check()
        replaced = self.root / f"{_REPLACED}{name}"
        if final.exists():  # of the same step: before its validation, or damaged
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        try:
            folder.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        _sync_folder(self.root)
        pointer.replace(self.root / LATEST)
        _sync_folder(self.root)
        shutil.rmtree(replaced, ignore_errors=True)
        return final

    def names(self) -> list[str]:
        """Names of all checkpoints with a manifest, oldest first."""
        return sorted(path.parent.name for path in self.root.glob(f"step-*/{MANIFEST}"))

    def candidates(self) -> list[str]:
        """Checkpoints to try on resume, best first: the `latest` pointer's, then newest first."""
        names = sorted((p.name for p in self.root.glob("step-*") if p.is_dir()), reverse=True)
        replaced = sorted((p.name for p in self.root.glob(f"{_REPLACED}step-*")), reverse=True)
        # a process died between the two renames of a commit
        names += [name for name in replaced if name.removeprefix(_REPLACED) not in names]
        try:
            pointed = (self.root / LATEST).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return names
        return sorted(names, key=lambda name: name != pointed)

    def clean(self) -> None:
        """Remove what processes that died left half written or half removed."""
        for path in self.root.glob(f"{_REPLACED}*"):
            final = self.root / path.name.removeprefix(_REPLACED)
            if final.exists():
                self._remove(path)
            else:
                path.rename(final)
        for pointer in self.root.glob(f".{LATEST}*"):
            pointer.unlink(missing_ok=True)
        for path in self.root.glob(f"{_TEMPORARY}*"):
            self._remove(path)  # at one blow: what is half removed could still be renamed
        for path in self.root.glob(f"{_TRASH}*"):
            shutil.rmtree(path, ignore_errors=True)

    def metrics(self) -> dict[str, dict[str, float]]:
        """Metrics of every checkpoint whose manifest can be read, oldest first."""
        found = {}
        for name in self.names():
            try:
                found[name] = Manifest.read(self.root / name).metrics
            except ValueError:
                continue  # damaged: neither counted among the newest nor the best
        return found

    def prune(self, keep_last: int, keep_best: int, monitor: str | None, mode: str) -> list[str]:
        """Remove all but the newest `keep_last` and the best `keep_best`; returns the removed.

        Args:
            keep_last: How many of the newest stay; 0 or less keeps all.
            keep_best: How many of the best by `monitor` stay besides.
            monitor: Name of the metric in the manifests.
            mode: `max` or `min`.
        """
        if keep_last <= 0:
            return []
        metrics = self.metrics()
        keep = set(list(metrics)[-keep_last:])
        if monitor is not None and keep_best > 0:
            sign = 1.0 if mode == "max" else -1.0
            scored = {name: row[monitor] for name, row in metrics.items() if monitor in row}
            finite = [name for name, value in scored.items() if math.isfinite(value)]
            keep |= set(sorted(finite, key=lambda name: sign * scored[name])[-keep_best:])
        removed = [name for name in metrics if name not in keep]
        for name in removed:
            self._remove(self.root / name)
        return removed

    def _remove(self, folder: Path) -> None:
        """Rename first, so that a half-removed checkpoint never looks like one."""
        if folder.exists():
            trash = folder.with_name(f"{_TRASH}{folder.name}")
            shutil.rmtree(trash, ignore_errors=True)
            folder.rename(trash)
            shutil.rmtree(trash, ignore_errors=True)


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint of an optimiser step; names sort by step."""
    return f"step-{step:08d}"


def _write_durably(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
