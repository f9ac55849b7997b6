"""The words of a data set's classes, from its published files, and hard negatives made of them."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datamodules.annotations.table import read_table
from datamodules.stream.captions import CaptionNegatives, Vocabulary


@dataclass
class HardNegatives:
    """Hard negatives of the training stream.

    Clips without classes, as LaViLa's pickles have them, have those that their captions name.

    Attributes:
        vocabulary: A JSON file `{"verbs": [["open"], ...], "nouns": [[...], ...]}` with the phrases
            of each class, its place being its id; or the folder of EK-100's
            `EPIC_100_verb_classes.csv` and `EPIC_100_noun_classes.csv`.
        num_verbs: Captions with another verb that go with each caption, for `EgoNCEPlusPlusLoss`.
        num_nouns: Captions with another noun.
        inverse_verbs: Pairs of verbs of which each is the other played backwards.
        reversed_share: Share of the clips of such verbs that the batch also holds backwards, with
            the inverse verb in their caption: pairs of their own, for any loss. A batch then has
            up to (1 + share) times the recipe's pairs.
    """

    vocabulary: str
    num_verbs: int = 0
    num_nouns: int = 0
    inverse_verbs: list[list[str]] = field(default_factory=list)
    reversed_share: float = 0.0

    def __post_init__(self) -> None:
        if min(self.num_verbs, self.num_nouns) < 0 or not 0 <= self.reversed_share <= 1:
            raise ValueError(
                f"num_verbs {self.num_verbs}, num_nouns {self.num_nouns}, reversed_share "
                f"{self.reversed_share} given; numbers may not be negative, the share lies in "
                "[0, 1]"
            )
        if self.reversed_share and not self.inverse_verbs:
            raise ValueError("reversed_share needs inverse_verbs: [[open, close], ...]")
        for pair in self.inverse_verbs:
            if len(pair) != 2:
                raise ValueError(f"inverse_verbs holds {pair}; each entry is a pair of verbs")

    def read(self) -> CaptionNegatives:
        """Read the vocabulary.

        Raises:
            ValueError: A file is missing or malformed, or a verb is not in it.
        """
        vocabulary = read_vocabulary(self.vocabulary)
        inverse: dict[int, int] = {}
        for pair in self.inverse_verbs:
            one, other = map(vocabulary.verb_class, pair)
            if one == other or inverse.get(one, other) != other or inverse.get(other, one) != one:
                raise ValueError(
                    f"inverse_verbs holds {pair}, but one of them is in another pair already or "
                    "both are of one class"
                )
            inverse |= {one: other, other: one}
        return CaptionNegatives(
            vocabulary, self.num_verbs, self.num_nouns, inverse, self.reversed_share
        )


def read_vocabulary(path: str | Path) -> Vocabulary:
    """Read a vocabulary, as `HardNegatives.vocabulary` says.

    Raises:
        ValueError: A file is missing or malformed.
    """
    path = Path(path)
    if path.is_dir():
        verbs = _epic_classes(path / "EPIC_100_verb_classes.csv", _epic_verb)
        return Vocabulary(verbs, _epic_classes(path / "EPIC_100_noun_classes.csv", _epic_noun))
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Vocabulary(*(_phrases(content[kind]) for kind in ("verbs", "nouns")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f'{path} is no vocabulary {{"verbs": [["open"], ...], "nouns": [["drawer"], ...]}}: '
            f"{error!r}"
        ) from error


def _phrases(rows: Any) -> dict[int, tuple[str, ...]]:
    phrases = {}
    for number, row in enumerate(rows):
        if isinstance(row, str) or not row or not all(isinstance(p, str) and p for p in row):
            raise ValueError(f"entry {number} is {row!r}; it must be a list of phrases")
        phrases[number] = tuple(row)
    return phrases


def _epic_classes(path: Path, phrase: Any) -> dict[int, tuple[str, ...]]:
    classes = {}
    for number, row in enumerate(read_table(path, ("id", "key", "instances")), start=2):
        try:
            names = [row["key"], *ast.literal_eval(row["instances"])]
            classes[int(row["id"])] = tuple(dict.fromkeys(phrase(name) for name in names))
        except (ValueError, SyntaxError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return classes


def _epic_verb(name: str) -> str:
    """`pick-up` -> `pick up`."""
    return name.replace("-", " ")


def _epic_noun(name: str) -> str:
    """`board:chopping` -> `chopping board`."""
    return " ".join(reversed(name.split(":")))
