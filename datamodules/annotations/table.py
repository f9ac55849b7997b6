"""Reading delimited annotation files with messages that name the file, the row and the mend."""

from __future__ import annotations

import ast
import csv
import math
import re
from collections import deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TextIO

from datamodules.annotations.rows import Rejects, reject

# Python's int() and float() also take underscores and other scripts' digits
_INTEGER = re.compile(r"-?\d{1,19}", re.ASCII)
_SECONDS = re.compile(r"-?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_CLOCK = re.compile(r"(\d{1,6}):([0-5]?\d):([0-5]?\d(?:\.\d*)?)", re.ASCII)
_NO_LINE = "\0"  # stands after a row's only line, to see whether a quote swallows it


class _Lines:
    """The lines of a file; those of the row being read can be given back.

    An object rather than a generator: csv asks again after the end, once lines came back.
    """

    def __init__(self, file: TextIO) -> None:
        self.file, self.ahead, self.taken = file, deque[str](), list[str]()

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.ahead.popleft() if self.ahead else next(self.file)
        self.taken.append(line)
        return line

    def keep_first(self) -> str:
        """Give all lines of the row but its first back, and return that."""
        first, *rest = self.taken
        self.ahead.extendleft(reversed(rest))
        return first


def split_rows(file: TextIO, delimiter: str) -> Iterator[list[str] | str]:
    """Split a file into rows: each its fields, or the reason why it cannot be read.

    Quotes mean what they mean to pandas and Python's csv (EgoVLP reads its table with pandas):
    `"x" y` is the text `x y`, and a quote within a field is a character of it. But a quote that is
    never closed would make one field of all that follows up to the next quote; a row over several
    lines must therefore be flawless, or it is its first line that is refused.
    """
    lines = _Lines(file)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    width = 0
    while True:
        lines.taken.clear()
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error:
            row = None
        if row is None or (len(lines.taken) > 1 and width and len(row) != width):
            yield _one_line(lines.keep_first(), delimiter)
        elif row:  # csv gives an empty line as no field at all
            width = width or len(row)
            yield row


def _one_line(line: str, delimiter: str) -> list[str] | str:
    reader = csv.reader([line.rstrip("\r\n"), _NO_LINE], delimiter=delimiter)
    try:
        row = next(reader)
    except csv.Error as error:
        return str(error)
    if row and row[-1].endswith(_NO_LINE):
        return "a quote that opens a field is not closed"
    return row


def iterate_table(
    path: str | Path,
    columns: Sequence[str],
    *,
    delimiter: str = ",",
    rejects: Rejects | None = None,
) -> Iterator[tuple[int, dict[str, str]]]:
    """Read a delimited text file that has a header row, one row at a time.

    Args:
        path: The file, UTF-8 (a byte order mark is skipped).
        columns: Columns that must be there; further ones are kept as they are.
        delimiter: `","` for CSV, `"\\t"` for TSV.
        rejects: Takes the rows that cannot be read.

    Yields:
        Each row's number, from 1, and its fields by column, in the file's order.

    Raises:
        ValueError: The file is missing or empty or lacks a column, or a row is not UTF-8, has
            more or fewer fields than the header, a quote that is not closed, or a field over
            131,072 characters, and there is no list of rejects.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"annotation file {path} does not exist; give the path of an existing one")
    number = 0
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = split_rows(file, delimiter)
        header = next(rows, [])
        if isinstance(header, str) or _is_not_utf8(header):
            fault = header if isinstance(header, str) else "it is not UTF-8"
            raise ValueError(f"the header of {path} cannot be read: {fault}")
        missing = [name for name in columns if name not in header]
        if missing:
            raise ValueError(
                f"{path} has no column {', '.join(map(repr, missing))}; it has {header} "
                f"and needs at least {list(columns)}"
            )
        for number, row in enumerate(rows, start=1):
            reason = row if isinstance(row, str) else _fault(row, len(header), delimiter)
            if reason is None:
                yield number, dict(zip(header, row, strict=True))
            else:
                reject(path, number, reason, rejects)
    if number == 0:
        raise ValueError(f"{path} has a header but no rows; at least one is needed")


def _fault(row: list[str], width: int, delimiter: str) -> str | None:
    """What is wrong with a row as a whole."""
    if len(row) != width:
        return (
            f"its number of fields is {len(row)}, not the header's {width}; quote fields that "
            f"contain {delimiter!r}"
        )
    return "it is not UTF-8" if _is_not_utf8(row) else None


def _is_not_utf8(row: list[str]) -> bool:
    text = "".join(row)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:  # of the stand-ins for bytes that could not be decoded
            return True
    return False


def read_table(
    path: str | Path, columns: Sequence[str], *, delimiter: str = ","
) -> list[dict[str, str]]:
    """Read a whole table at once, every row of which must be sound; see `iterate_table`."""
    return [row for _, row in iterate_table(path, columns, delimiter=delimiter)]


def parse_int(text: str, where: str) -> int:
    """Parse a class id or a count; `where` (file, row, column) goes into the error."""
    if not _INTEGER.fullmatch(text.strip()):
        raise ValueError(f"{where}: {text!r:.200} is not an integer")
    return int(text)


def parse_seconds(text: str, where: str) -> float:
    """Parse seconds, plain or as a clock `HH:MM:SS.ss`; `where` goes into the error.

    Plain seconds may be negative, as the starts of egoclip.csv are.
    """
    if ":" in text:
        return parse_clock(text, where)
    value = float(text) if _SECONDS.fullmatch(text.strip()) else math.nan
    if not math.isfinite(value):
        raise ValueError(f"{where}: {text!r:.200} is not a time in seconds or HH:MM:SS.ss")
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
        raise ValueError(f"{where}: {text!r:.200} is not a list of integers such as [3, 17]")
    return ids


@lru_cache(maxsize=65536)  # class lists repeat: ten times fewer literals than rows in EK-100
def _literal_ints(text: str) -> tuple[int, ...] | None:
    if "_" in text:  # which Python reads as a part of a number
        return None
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
        text: The time; hours may exceed 24, the fraction may be missing. No signs: before its
            beginning a video shows nothing.
        where: File, row and column, for the error.

    Returns:
        Seconds.

    Raises:
        ValueError: The text is no such time.
    """
    match = _CLOCK.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{where}: {text!r:.200} is not a time HH:MM:SS.ss")
    return int(match[1]) * 3600 + int(match[2]) * 60 + float(match[3])
