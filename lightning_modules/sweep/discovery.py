"""From paths and globs to the cells of a sweep."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from lightning_modules.checkpoints.hub import fetch, is_on_hub
from lightning_modules.checkpoints.source import (
    CheckpointSource,
    complete_checkpoints,
    find_checkpoint,
)
from lightning_modules.sweep.plan import KEY_DIGITS, Cell

_STEP = re.compile(r"step[=_-]?(\d+)")


def find_checkpoints(
    patterns: Sequence[str], *, may_be_missing: bool = False
) -> tuple[list[CheckpointSource], dict[str, str]]:
    """Expand globs and runs into checkpoints.

    Args:
        patterns: Paths or globs of files, checkpoints' folders, or runs; a run stands for every
            complete checkpoint it has.
        may_be_missing: Accept a pattern that matches nothing yet.

    Returns:
        The checkpoints, and what is wrong with those that cannot be used.

    Raises:
        ValueError: a pattern matches nothing.
    """
    found: dict[Path, CheckpointSource] = {}
    damaged: dict[str, str] = {}
    for pattern in patterns:
        # Path.glob takes no absolute patterns
        names = sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]  # noqa: PTH207
        paths = [path for path in map(Path, names) if path.exists()]
        if is_on_hub(pattern):
            paths = [fetch(pattern)]
        if not paths and not may_be_missing:
            raise ValueError(f"no checkpoint matches {pattern!r}")
        for path in paths:
            try:
                listed, broken = _expand(path)
            except (ValueError, OSError) as error:
                listed, broken = [], {str(path): str(error)}
            found |= {source.path.resolve(): source for source in listed}
            damaged |= broken
    return list(found.values()), damaged


def _expand(path: Path) -> tuple[list[CheckpointSource], dict[str, str]]:
    is_run = path.is_dir() and any(
        any(folder.glob("step-*")) for folder in (path, path / "checkpoints")
    )
    return complete_checkpoints(path) if is_run else ([find_checkpoint(path)], {})


def plan_cells(
    sources: Sequence[CheckpointSource],
    benchmarks: Sequence[tuple[str, ...]],
    read: Sequence[str] = (),
) -> list[Cell]:
    """Make the cells of checkpoints x benchmarks.

    Args:
        sources: The checkpoints.
        benchmarks: Words of `eva02-at evaluate`.
        read: Words of `eva02-at convert` that say how the checkpoints are read.
    """
    cells = []
    for source in sources:
        content = source.content_hash()
        run, step = _run_and_step(source)
        for benchmark in benchmarks:
            told = json.dumps([content, list(read), list(benchmark)])
            key = hashlib.sha256(told.encode()).hexdigest()[:KEY_DIGITS]
            path = str(source.path.absolute())  # unresolved: the Hub's cache is links to blobs
            cells.append(Cell(key, path, run, step, content, tuple(read), benchmark))
    return cells


def _run_and_step(source: CheckpointSource) -> tuple[str, int | None]:
    """A checkpoint of a run is known by the run's folder; any other file by its own name."""
    path = source.path.absolute()
    if source.manifest is not None:
        folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        return _shown(folder), source.step
    found = _STEP.search(path.stem)
    if found:
        return _shown(path.parent), int(found[1])
    return _shown(path), None


def _shown(path: Path) -> str:
    """Relative where that is shorter."""
    return min((str(path), os.path.relpath(path)), key=len)
