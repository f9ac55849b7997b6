"""A checkpoint on its way to the disk: copied to host memory, then written behind the training.

The copy is all that a step waits for. Writing, hashing and the rename that makes the checkpoint
count happen in a thread; between them the ranks agree, at the end of a later step.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.training.run.agreement import Ranks
from lightning_modules.training.run.checkpoint_store import (
    CheckpointFolder,
    FileRecord,
    Manifest,
    file_record,
)
from lightning_modules.training.run.private import storage_identity

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """One file of a checkpoint that this rank writes.

    Attributes:
        path: Where, in the temporary folder.
        content: What; held by nobody else.
        write: Writes the content to the path.
    """

    path: Path
    content: Any
    write: Callable[[Any, Path], object]


def write_state(state: Any, path: Path) -> None:
    """`torch.save` through a file of Python's, which says why it cannot be written (a full disk).

    Raises:
        OSError: It cannot.
    """
    with path.open("wb") as file:
        kept = _FirstError(file)
        try:
            torch.save(state, kept)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch's, about the position in the file
            raise kept.error or error from error


class _FirstError:
    """A file to write to that keeps the error which torch replaces by one of its own."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


class HostMemory:
    """Host memory for copies of a state, kept from one to the next: one checkpoint is under way.

    Memory that is new to a process costs several times the copy itself, page by page.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[torch.UntypedStorage]] = {}
        self._lent: list[torch.UntypedStorage] = []

    def copy(self, state: Any) -> Any:
        """Copy a nested state, which ends the use of all copies before.

        Tensors that share storage share it in the copy too. Whole storages are copied, as
        `torch.save` writes them.
        """
        free: dict[int, list[torch.UntypedStorage]] = {}
        for storage in self._lent:
            free.setdefault(storage.nbytes(), []).append(storage)
        self._free, self._lent = free, []
        storages: dict[int, torch.UntypedStorage] = {}
        copied = self._copied(state, storages)
        self._free = {}  # of a state that had other sizes
        return copied

    def _copied(self, value: Any, storages: dict[int, torch.UntypedStorage]) -> Any:
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided:
                return value.detach().cpu().clone()
            value = value.detach()
            identity = storage_identity(value)
            if identity not in storages:
                storages[identity] = self._lend(value.untyped_storage())
            place = value.storage_offset(), value.size(), value.stride()
            return torch.empty(0, dtype=value.dtype).set_(storages[identity], *place)
        if isinstance(value, dict):
            twin = copy.copy(value)  # a state_dict's type and its attributes
            for key in twin:
                twin[key] = self._copied(value[key], storages)
            return twin
        if type(value) in (list, tuple):
            return type(value)(self._copied(item, storages) for item in value)
        return copy.deepcopy(value)

    def _lend(self, source: torch.UntypedStorage) -> torch.UntypedStorage:
        waiting = self._free.get(source.nbytes())
        if waiting:
            storage = waiting.pop()
        else:
            pinned = source.device.type == "cuda"  # or the copy goes through pinned memory anyway
            storage = torch.empty(
                source.nbytes(), dtype=torch.uint8, pin_memory=pinned
            ).untyped_storage()
        _bytes(storage).copy_(_bytes(source))  # a storage's own copy_ is several times slower
        self._lent.append(storage)
        return storage


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    """A storage as a flat tensor."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


class Saving:
    """One checkpoint being written. All ranks call its methods in step.

    Args:
        ranks: The ranks of the run.
        store: Where it goes; its temporary folder is there.
        name: The checkpoint's.
        manifest: What it is, still without files.
        pieces: What this rank writes.
        keep: As `CheckpointFolder.prune` takes it.
    """

    def __init__(
        self,
        ranks: Ranks,
        store: CheckpointFolder,
        name: str,
        manifest: Manifest,
        pieces: list[Piece],
        keep: tuple[int, int, str | None, str],
    ) -> None:
        self.name, self.step = name, manifest.step
        self._ranks, self._store, self._manifest, self._keep = ranks, store, manifest, keep
        self._written = False  # on every rank, and agreed on
        self._error: Exception | None = None
        self._result: Any = None
        self._begin(lambda: self._write(pieces))

    @property
    def busy(self) -> bool:
        """This rank is still at work."""
        return self._thread.is_alive()

    def advance(self) -> bool:
        """Take the next stage once this one is done on every rank; True when it is complete.

        Raises:
            OSError: Some rank failed; raised on all of them.
        """
        self.wait()
        doing = f"{'completing' if self._written else 'writing'} {self.name}"
        self._ranks.raise_together(self._error, doing)
        if self._written:
            return True
        self._written = True
        records = self._ranks.gather(self._result)
        self._begin(lambda: self._commit(records) if self._ranks.rank == 0 else None)
        return False

    def wait(self) -> None:
        """Wait for this rank's own work alone."""
        self._thread.join()

    def _begin(self, work: Callable[[], Any]) -> None:
        def run() -> None:
            try:
                self._result = work()
            except Exception as error:  # whatever it is, the other ranks must hear of it
                self._error = error

        self._thread = threading.Thread(target=run, name="checkpoint-writer", daemon=True)
        self._thread.start()

    def _write(self, pieces: list[Piece]) -> list[FileRecord]:
        folder = self._store.temporary(self.name)
        records = []
        while pieces:
            piece = pieces.pop(0)  # its memory is free once it is written
            piece.path.parent.mkdir(parents=True, exist_ok=True)
            piece.write(piece.content, piece.path)
            records.append(file_record(folder, piece.path))
        return records

    def _commit(self, records: list[list[FileRecord]]) -> None:
        folder = self._store.temporary(self.name)
        files = {record.path: record for rows in records for record in rows}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            name = str(path.relative_to(folder))
            if name not in files:  # DeepSpeed copies what is offloaded to NVMe by itself
                files[name] = file_record(folder, path)
        listed = sorted(files.values(), key=lambda record: record.path)
        self._store.commit(self.name, replace(self._manifest, files=listed))
        try:
            self._store.prune(*self._keep)
        except Exception as error:  # this checkpoint is complete; the next one tries again
            log.warning("%s is complete, but older ones stay: %r", self.name, error)
