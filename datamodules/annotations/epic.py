"""EPIC-KITCHENS-100: the clip and sentence files of multi-instance retrieval, read as published.

`EPIC_100_retrieval_{train,test}.csv` and the action-recognition files
`EPIC_100_{train,validation}.csv` share their columns, so `read_retrieval_clips` reads all four.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datamodules.annotations.rows import Rejects, records_of_rows
from datamodules.annotations.table import (
    iterate_table,
    parse_clock,
    parse_int,
    parse_int_list,
    read_table,
)
from datamodules.manifest import ClipRecord

CLIP_COLUMNS = (
    "narration_id",
    "participant_id",
    "video_id",
    "start_timestamp",
    "stop_timestamp",
    "narration",
    "verb_class",
    "noun_class",
    "all_noun_classes",
)


@dataclass(frozen=True)
class RetrievalClip:
    """One row of a clip file.

    Attributes:
        narration_id: The clip's name, unique within its file (`P01_11_0`).
        participant_id: `P01`.
        video_id: `P01_11`.
        start_s: Start within the video in seconds, from the timestamp: the frame numbers of the
            file are nominal 60 fps while the videos are 59.94, 29.97, 90 or 47.95 fps.
        stop_s: Stop in seconds.
        narration: What the narrator said.
        verb_class: 0..96.
        noun_class: 0..299, the main noun.
        all_noun_classes: Every noun of the narration, in the file's order.
    """

    narration_id: str
    participant_id: str
    video_id: str
    start_s: float
    stop_s: float
    narration: str
    verb_class: int
    noun_class: int
    all_noun_classes: tuple[int, ...]


@dataclass(frozen=True)
class Sentence:
    """One row of a sentence file, with the text and classes of the clip it names.

    Attributes:
        narration_id: The clip that first said it.
        text: That clip's narration.
        verb_class: That clip's verb class.
        all_noun_classes: That clip's noun classes.
    """

    narration_id: str
    text: str
    verb_class: int
    all_noun_classes: tuple[int, ...]


@dataclass(frozen=True)
class ActionClass:
    """A class of action recognition: a verb with a main noun.

    Attributes:
        verb_class: 0..96.
        noun_class: 0..299.
        narrations: Every different narration of its clips, in order of appearance.
    """

    verb_class: int
    noun_class: int
    narrations: tuple[str, ...]


def recognition_file(directory: str | Path, split: str) -> Path:
    """Path of the clip file of action recognition, of split `train` or `validation`."""
    return Path(directory) / f"EPIC_100_{split}.csv"


def read_actions(directory: str | Path) -> list[ActionClass]:
    """Read the classes of action recognition.

    They are the pairs `verb_class:noun_class` of the training and the validation file, sorted as
    text: 3,806 in the published files.

    Args:
        directory: The folder of `EPIC_100_train.csv` and `EPIC_100_validation.csv`.

    Raises:
        ValueError: As `read_retrieval_clips`.
    """
    narrations: dict[tuple[int, int], dict[str, None]] = {}
    for split in ("train", "validation"):
        for clip in read_retrieval_clips(recognition_file(directory, split)):
            narrations.setdefault((clip.verb_class, clip.noun_class), {})[clip.narration] = None
    pairs = sorted(narrations, key=lambda pair: f"{pair[0]}:{pair[1]}")
    return [ActionClass(*pair, tuple(narrations[pair])) for pair in pairs]


def retrieval_files(directory: str | Path, split: str) -> tuple[Path, Path]:
    """Find the clip and the sentence file of a split.

    Args:
        directory: The annotations, or a clone of their repository (which keeps these two files in
            `retrieval_annotations/`).
        split: `train` or `test`.

    Returns:
        Paths of the clip and the sentence file.

    Raises:
        ValueError: The directory or one of the files does not exist.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"annotation directory {directory} does not exist; give an existing one")
    names = (f"EPIC_100_retrieval_{split}.csv", f"EPIC_100_retrieval_{split}_sentence.csv")
    for folder in (directory, directory / "retrieval_annotations"):
        clips, sentences = folder / names[0], folder / names[1]
        if clips.is_file() and sentences.is_file():
            return clips, sentences
    absent = [name for name in names if not (directory / name).is_file()]
    raise ValueError(
        f"{directory} has no {' and no '.join(absent)}; the files of EK-100 multi-instance "
        f"retrieval for split {split!r} are needed under their published names"
    )


