"""EgoClip (EgoVLP): the narrated clips of Ego4D, `egoclip.csv`."""

from __future__ import annotations

import sys
from pathlib import Path

from datamodules.annotations.rows import Rejects, records_of_rows
from datamodules.annotations.table import iterate_table, parse_int_list, parse_seconds
from datamodules.manifest import ClipRecord

COLUMNS = ("video_uid", "clip_start", "clip_end", "clip_text", "tag_verb", "tag_noun")


def read_egoclip(path: str | Path, rejects: Rejects | None = None) -> list[ClipRecord]:
    """Read egoclip.csv: tab-separated, class lists as Python literals.

    A clip's id is its row number in the file. Starts before the video's beginning are clamped to
    0. The published 3,847,723 rows take about 3 GB.

    Args:
        path: The file.
        rejects: Takes the rows that cannot be used; without it the first one refuses the file.

    Raises:
        ValueError: The file is missing or malformed; the message names the row.
    """
    rows = iterate_table(path, COLUMNS, delimiter="\t", rejects=rejects)
    return records_of_rows(path, rows, _record, rejects)


def _record(number: int, row: dict[str, str]) -> tuple[ClipRecord]:
    return (
        ClipRecord(
            clip_id=str(number - 1),
            video_id=sys.intern(row["video_uid"]),
            start_s=max(0.0, parse_seconds(row["clip_start"], "clip_start")),
            end_s=parse_seconds(row["clip_end"], "clip_end"),
            texts=(row["clip_text"],),
            verb_classes=parse_int_list(row["tag_verb"], "tag_verb"),
            noun_classes=parse_int_list(row["tag_noun"], "tag_noun"),
        ),
    )
