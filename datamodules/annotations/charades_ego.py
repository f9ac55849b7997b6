"""Charades-Ego: actions in first-person videos, `CharadesEgo_v1_{train,test}_only1st.csv`."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from datamodules.annotations.table import parse_seconds
from datamodules.manifest import ClipRecord

CLASSES_NAME = "Charades_v1_classes.txt"
_ID, _ACTIONS, _LENGTH = 0, 9, 10


@dataclass(frozen=True)
class Video:
    """One row.

    Attributes:
        video_id: The video.
        actions: (class id, start s, end s) of each action.
        length_s: The video's length.
    """

    video_id: str
    actions: tuple[tuple[int, float, float], ...]
    length_s: float


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


def read_charades_videos(path: str | Path) -> list[Video]:
    """Read a CSV by its columns' places: 0 the id, 9 the actions, 10 the length.

    Raises:
        ValueError: The file is missing or a row is malformed.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"annotation file {path} does not exist; give the path of an existing one")
    videos = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.reader(file)):
            where = f"{path}, row {number}"
            if number == 0 or not row:  # the header
                continue
            if len(row) <= _LENGTH:
                raise ValueError(f"{where}: {len(row)} fields; at least {_LENGTH + 1} are needed")
            length_s = parse_seconds(row[_LENGTH], f"{where}, length")
            videos.append(Video(row[_ID], _actions(row[_ACTIONS], where), length_s))
    if not videos:
        raise ValueError(f"{path} has a header but no rows; at least one is needed")
    return videos


def _actions(text: str, where: str) -> tuple[tuple[int, float, float], ...]:
    """Parse `c019 11.9 21.2;c092 0.0 5.1`; an empty text has no action."""
    actions = []
    for item in filter(None, text.split(";")):
        words = item.split()
        if len(words) != 3 or words[0][:1] != "c" or not words[0][1:].isdigit():
            raise ValueError(f"{where}: action {item!r} is not `cNNN START END`")
        start_s, end_s = (parse_seconds(word, f"{where}, action {item!r}") for word in words[1:])
        actions.append((int(words[0][1:]), start_s, end_s))
    return tuple(actions)


def read_charades_clips(path: str | Path) -> list[ClipRecord]:
    """One clip an action, for training; its text is the class's line, its verb class the class.

    The class file lies beside the CSV. Actions that end before they start, of which the published
    file has some, are left to the build to reject.
    """
    names = read_charades_classes(Path(path).parent / CLASSES_NAME)
    return [
        ClipRecord(f"{v.video_id}_{k}", v.video_id, start_s, end_s, (names[c],), (c,))
        for v in read_charades_videos(path)
        for k, (c, start_s, end_s) in enumerate(v.actions)
    ]


def read_charades_tests(path: str | Path) -> list[ClipRecord]:
    """One clip a whole video, for the test; its verb classes are all its actions' classes."""
    names = read_charades_classes(Path(path).parent / CLASSES_NAME)
    clips = []
    for v in read_charades_videos(path):
        classes = tuple(sorted({c for c, _, _ in v.actions}))
        texts = tuple(names[c] for c in classes) or ("",)
        clips.append(ClipRecord(v.video_id, v.video_id, 0.0, v.length_s, texts, classes))
    return clips
