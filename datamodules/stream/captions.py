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
from functools import cached_property

from datamodules.manifest import ClipRecord

GAP = " ... "
Phrases = Mapping[int, Sequence[str]]
_Words = tuple[str, ...]
_Heads = Mapping[_Words, Mapping[_Words, int]]  # words before the gap -> after it -> class


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

    def with_classes(self, narration: Narration) -> Narration:
        """The narration; where it has no classes, as LaViLa's have none, with those that it names.

        At each word the longest phrase is taken (`put down` before `put`), one with a gap before
        one without, of those the one that ends first; a phrase of several classes stands for the
        first, as in `verb_class`.
        """
        return replace(
            narration,
            verb_classes=narration.verb_classes or _named(narration.text, self._verb_heads),
            noun_classes=narration.noun_classes or _named(narration.text, self._noun_heads),
        )

    @cached_property
    def _verb_heads(self) -> _Heads:
        return _heads(self.verbs, _VERB_FORMS)

    @cached_property
    def _noun_heads(self) -> _Heads:
        return _heads(self.nouns, _NOUN_FORMS)


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
        classes, or there are not so many others. A narration without classes has those it names.
        """
        narration = self.vocabulary.with_classes(narration)
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
        has no inverse, or the caption does not name it. Without classes in the data the verb is the
        one that the caption names, and the pair backwards has none either.
        """
        said = self.vocabulary.with_classes(narration).verb_classes
        if not all(
            len(classes) == 1 and classes[0] in self.inverse
            for classes in (record.verb_classes or said, said)
        ):
            return None
        verbs = self.vocabulary.verbs
        phrase = verbs[self.inverse[said[0]]][0]
        text = swap(narration.text, verbs, said, phrase, _VERB_FORMS)
        if text is None:
            return None
        turned = replace(narration, text=text, text_index=-1)
        return (
            replace(record, verb_classes=self._turned(record.verb_classes)),
            replace(turned, verb_classes=self._turned(narration.verb_classes)),
        )

    def _turned(self, verbs: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.inverse[verb] for verb in verbs)


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


def _heads(phrases: Phrases, forms: Sequence[Callable[[str], str]]) -> _Heads:
    """The words before each phrase's gap, in every form, and the classes that may be meant."""
    heads: dict[_Words, dict[_Words, tuple[int, int]]] = {}
    for c, row in phrases.items():
        for place, phrase in enumerate(row):
            head, _, tail = phrase.partition(GAP)
            for form in forms:
                tails = heads.setdefault(_words(form(head)), {})
                tails[_words(tail)] = min((place, c), tails.get(_words(tail), (place, c)))
    return {
        head: {tail: c for tail, (_, c) in tails.items()} for head, tails in heads.items() if head
    }


def _named(text: str, heads: _Heads) -> tuple[int, ...]:
    """Classes that a text names, in its order: see `Vocabulary.with_classes`."""
    words = _words(text)
    found: list[int] = []
    at = 0
    while at < len(words):
        for end in range(len(words), at, -1):
            tails = heads.get(words[at:end], {})
            ends = {tail: _end_of(tail, words, end) for tail in tails}
            meant = [tail for tail, place in ends.items() if place is not None]
            if meant:
                gapped = [tail for tail in meant if tail] or meant
                found.append(tails[min(gapped, key=lambda tail: (ends[tail], tail))])
                at = end - 1
                break
        at += 1
    return tuple(dict.fromkeys(found))


def _end_of(tail: _Words, words: _Words, start: int) -> int | None:
    """Where a phrase ends whose words after the gap are `tail`; None where they do not follow."""
    places = range(start + len(tail), len(words) + 1)
    return next((end for end in places if words[end - len(tail) : end] == tail), None)


def _words(text: str) -> _Words:
    return tuple(re.findall(r"\w+", text.lower()))
