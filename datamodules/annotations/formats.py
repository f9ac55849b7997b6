"""Annotation formats by name: any of them to a list of clips."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from datamodules.annotations.charades_ego import read_charades_clips, read_charades_tests
from datamodules.annotations.egoclip import read_egoclip
from datamodules.annotations.egohoi import read_egohoi_clips
from datamodules.annotations.egomcq import read_egomcq_clips
from datamodules.annotations.epic import read_ek100
from datamodules.annotations.lavila import read_lavila
from datamodules.annotations.mapped import Columns, read_mapped
from datamodules.annotations.rows import Rejects
from datamodules.manifest import ClipRecord


def read_egohod(path: str | Path, rejects: Rejects | None = None) -> list[ClipRecord]:
    """EgoHOD CSV: `video_id,start_second,end_second,text`; the clip id is the row number."""
    return read_mapped(path, Columns(), rejects)


FORMATS: dict[str, Callable[[str | Path, Rejects | None], list[ClipRecord]]] = {
    "ek100": read_ek100,
    "egoclip": read_egoclip,
    "lavila": read_lavila,
    "egohod": read_egohod,
    "charades_ego": read_charades_clips,
    "charades_ego_test": read_charades_tests,
    "egomcq": read_egomcq_clips,
    "egohoi": read_egohoi_clips,
}


def read_clips(
    path: str | Path,
    format: str,
    columns: Columns | None = None,
    rejects: Rejects | None = None,
) -> list[ClipRecord]:
    """Read an annotation file.

    Args:
        path: The file.
        format: One of `FORMATS`, or `csv` for any table with a header.
        columns: For `csv`: which column holds what.
        rejects: Takes the rows that cannot be used; without it the first one refuses the file.

    Raises:
        ValueError: Unknown format, or the file is missing or malformed.
    """
    if format == "csv":
        return read_mapped(path, columns or Columns(), rejects)
    if format not in FORMATS:
        raise ValueError(f"unknown annotation format {format!r}; one of csv, {', '.join(FORMATS)}")
    return FORMATS[format](path, rejects)