def read_retrieval_clips(path: str | Path) -> list[RetrievalClip]:
    """Read a clip file with the columns `CLIP_COLUMNS` (others are ignored).

    Args:
        path: `EPIC_100_retrieval_{train,test}.csv` or `EPIC_100_{train,validation}.csv`.

    Returns:
        The clips in the file's order, which is the row order of published similarity matrices.

    Raises:
        ValueError: Missing file or column, no rows, a malformed number, list or time, or a
            narration_id that occurs twice. A clip that stops before it starts is left to
            `shards build` to reject: it still counts in scores.
    """
    clips: list[RetrievalClip] = []
    seen: set[str] = set()
    for number, row in iterate_table(path, CLIP_COLUMNS):
        try:
            clip = _clip(row)
            if clip.narration_id in seen:
                raise ValueError(f"narration_id {clip.narration_id!r} occurs twice")
        except ValueError as error:
            raise ValueError(f"{path}, row {number}: {error}") from error
        seen.add(clip.narration_id)
        clips.append(clip)
    return clips


def read_ek100(path: str | Path, rejects: Rejects | None = None) -> list[ClipRecord]:
    """The clips of the same files as records, to build shards from.

    The clip id is the narration id; the main noun comes first.

    Args:
        path: As `read_retrieval_clips`.
        rejects: Takes the rows that cannot be used; without it the first one refuses the file.

    Raises:
        ValueError: As `read_retrieval_clips`, and for a blank narration.
    """

    def make(number: int, row: dict[str, str]) -> tuple[ClipRecord]:
        clip = _clip(row)
        return (
            ClipRecord(
                clip_id=clip.narration_id,
                video_id=clip.video_id,
                start_s=clip.start_s,
                end_s=clip.stop_s,
                texts=(clip.narration,),
                verb_classes=(clip.verb_class,),
                noun_classes=tuple(
                    sorted(clip.all_noun_classes, key=lambda noun: noun != clip.noun_class)
                ),
            ),
        )

    rows = iterate_table(path, CLIP_COLUMNS, rejects=rejects)
    return records_of_rows(path, rows, make, rejects)


def _clip(row: dict[str, str]) -> RetrievalClip:
    return RetrievalClip(
        narration_id=row["narration_id"],
        participant_id=row["participant_id"],
        video_id=row["video_id"],
        start_s=parse_clock(row["start_timestamp"], "start_timestamp"),
        stop_s=parse_clock(row["stop_timestamp"], "stop_timestamp"),
        narration=row["narration"],
        verb_class=parse_int(row["verb_class"], "verb_class"),
        noun_class=parse_int(row["noun_class"], "noun_class"),
        all_noun_classes=parse_int_list(row["all_noun_classes"], "all_noun_classes"),
    )


def read_sentences(path: str | Path, clips: list[RetrievalClip]) -> list[Sentence]:
    """Read a sentence file; text and classes come from the clip each row names.

    In the published files the text of the last rows (test 3835-3841, train 15968-15988) is shifted
    by one against `narration_id`, so the file's own text is not used.

    Args:
        path: `EPIC_100_retrieval_{train,test}_sentence.csv`.
        clips: The clips of the same split.

    Returns:
        The sentences in the file's order, which is the column order of similarity matrices.

    Raises:
        ValueError: Missing file or column, no rows, or a narration_id that no clip has.
    """
    by_id = {clip.narration_id: clip for clip in clips}
    sentences = []
    for number, row in enumerate(read_table(path, ("narration_id",)), start=1):
        clip = by_id.get(row["narration_id"])
        if clip is None:
            raise ValueError(
                f"{path}, row {number}: no clip has narration_id {row['narration_id']!r}; the "
                "sentence file and the clip file must be of the same split"
            )
        sentences.append(
            Sentence(clip.narration_id, clip.narration, clip.verb_class, clip.all_noun_classes)
        )
    return sentences
