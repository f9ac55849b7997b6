"""Charades-Ego: actions in first-person videos, `CharadesEgo_v1_{train,test}_only1st.csv`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datamodules.annotations.rows import Rejects, records_of_rows, reject
from datamodules.annotations.table import parse_seconds, split_rows
from datamodules.manifest import ClipRecord, check_record

CLASSES_NAME = "Charades_v1_classes.txt"
_ID, _ACTIONS, _LENGTH = 0, 9, 10
_CODE = re.compile(r"c\d{3}", re.ASCII)


@dataclass(frozen=True)
class Video:
    """One row.

    Attributes:
        video_id: The video.
        actions: (class id, start s, end s) of each action.
        length_s: The video's length; None where the file does not say.
    """

    video_id: str
    actions: tuple[tuple[int, float, float], ...]
    length_s: float | None


def read_charades_classes(path: str | Path) -> list[str]:
    """Read `Charades_v1_classes.txt`, lines `c000 Holding some clothes`: the texts after the code.

    Raises:
        ValueError: The file is missing or its codes do not count from c000.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"class file {path} does not exist; it is published beside the CSVs")
    names = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        code, _, name = line.partition(" ")
        if code != f"c{number:03d}" or not name:
            raise ValueError(f"{path}, line {number + 1}: {line!r} is not `c{number:03d} TEXT`")
        names.append(name)
    return names


def _rows(path: str | Path, rejects: Rejects | None) -> Iterator[tuple[int, list[str]]]:
    """Yield numbered rows, at least one, without the header."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"annotation file {path} does not exist; give the path of an existing one")
    number = 0
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        rows = split_rows(file, ",")
        next(rows, None)
        for number, row in enumerate(rows, start=1):
            if isinstance(row, str):
                reject(path, number, row, rejects)
            else:
                yield number, row
    if number == 0:
        raise ValueError(f"{path} has a header but no rows; at least one is needed")


def _video(row: list[str]) -> Video:
    if any(row[1:]) and len(row) <= _LENGTH:
        raise ValueError(f"{len(row)} fields; at least {_LENGTH + 1} are needed")
    actions, length = (row[_ACTIONS], row[_LENGTH]) if len(row) > _LENGTH else ("", "")
    length_s = parse_seconds(length, "length") if length.strip() else None
    return Video(row[_ID], _actions(actions), length_s)


def _actions(text: str) -> tuple[tuple[int, float, float], ...]:
    """Parse `c019 11.9 21.2;c092 0.0 5.1`; an empty text has no action."""
    actions = []
    for item in filter(None, text.split(";")):
        words = item.split()
        if len(words) != 3 or not _CODE.fullmatch(words[0]):
            raise ValueError(f"action {item!r:.200} is not `cNNN START END`")
        start_s, end_s = (parse_seconds(word, f"action {item!r:.200}") for word in words[1:])
        actions.append((int(words[0][1:]), start_s, end_s))
    return tuple(actions)


def _names(path: str | Path) -> Callable[[int], str]:
    names = read_charades_classes(Path(path).parent / CLASSES_NAME)

    def name(number: int) -> str:
        if number >= len(names):
            raise ValueError(f"class c{number:03d} is not among the {len(names)} of {CLASSES_NAME}")
        return names[number]

    return name


def read_charades_clips(path: str | Path, rejects: Rejects | None = None) -> list[ClipRecord]:
    """One clip an action, for training; its text is the class's line, its verb class the class.

    The class file lies beside the CSV. Actions that end before they start, of which the published
    file has some, are left to the build to reject. Of the published rows some hold an id and
    nothing else: a video without actions.

    Args:
        path: The CSV, read by its columns' places: 0 the id, 9 the actions, 10 the length.
        rejects: Takes the rows that cannot be used; without it the first one refuses the file.

    Raises:
        ValueError: The file or the class file is missing, or a row is malformed.
    """
    name = _names(path)

    def make(number: int, row: list[str]) -> list[ClipRecord]:
        v = _video(row)
        return [
            ClipRecord(f"{v.video_id}_{k}", v.video_id, start_s, end_s, (name(c),), (c,))
            for k, (c, start_s, end_s) in enumerate(v.actions)
        ]

    return records_of_rows(path, _rows(path, rejects), make, rejects)


def read_charades_tests(path: str | Path, rejects: Rejects | None = None) -> list[ClipRecord]:
    """One clip a whole video, for the test; its verb classes are all its actions' classes.

    A video without actions has the empty text. One without a length cannot be used. Arguments and
    errors are those of `read_charades_clips`.
    """
    name = _names(path)

    def make(number: int, row: list[str]) -> tuple[ClipRecord]:
        v = _video(row)
        if v.length_s is None:
            raise ValueError("it has no length")
        classes = tuple(sorted({c for c, _, _ in v.actions}))
        texts = tuple(map(name, classes)) or ("",)
        return (ClipRecord(v.video_id, v.video_id, 0.0, v.length_s, texts, classes),)

    silent = partial(check_record, may_be_silent=True)
    return records_of_rows(path, _rows(path, rejects), make, rejects, silent)
