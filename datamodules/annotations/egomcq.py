"""EgoMCQ (EgoVLP): multiple-choice questions over Ego4D clips, `egomcq.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datamodules.annotations.rows import Rejects, records_of_rows
from datamodules.manifest import ClipRecord

# Several public evaluators print these two names swapped.
INTER_VIDEO, INTRA_VIDEO = 1, 2
NUM_CHOICES = 5


@dataclass(frozen=True)
class Question:
    """One question: which of five clips does the text describe?

    Attributes:
        text: The query.
        clip_ids: The five clips, as named in the shards.
        answer: 0-4.
        kind: `INTER_VIDEO` (the clips are of different videos) or `INTRA_VIDEO`.
    """

    text: str
    clip_ids: tuple[str, ...]
    answer: int
    kind: int


def read_egomcq(path: str | Path) -> list[Question]:
    """Read the questions in the order of their keys "0", "1", ...

    Raises:
        ValueError: The file is missing or malformed; the message names the question.
    """
    return [_question(entry, f"{path}, question {key}") for key, entry in _entries(path)]


def read_egomcq_clips(path: str | Path, rejects: Rejects | None = None) -> list[ClipRecord]:
    """The distinct clips of all questions' choices, in order of appearance.

    Args:
        path: The file.
        rejects: Takes the questions that cannot be used; without it the first one refuses the
            file.

    Raises:
        ValueError: The file is missing or malformed; the message names the question.
    """
    seen: set[str] = set()

    def make(number: int, entry: dict[str, Any]) -> list[ClipRecord]:
        clips = {_clip_id(choice): choice for choice in _choices(entry, "question")}
        made = [_clip(i, choice) for i, choice in clips.items() if i not in seen]
        seen.update(clips)
        return made

    entries = ((int(key) + 1, entry) for key, entry in _entries(path))
    return records_of_rows(path, entries, make, rejects)


def _clip(clip_id: str, choice: dict[str, Any]) -> ClipRecord:
    start_s, end_s = float(choice["clip_start"]), float(choice["clip_end"])
    start_s = 0.0 if start_s < 0 else start_s
    return ClipRecord(clip_id, choice["video_uid"], start_s, end_s, (choice["clip_text"],))


def _clip_id(choice: dict[str, Any]) -> str:
    return f"{choice['video_uid']}:{choice['clip_start']}-{choice['clip_end']}"


def _entries(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"annotation file {path} does not exist; give the path of an existing one")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = [(str(k), content[str(k)]) for k in range(len(content))]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f'{path} is no object with keys "0", "1", ...: {error}') from error
    if not entries:
        raise ValueError(f"{path} has no questions")
    return entries


def _choices(entry: dict[str, Any], where: str) -> list[dict[str, Any]]:
    try:
        choices = [entry["choices"][str(k)] for k in range(NUM_CHOICES)]
        for choice in choices:
            float(choice["clip_start"]), float(choice["clip_end"])
            choice["video_uid"], choice["clip_text"]
        return choices
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: its choices are not five clips ({error!r})") from error


def _question(entry: dict[str, Any], where: str) -> Question:
    choices = _choices(entry, where)
    try:
        text, answer, kind = entry["query"]["clip_text"], int(entry["answer"]), int(entry["types"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: query, answer or types is missing ({error!r})") from error
    if not 0 <= answer < NUM_CHOICES or kind not in (INTER_VIDEO, INTRA_VIDEO):
        raise ValueError(f"{where}: answer {answer} is not 0-4 or types {kind} not 1 or 2")
    return Question(text, tuple(map(_clip_id, choices)), answer, kind)
