"""Reading delimited annotation files with messages that name the file, the row and the mend."""

from __future__ import annotations

import ast
import csv
import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path


def iterate_table(
    path: str | Path, columns: Sequence[str], *, delimiter: str = ","
) -> Iterator[dict[str, str]]:
    """Read a delimited text file that has a header row, one row at a time.

    Args:
        path: The file, UTF-8 (a byte order mark is skipped).
        columns: Columns that must be there; further ones are kept as they are.
        delimiter: `","` for CSV, `"\\t"` for TSV.

    Yields:
        One dict a row, column name to text, in the file's order; at least one.

    Raises:
        ValueError: The file is missing, not UTF-8, empty, lacks a column, or has a row that is
            shorter or longer than its header.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"annotation file {path} does not exist; give the path of an existing one")
    number = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # strict: an unbalanced quote is an error, not a field that swallows the rest
            reader = csv.DictReader(file, delimiter=delimiter, strict=True)
            header = reader.fieldnames or []
            missing = [name for name in columns if name not in header]
            if missing:
                raise ValueError(
                    f"{path} has no column {', '.join(map(repr, missing))}; it has {list(header)} "
                    f"and needs at least {list(columns)}"
                )
            for number, row in enumerate(reader, start=1):
                if None in row or None in row.values():
                    raise ValueError(
                        f"{path}, row {number}: its number of fields is not that of the header "
                        f"({len(header)}); quote fields that contain {delimiter!r}"
                    )
                yield row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} cannot be read as a UTF-8 table: {error}") from error
    if number == 0:
        raise ValueError(f"{path} has a header but no rows; at least one is needed")


def read_table(
    path: str | Path, columns: Sequence[str], *, delimiter: str = ","
) -> list[dict[str, str]]:
    """Read a whole table at once; see `iterate_table`."""
    return list(iterate_table(path, columns, delimiter=delimiter))


def parse_int(text: str, where: str) -> int:
    """Parse a class id or a count; `where` (file, row, column) goes into the error."""
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{where}: {text!r} is not an integer") from None


def parse_seconds(text: str, where: str) -> float:
    """Parse seconds, plain or as a clock `HH:MM:SS.ss`; `where` goes into the error."""
    if ":" in text:
        return parse_clock(text, where)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: {text!r} is not a time in seconds or HH:MM:SS.ss")
    return value


def parse_int_list(text: str, where: str) -> tuple[int, ...]:
    """Parse a Python list literal of integers such as `[3, 17]`, without evaluating code.

    Args:
        text: The literal; lists, tuples and single integers are accepted.
        where: File, row and column, for the error.

    Returns:
        The integers in their order.

    Raises:
        ValueError: The text is no such literal.
    """
    ids = _literal_ints(text)
    if ids is None:
        raise ValueError(f"{where}: {text!r} is not a list of integers such as [3, 17]")
    return ids


@lru_cache(maxsize=65536)  # class lists repeat: ten times fewer literals than rows in EK-100
def _literal_ints(text: str) -> tuple[int, ...] | None:
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        value = (value,)
    if not isinstance(value, (list, tuple)) or any(type(item) is not int for item in value):
        return None
    return tuple(value)


def parse_clock(text: str, where: str) -> float:
    """Parse a time `HH:MM:SS.ss` into seconds.

    Args:
        text: The time; hours may exceed 24, the fraction may be missing.
        where: File, row and column, for the error.

    Returns:
        Seconds.

    Raises:
        ValueError: The text is no such time.
    """
    parts = text.strip().split(":")
    try:
        hours, minutes, seconds = int(parts[0]), int(parts[1]), float(parts[2])
        if len(parts) != 3 or not (hours >= 0 and 0 <= minutes < 60 and 0 <= seconds < 60):
            raise ValueError
    except (ValueError, IndexError):
        raise ValueError(f"{where}: {text!r} is not a time HH:MM:SS.ss") from None
    return hours * 3600 + minutes * 60 + seconds
