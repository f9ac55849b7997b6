"""Finding the newest checkpoint that may be loaded; all ranks look together and agree."""

from __future__ import annotations

import logging
from pathlib import Path

from lightning_modules.training.run.agreement import Ranks
from lightning_modules.training.run.checkpoint_store import (
    MANIFEST,
    CheckpointFolder,
    Manifest,
    check_contents,
    check_sizes,
)

log = logging.getLogger(__name__)


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
    """
    path = Path(path)
    single = ranks.first((path / MANIFEST).is_file())
    root, names = path, ranks.first(CheckpointFolder(path).candidates())
    if single:
        root, names = path.parent, [path.name]
    complaints = []
    for name in names:
        complaint = _verify(root / name, ranks)
        if complaint is None:
            return root / name, Manifest.read(root / name)
        complaints.append(complaint)
        if ranks.rank == 0:
            log.warning("checkpoint skipped: %s", complaint)
    raise ValueError(
        f"no complete checkpoint in {path}: {'; '.join(complaints) or 'the folder has none'}. "
        "Mend: name another one with --ckpt_path, or start anew in another run_dir"
    )


def _verify(folder: Path, ranks: Ranks) -> str | None:
    """Return what is wrong with a checkpoint, agreed on by all ranks, or None."""
    complaint = None
    try:
        manifest = Manifest.read(folder)
        check_sizes(folder, manifest)
        check_contents(folder, manifest.files[ranks.rank :: ranks.size])
    except (ValueError, OSError) as error:
        complaint = str(error)
    return next((told for told in ranks.gather(complaint) if told is not None), None)
