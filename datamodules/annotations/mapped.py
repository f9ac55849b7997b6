"""Any table with a header row: the user says which column holds what."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from pathlib import Path

from datamodules.annotations.rows import Rejects, records_of_rows
from datamodules.annotations.table import iterate_table, parse_int_list, parse_seconds
from datamodules.manifest import ClipRecord


@dataclass(frozen=True)
class Columns:
    """Column names of a table.

    Attributes:
        video_id: The source video.
        start_s: Start in seconds, or `HH:MM:SS.ss`.
        end_s: End, likewise.
        text: The narration.
        clip_id: The clip's own name; the row number if empty.
        verb_classes: Class id or list literal of ids; none if empty.
        noun_classes: Class id or list literal of ids; none if empty.
    """

    video_id: str = "video_id"
    start_s: str = "start_second"
    end_s: str = "end_second"
    text: str = "text"
    clip_id: str = ""
    verb_classes: str = ""
    noun_classes: str = ""

    @classmethod
    def parse(cls, words: list[str]) -> Columns:
        """Read `field=column` words, such as `text=narration`.

        Raises:
            ValueError: A word is malformed or names an unknown field.
        """
        known = [field.name for field in fields(cls)]
        given: dict[str, str] = {}
        for word in words:
            name, equals, column = word.partition("=")
            if not equals or name not in known:
                raise ValueError(f"column {word!r}: write FIELD=COLUMN, FIELD one of {known}")
            given[name] = column
        return cls(**given)


def read_mapped(
    path: str | Path, columns: Columns, rejects: Rejects | None = None
) -> list[ClipRecord]:
    """Read a comma-separated table (tab-separated if the name ends in .tsv).

    Args:
        path: The file.
        columns: Which column holds what.
        rejects: Takes the rows that cannot be used; without it the first one refuses the file.

    Raises:
        ValueError: The file is missing or malformed; the message names the row.
    """
    delimiter = "\t" if Path(path).suffix == ".tsv" else ","
    named = [name for field in fields(columns) if (name := getattr(columns, field.name))]

    def make(number: int, row: dict[str, str]) -> tuple[ClipRecord]:
        def ids(column: str) -> tuple[int, ...]:
            return parse_int_list(row[column], column) if column else ()

        return (
            ClipRecord(
                clip_id=row[columns.clip_id] if columns.clip_id else str(number - 1),
                video_id=sys.intern(row[columns.video_id]),
                start_s=parse_seconds(row[columns.start_s], columns.start_s),
                end_s=parse_seconds(row[columns.end_s], columns.end_s),
                texts=(row[columns.text],),
                verb_classes=ids(columns.verb_classes),
                noun_classes=ids(columns.noun_classes),
            ),
        )

    rows = iterate_table(path, named, delimiter=delimiter, rejects=rejects)
    return records_of_rows(path, rows, make, rejects)
