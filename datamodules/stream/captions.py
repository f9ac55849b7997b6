"""Captions that differ from a true one in one word: another verb, another noun, the verb's inverse.

Words come from a vocabulary: for each class the phrases by which captions name it. A phrase may
have a gap, `push ... left`, into which the object falls. Verbs are found and written in their base
form (EK-100's `open drawer`) and in the third person (Ego4D's `#C C opens the drawer`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from datamodules.manifest import ClipRecord

GAP = " ... "
Phrases = Mapping[int, Sequence[str]]


@dataclass(frozen=True)
class Narration:
    """A text and what it is about.

    Attributes:
        text: The text.
        text_index: Its row in the sentence list; -1 for the clip's own.
        verb_classes: Its verb class ids.
        noun_classes: Its noun class ids.
    """

    text: str
    text_index: int
    verb_classes: Sequence[int]
    noun_classes: Sequence[int]


@dataclass(frozen=True)
class Vocabulary:
    """How captions name the classes of a data set.

    Attributes:
        verbs: Verb class id -> phrases in their base form; synonyms share a class.
        nouns: Noun class id -> phrases.
    """

    verbs: Phrases
    nouns: Phrases

    def verb_class(self, name: str) -> int:
        """The class of which `name` is a phrase; the one where it comes first, if several have it.

        Raises:
            ValueError: None has.
        """
        named = [c for c, phrases in self.verbs.items() if name in phrases]
        if not named:
            raise ValueError(f"verb {name!r} is no phrase of the vocabulary's verbs")
        return min(named, key=lambda c: (list(self.verbs[c]).index(name), c))


@dataclass(frozen=True)
class CaptionNegatives:
    """What the training stream adds to a pair to make it hard; all of it drawn from one generator.

    Attributes:
        vocabulary: Where words come from.
        num_verbs: Captions with another verb, for each caption.
        num_nouns: Captions with another noun.
        inverse: Verb class -> the verb of the same clip played backwards.
        reversed_share: Share of the clips that have an inverse which are also shown backwards.
    """

    vocabulary: Vocabulary
    num_verbs: int = 0
    num_nouns: int = 0
    inverse: Mapping[int, int] = field(default_factory=dict)
    reversed_share: float = 0.0

    def captions(self, narration: Narration, generator: random.Random) -> list[str]:
        """`num_verbs + num_nouns` captions that differ from a true one in its verb, or its noun.

        The classes of the new words are different ones and none of the narration's: a synonym is
        never a negative. "" stands for what cannot be made: the caption names no word of its own
        classes, or there are not so many others.
        """
        made: list[str] = []
        for phrases, own, count, forms in (
            (self.vocabulary.verbs, narration.verb_classes, self.num_verbs, _VERB_FORMS),
            (self.vocabulary.nouns, narration.noun_classes, self.num_nouns, _NOUN_FORMS),
        ):
            others = _others(phrases, own)
            chosen = generator.sample(others, min(count, len(others)))
            texts = [
                swap(narration.text, phrases, own, generator.choice(phrases[c]), forms)
                for c in chosen
            ]
            made += [text or "" for text in texts] + [""] * (count - len(texts))
        return made

    def backwards(self, record: ClipRecord, narration: Narration) -> _Backwards | None:
        """What the clip and its narration become when the clip is played backwards.

        None where that has no name: the clip or the narration is not of exactly one verb, its verb
        has no inverse, or the caption does not name it.
        """
        pair = []
        for classes in (record.verb_classes, narration.verb_classes):
            if len(classes) != 1 or classes[0] not in self.inverse:
                return None
            pair.append((self.inverse[classes[0]],))
        phrase = self.vocabulary.verbs[pair[1][0]][0]
        verbs = self.vocabulary.verbs
        text = swap(narration.text, verbs, narration.verb_classes, phrase, _VERB_FORMS)
        if text is None:
            return None
        new = replace(narration, text=text, text_index=-1, verb_classes=pair[1])
        return replace(record, verb_classes=pair[0]), new


_Backwards = tuple[ClipRecord, Narration]


def _others(phrases: Phrases, own: Sequence[int]) -> list[int]:
    """Classes that share neither their id nor a phrase with one's own."""
    mine = {phrase for c in own for phrase in phrases.get(c, ())}
    return [c for c in phrases if c not in own and mine.isdisjoint(phrases[c])]


def swap(
    text: str,
    phrases: Phrases,
    own: Sequence[int],
    new: str,
    forms: Sequence[Callable[[str], str]],
) -> str | None:
    """Write `new` where the text names one of its own classes; None where it names none.

    The longest phrase that occurs is taken (`put down` before `put`), in any of the forms; the new
    one gets the same form. Its part after the gap goes where the old one's was, else to the end.
    """
    known = sorted({p for c in own for p in phrases.get(c, ())}, key=lambda p: (-len(p), p))
    for phrase in known:
        head, _, tail = phrase.partition(GAP)
        for form in forms:
            pattern = rf"\b{re.escape(form(head))}\b"
            if tail:
                pattern += rf"(?P<between>.*?)\s+{re.escape(tail)}\b"
            found = re.search(pattern, text, re.IGNORECASE)
            if found:
                new_head, _, new_tail = new.partition(GAP)
                between, after = (found["between"], text[found.end() :]) if tail else ("", "")
                if not tail:
                    between = text[found.end() :]
                parts = text[: found.start()] + form(new_head) + between
                return parts + (f" {new_tail}" if new_tail else "") + after
    return None


def third_person(verb: str) -> str:
    """`pick up` -> `picks up`, `carry` -> `carries`, `wash` -> `washes`."""
    first, space, rest = verb.partition(" ")
    if re.search(r"[^aeiou]y$", first):
        first = first[:-1] + "ies"
    else:
        first += "es" if re.search(r"(s|x|z|ch|sh|o)$", first) else "s"
    return first + space + rest


def _as_it_is(word: str) -> str:
    return word


_VERB_FORMS = (third_person, _as_it_is)
_NOUN_FORMS = (_as_it_is,)
