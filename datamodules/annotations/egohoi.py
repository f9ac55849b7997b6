"""EgoHOIBench (EgoNCE++, arXiv 2405.17719): captions of Ego4D clips, and each with a word changed.

A tab-separated table; of its columns are read `video_uid`, `clip_start`, `clip_end`, `clip_text`,
`verb_neg` and `noun_neg`. The last two hold ten captions each with another verb, or another noun,
between commas.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datamodules.annotations.rows import Rejects, records_of_rows
from datamodules.annotations.table import iterate_table, parse_seconds
from datamodules.manifest import ClipRecord

COLUMNS = ("video_uid", "clip_start", "clip_end", "clip_text", "verb_neg", "noun_neg")
MOST_NEGATIVES = 10


@dataclass(frozen=True)
class HOIQuestion:
    """Which caption is a clip's: its own, or one of those that differ in a word?

    Attributes:
        clip_id: The clip, as named in the shards.
        text: Its caption.
        verb_negatives: Captions with another verb.
        noun_negatives: Captions with another noun.
    """

    clip_id: str
    text: str
    verb_negatives: tuple[str, ...]
    noun_negatives: tuple[str, ...]


def read_egohoi(path: str | Path) -> list[HOIQuestion]:
    """Read the questions in the order of the rows.

    Of a row's negatives the first ten count, as published; one that is the caption itself is none.

    Raises:
        ValueError: The file is missing or malformed; the message names the row.
    """
    return [
        HOIQuestion(
            _clip(row, f"{path}, row {number}").clip_id,
            row["clip_text"],
            _negatives(row["verb_neg"], row["clip_text"]),
            _negatives(row["noun_neg"], row["clip_text"]),
        )
        for number, row in iterate_table(path, COLUMNS, delimiter="\t")
    ]


def read_egohoi_clips(path: str | Path, rejects: Rejects | None = None) -> list[ClipRecord]:
    """The distinct clips of all questions, in order of appearance.

    Args:
        path: The file.
        rejects: Takes the rows that cannot be used; without it the first one refuses the file.

    Raises:
        ValueError: The file is missing or malformed; the message names the row.
    """
    seen: set[str] = set()

    def make(number: int, row: dict[str, str]) -> list[ClipRecord]:
        clip = _clip(row, "the row")
        new = clip.clip_id not in seen
        seen.add(clip.clip_id)
        return [clip] if new else []

    return records_of_rows(path, iterate_table(path, COLUMNS, delimiter="\t"), make, rejects)


def _clip(row: dict[str, str], where: str) -> ClipRecord:
    start_s = max(0.0, parse_seconds(row["clip_start"], f"{where}, clip_start"))
    end_s = parse_seconds(row["clip_end"], f"{where}, clip_end")
    clip_id = f"{row['video_uid']}:{row['clip_start']}-{row['clip_end']}"
    return ClipRecord(clip_id, row["video_uid"], start_s, end_s, (row["clip_text"],))


def _negatives(column: str, text: str) -> tuple[str, ...]:
    captions = [caption.strip() for caption in column.split(",")][:MOST_NEGATIVES]
    return tuple(dict.fromkeys(c for c in captions if c and c != text.strip()))
