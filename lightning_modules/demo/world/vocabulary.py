"""Verbs, nouns and sentences of the demo world, and which pairs only the test split shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from datamodules.stream.captions import GAP


@dataclass(frozen=True)
class Verb:
    """One verb: a direction of time over a motion family.

    Attributes:
        name: As in EK-100's `verb` column (`push-left`).
        base: Imperative, as EK-100 narrates (`push`).
        third: Third person, as Ego4D narrates (`pushes`).
        tail: What follows the object (`left`); empty for most.
        family: Motion family; the two verbs of a family are each other's time reversal.
        direction: +1 plays the family's cycle forwards, -1 backwards.
    """

    name: str
    base: str
    third: str
    tail: str
    family: str
    direction: int


# The class id of a verb is its row; rows 2i and 2i + 1 are each other's time reversal.
VERBS: tuple[Verb, ...] = (
    Verb("open", "open", "opens", "", "lid", +1),
    Verb("close", "close", "closes", "", "lid", -1),
    Verb("pick-up", "pick up", "picks up", "", "lift", +1),
    Verb("put-down", "put down", "puts down", "", "lift", -1),
    Verb("push-left", "push", "pushes", "left", "slide", +1),
    Verb("push-right", "push", "pushes", "right", "slide", -1),
    Verb("turn-clockwise", "turn", "turns", "clockwise", "turn", +1),
    Verb("turn-anticlockwise", "turn", "turns", "anticlockwise", "turn", -1),
)

SHAPES: tuple[str, ...] = ("box", "bottle", "pot")
COLOURS: tuple[str, ...] = ("red", "yellow", "green", "blue")
# The class id of a noun is its row: shape-major, so that noun n has colour n % 4.
NOUNS: tuple[str, ...] = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)

# Ego4D's annotators write `#C C <verb>s the <noun>`; the others stand for the rephrasings of
# EgoClip+, and show the text tower the verb's base form before it meets EK-100's imperative.
_NARRATION_FORMS: tuple[tuple[str, bool], ...] = (
    ("#C C {}", True),
    ("#C C {} with the right hand", True),
    ("#C C starts to {}", False),
    ("#C C decides to {} on the table", False),
)


def reversed_verb(verb_class: int) -> int:
    """Class id of the verb that a clip of `verb_class` shows when it is played backwards."""
    return verb_class ^ 1


def is_test_only(verb_class: int, noun_class: int) -> bool:
    """True for the sixth of all verb-noun pairs that appears in the test split alone.

    Each verb family lacks two nouns in training and each noun one family at most, so that every
    word has been seen and only the combination is new:

        open, close: nouns 0, 6;   pick-up, put-down: nouns 1, 7;   push: 2, 8;   turn: 3, 9
    """
    return noun_class % 6 == verb_class // 2


def phrases() -> dict[str, list[list[str]]]:
    """How captions name verbs and nouns: what `HardNegatives.vocabulary` reads from a file."""
    verbs = [[GAP.join(part for part in (verb.base, verb.tail) if part)] for verb in VERBS]
    return {"verbs": verbs, "nouns": [[noun] for noun in NOUNS]}


def imperative(verb_class: int, noun_classes: Sequence[int]) -> str:
    """EK-100's style: `pick up red box`, `push blue cup and green pot left`."""
    verb = VERBS[verb_class]
    objects = " and ".join(NOUNS[noun] for noun in noun_classes)
    return " ".join(part for part in (verb.base, objects, verb.tail) if part)


def rephrasings(verb_class: int, noun_classes: Sequence[int]) -> list[str]:
    """Ego4D's style in every form: `#C C picks up the red box`, `#C C starts to ...`."""
    verb = VERBS[verb_class]
    objects = " and ".join(f"the {NOUNS[noun]}" for noun in noun_classes)
    return [
        form.format(
            " ".join(
                part for part in (verb.third if third else verb.base, objects, verb.tail) if part
            )
        )
        for form, third in _NARRATION_FORMS
    ]


def narration(verb_class: int, noun_classes: Sequence[int], rng: np.random.Generator) -> str:
    """One of the rephrasings, as an annotator would happen to write it."""
    forms = rephrasings(verb_class, noun_classes)
    return forms[rng.integers(len(forms))]
