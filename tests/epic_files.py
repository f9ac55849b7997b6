"""Annotation files in EK-100's columns, made up, with the published files' trap in them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

HEADER = (
    "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,"
    "start_frame,stop_frame,narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
)
Item = tuple[int, set[int]]  # verb class, noun classes


def write_retrieval_split(
    folder: Path, split: str, num_clips: int, num_sentences: int, seed: int = 0
) -> tuple[list[Item], list[Item]]:
    """Write the clip and the sentence file of a split.

    As in the published files: clips of one narration share its classes, a sentence names the first
    clip that says it, and in the last rows of the sentence file the text is shifted by one.

    Returns:
        (verb, nouns) of each clip and of each sentence, in the files' order.
    """
    draw = np.random.default_rng(seed)
    said = [
        (int(draw.integers(5)), draw.permutation(9)[: 1 + i % 3].tolist())
        for i in range(num_sentences)
    ]
    # each narration once, then repeated ones, in mixed order
    of_clip = np.concatenate(
        [np.arange(num_sentences), draw.integers(0, num_sentences, num_clips - num_sentences)]
    )
    draw.shuffle(of_clip)
    with (folder / f"EPIC_100_retrieval_{split}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        file.write(HEADER + "\n")
        for clip, sentence in enumerate(of_clip):
            verb, nouns = said[sentence]
            names = str([f"noun {noun}" for noun in nouns])
            video = ("P01", "P01_01", "00:00:00.50")
            start_s = 0.05 * (clip % 60)
            span = (f"00:00:{start_s:06.3f}", f"00:00:{start_s + 0.8:05.2f}", 65, 150)
            text = (f"say {sentence}, loudly", f"verb {verb}", verb)
            objects = (f"noun {nouns[0]}", nouns[0], names, str(nouns))
            writer.writerow([f"P01_01_{clip}", *video, *span, *text, *objects])
    first_clip = {int(sentence): clip for clip, sentence in reversed(list(enumerate(of_clip)))}
    texts = [f"say {sentence}, loudly" for sentence in range(num_sentences)]
    texts[-4:] = texts[-3:] + texts[-4:-3]
    with (folder / f"EPIC_100_retrieval_{split}_sentence.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["narration_id", "narration"])
        for sentence, text in enumerate(texts):
            writer.writerow([f"P01_01_{first_clip[sentence]}", text])
    items = [(verb, set(nouns)) for verb, nouns in said]
    return [items[sentence] for sentence in of_clip], items


def write_recognition_split(
    folder: Path, split: str, rows: list[tuple[str, int, int, list[int]]]
) -> None:
    """Write a clip file of action recognition; clip k spans 0.2 k to 0.2 k + 0.4 s of P01_01.

    Args:
        folder: Where `EPIC_100_{split}.csv` goes.
        split: `train` or `validation`.
        rows: Narration, verb class, main noun class and all noun classes of each clip.
    """
    with (folder / f"EPIC_100_{split}.csv").open("w", newline="") as file:
        file.write(HEADER + "\n")
        for number, (text, verb, noun, nouns) in enumerate(rows):
            start_s = 0.2 * number
            span = (f"00:00:{start_s:06.3f}", f"00:00:{start_s + 0.4:06.3f}", 1, 2)
            who = (f"{split}_{number}", "P01", "P01_01", "00:00:01.0", *span)
            names = [f"noun {n}" for n in nouns]
            what = (text, f"verb {verb}", verb, f"noun {noun}", noun, str(names), str(nouns))
            csv.writer(file).writerow([*who, *what])
