"""Rows that cannot be used: refused, or left out and counted where a build goes on without them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from datamodules.manifest import ClipRecord, check_record

Row = TypeVar("Row")


class Rejects:
    """The rows of an annotation file that were left out, as lines of a rejects file."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, number: int, reason: str) -> None:
        """Note a row by its number, counted from 1 and without the header, and what is wrong."""
        row = {"clip_id": f"(row {number})", "video_id": "", "row": number, "reason": reason}
        self.rows.append(row)


def reject(path: str | Path, number: int, reason: str, rejects: Rejects | None) -> None:
    """Leave a row out or, where nobody collects those, refuse the file.

    Raises:
        ValueError: There is no list of rejects; names file, row and reason.
    """
    if rejects is None:
        raise ValueError(f"{path}, row {number}: {reason}")
    rejects.add(number, reason)


def records_of_rows(
    path: str | Path,
    rows: Iterable[tuple[int, Row]],
    make: Callable[[int, Row], Iterable[ClipRecord]],
    rejects: Rejects | None,
    check: Callable[[ClipRecord], ClipRecord] = check_record,
) -> list[ClipRecord]:
    """Make the records of each row.

    Args:
        path: The file, for the error.
        rows: Numbered from 1.
        make: Turns a number and a row into records; a `ValueError` says why it cannot.
        rejects: Takes the rows that cannot be used.
        check: Refuses a record that cannot be used, by a `ValueError`.

    Raises:
        ValueError: A row cannot be used and there is no list of rejects, or no row can be used.
    """
    records: list[ClipRecord] = []
    seen: set[str] = set()
    for number, row in rows:
        try:
            made = [check(record) for record in make(number, row)]
            again = [record.clip_id for record in made if record.clip_id in seen]
            if again:
                raise ValueError(f"clip id {again[0]!r} occurs twice; ids must be unique")
        except ValueError as error:
            reject(path, number, str(error), rejects)
        else:
            records += made
            seen.update(record.clip_id for record in made)
    if not records and rejects is not None and rejects.rows:
        first = rejects.rows[0]
        raise ValueError(f"{path}: no row can be used; row {first['row']}: {first['reason']}")
    return records
