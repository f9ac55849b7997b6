"""Finding the newest checkpoint that may be loaded; all ranks look together and agree."""

from __future__ import annotations

import errno
import logging
from collections.abc import Sequence
from pathlib import Path

from lightning_modules.checkpoints.plain_data import foreign_content, plain_data_only
from lightning_modules.training.run.agreement import Ranks
from lightning_modules.training.run.checkpoint_store import (
    MANIFEST,
    CheckpointFolder,
    FileRecord,
    Manifest,
    check_contents,
    check_sizes,
    is_of_the_machine,
)

log = logging.getLogger(__name__)

_NOT_PICKLED = {".safetensors", ".json", ".yaml"}


def resolve_checkpoint(path: str | Path, ranks: Ranks) -> tuple[Path, Manifest]:
    """Return the checkpoint folder to load for `path`, verified, the same on every rank.

    Each rank hashes its share of the files, so that verifying takes one reading of the checkpoint
    however many ranks there are.

    Args:
        path: A checkpoint folder, or the folder of a run's checkpoints, of which the newest
            complete one is taken; incomplete and damaged ones are skipped with a warning.
        ranks: All ranks of the run.

    Raises:
        ValueError: No checkpoint there is complete.
        OSError: They cannot be read now, which says nothing about them.
    """
    path = Path(path)
    found = None
    with ranks.together(f"looking for checkpoints in {path}"):
        if ranks.rank == 0:
            found = (path / MANIFEST).is_file(), CheckpointFolder(path).candidates()
    single, names = ranks.first(found)
    root = path
    if single:
        root, names = path.parent, [path.name]
    complaints = []
    for name in names:
        complaint = verify(root / name, ranks)
        if complaint is None:
            with ranks.together(f"reading {root / name}"):
                manifest = Manifest.read(root / name)
            return root / name, manifest
        complaints.append(complaint)
        if ranks.rank == 0:
            log.warning("checkpoint skipped: %s", complaint)
    if any(f"[Errno {errno.EIO}]" in complaint for complaint in complaints):
        raise OSError(f"no checkpoint in {path} can be read: {'; '.join(complaints)}")
    raise ValueError(
        f"no complete checkpoint in {path}: {'; '.join(complaints) or 'the folder has none'}. "
        "Mend: name another one with --ckpt_path, or start anew in another run_dir"
    )


def verify(folder: Path, ranks: Ranks) -> str | None:
    """Return what is wrong with a checkpoint, agreed on by all ranks, or None.

    Whole, unchanged, and of its pickles none that holds more than tensors and plain data.

    Raises:
        OSError: The machine, not the checkpoint, is at fault (a stale mount, say): it must not be
            passed over for an older one. A read error is the checkpoint's own.
    """
    complaint, passes = None, False
    try:
        manifest = Manifest.read(folder)
        check_sizes(folder, manifest)
        share = manifest.files[ranks.rank :: ranks.size]
        check_contents(folder, share)
        _check_plain(folder, share, deepspeed=manifest.strategy != "plain")
    except Exception as error:
        complaint = str(error) or type(error).__name__
        passes = is_of_the_machine(error)
    told = [(why, p) for why, p in ranks.gather((complaint, passes)) if why is not None]
    if any(p for _, p in told):
        raise OSError(f"cannot read {folder} now: {next(why for why, p in told if p)}")
    return told[0][0] if told else None


def _check_plain(folder: Path, records: Sequence[FileRecord], deepspeed: bool) -> None:
    with plain_data_only(deepspeed=deepspeed):
        for record in records:
            if Path(record.path).suffix in _NOT_PICKLED:
                continue
            told = foreign_content(folder / record.path)
            if told is not None:
                raise ValueError(
                    f"{folder.name}: {record.path} {told}; a pickle can run any code, and only "
                    "tensors and plain data are read"
                )
