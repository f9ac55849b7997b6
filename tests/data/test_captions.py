"""Captions made false by one word: what is found, what replaces it, what never does."""

import json
import random

import pytest

from datamodules.manifest import ClipRecord
from datamodules.stream.captions import CaptionNegatives, Narration, Vocabulary, third_person
from datamodules.vocabulary import HardNegatives, read_vocabulary
from lightning_modules.demo.world.vocabulary import (
    NOUNS,
    VERBS,
    imperative,
    phrases,
    rephrasings,
    reversed_verb,
)

VOCABULARY = Vocabulary(
    verbs={
        0: ("open",),
        1: ("close", "shut"),
        2: ("pick up", "take"),
        3: ("put down", "put"),
        4: ("push ... left",),
        5: ("push ... right",),
        6: ("move", "put"),  # shares a word with 3
    },
    nouns={0: ("drawer",), 1: ("red box", "box"), 2: ("knife",)},
)


def narration(text, verbs, nouns=(0,)):
    return Narration(text, -1, verbs, nouns)


def swapped(text, verb, new):
    """The caption with verb class `new`, as reversal writes it."""
    inverse = CaptionNegatives(VOCABULARY, inverse={verb: new, new: verb})
    turned = inverse.backwards(
        ClipRecord("c", "v", 0, 1, (text,), (verb,), (0,)), narration(text, [verb])
    )
    return None if turned is None else turned[1].text


@pytest.mark.parametrize(
    ("text", "verb", "new", "expected"),
    [
        ("open drawer", 0, 1, "close drawer"),
        ("#C C opens the drawer", 0, 1, "#C C closes the drawer"),
        ("#C C starts to open the drawer", 0, 1, "#C C starts to close the drawer"),
        ("Opens the drawer", 0, 2, "picks up the drawer"),
        ("#C C puts down the knife", 3, 2, "#C C picks up the knife"),  # not "puts"
        ("shut the box", 1, 0, "open the box"),
        ("push blue cup left", 4, 5, "push blue cup right"),
        ("push blue cup left with a knife", 4, 5, "push blue cup right with a knife"),
        ("push blue cup left", 4, 0, "open blue cup"),
        ("open blue cup", 0, 4, "push blue cup left"),
        ("reopen the drawer", 0, 1, None),  # no word of its own
        ("push blue cup", 4, 5, None),
    ],
)
def test_a_verb_is_swapped_in_its_own_form(text, verb, new, expected):
    assert swapped(text, verb, new) == expected


@pytest.mark.parametrize(
    ("base", "third"),
    [("pick up", "picks up"), ("carry", "carries"), ("wash", "washes"), ("play", "plays"),
     ("fix", "fixes"), ("do", "does"), ("reach for", "reaches for"), ("press", "presses")],
)  # fmt: skip
def test_third_person(base, third):
    assert third_person(base) == third


def test_negatives_are_other_classes_and_never_a_synonym():
    hard = CaptionNegatives(VOCABULARY, num_verbs=4, num_nouns=2)
    seen = set()
    for seed in range(200):
        made = hard.captions(narration("#C C puts the red box away", [3], [1]), random.Random(seed))
        assert len(made) == 6 and len(set(made[:4])) == 4
        assert all(text.endswith("the red box away") or "box away " in text for text in made[:4])
        assert all(text.startswith("#C C puts the") for text in made[4:])
        seen |= set(made)
    words = " ".join(seen)
    assert "moves" not in words  # class 6 says "put" too
    assert "puts down" not in words and "drawer" in words and "knife" in words
    # ... and the short phrase of the noun's own class is never put for the long one
    assert "#C C puts the box away" not in seen
    assert {"#C C takes the red box away", "#C C picks up the red box away"} <= seen


def test_what_cannot_be_made_is_empty():
    hard = CaptionNegatives(VOCABULARY, num_verbs=2, num_nouns=3)
    made = hard.captions(narration("open drawer", [1], [0]), random.Random(0))
    assert made[:2] == ["", ""]  # it does not say "close"
    assert sorted(map(bool, made[2:])) == [False, True, True]  # two other nouns


def test_the_same_draws_make_the_same_captions():
    hard = CaptionNegatives(VOCABULARY, num_verbs=3, num_nouns=1)
    first, again, other = (
        hard.captions(narration("open drawer", [0]), random.Random(seed)) for seed in (1, 1, 2)
    )
    assert first == again != other


def test_backwards_takes_the_clips_and_the_texts_verb_each():
    hard = CaptionNegatives(VOCABULARY, inverse={0: 1, 1: 0, 2: 3, 3: 2})
    record = ClipRecord("c", "v", 0, 1, ("take box",), (2,), (1,))
    turned_record, turned = hard.backwards(record, Narration("open drawer", 7, (0,), (0,)))
    assert turned_record.verb_classes == (3,) and turned.verb_classes == (1,)
    assert (turned.text, turned.text_index) == ("close drawer", -1)
    for verbs in ((4,), (0, 1)):
        assert hard.backwards(record, Narration("open drawer", 7, verbs, ())) is None


@pytest.mark.parametrize(
    ("text", "verbs", "nouns"),
    [
        ("#C C opens the drawer", [0], [0]),
        ("#C C puts down the knife", [3], [2]),  # not "puts"
        ("put the red box away", [3], [1]),  # "put" is class 3's second phrase and class 6's too
        ("#C C pushes the red box left with the right hand", [4], [1]),
        ("push knife right with the left hand", [5], [2]),
        ("#C C shuts the drawer and takes a knife", [1, 2], [0, 2]),
        ("#C C pushes the drawer", [], [0]),  # neither left nor right
        ("#C C reopens the knifes", [], []),
    ],
)
def test_a_narration_without_classes_has_those_it_names(text, verbs, nouns):
    said = VOCABULARY.with_classes(Narration(text, -1, (), ()))
    assert (list(said.verb_classes), list(said.noun_classes)) == (verbs, nouns)
    own = Narration(text, -1, (6,), (1,))
    assert VOCABULARY.with_classes(own) == own


def test_clips_without_classes_are_turned_and_falsified_by_their_captions():
    hard = CaptionNegatives(VOCABULARY, 2, 1, inverse={0: 1, 1: 0})
    bare = ClipRecord("c", "v", 0, 1, ("",))
    for seed in range(5):
        made = hard.captions(narration("#C C opens the drawer", (), ()), random.Random(seed))
        assert made == hard.captions(narration("#C C opens the drawer", (0,)), random.Random(seed))
        assert all(made)
    found = hard.backwards(bare, Narration("#C C opens the drawer", 3, (), ()))
    assert found == (bare, Narration("#C C closes the drawer", -1, (), ()))
    assert hard.backwards(bare, Narration("#C C opens and shuts the drawer", 3, (), ())) is None
    assert hard.backwards(bare, Narration("#C C sits", 3, (), ())) is None


def test_a_vocabulary_file(tmp_path):
    path = tmp_path / "v.json"
    path.write_text(json.dumps({"verbs": [["open"], ["close", "shut"]], "nouns": [["box"]]}))
    assert read_vocabulary(path) == Vocabulary({0: ("open",), 1: ("close", "shut")}, {0: ("box",)})
    hard = HardNegatives(str(path), 2, 1, [["shut", "open"]], 0.5).read()
    assert hard.inverse == {0: 1, 1: 0} and (hard.num_verbs, hard.num_nouns) == (2, 1)
    for pairs, told in (
        ([["open", "push"]], "'push' is no phrase"),
        ([["close", "shut"]], "both are of one class"),
        ([["open"]], "a pair of verbs"),
    ):
        with pytest.raises(ValueError, match=told):
            HardNegatives(str(path), inverse_verbs=pairs, reversed_share=1.0).read()
    for content in ('{"verbs": ["open"], "nouns": []}', "[]", "{", '{"verbs": [[]], "nouns": []}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="is no vocabulary"):
            read_vocabulary(path)


def test_the_demo_worlds_vocabulary_names_its_verbs_and_their_reversal(tmp_path):
    path = tmp_path / "vocabulary.json"
    path.write_text(json.dumps(phrases()))
    vocabulary = read_vocabulary(path)
    assert [list(p) for p in vocabulary.nouns.values()] == [[noun] for noun in NOUNS]
    hard = CaptionNegatives(vocabulary, 7, 11, {v: reversed_verb(v) for v in range(len(VERBS))})
    for verb in range(len(VERBS)):
        record = ClipRecord("c", "v", 0, 1, ("",), (verb,), (5,))
        for write in (lambda v, n: [imperative(v, n)], rephrasings):
            for text, turned in zip(write(verb, [5]), write(reversed_verb(verb), [5]), strict=True):
                found = hard.backwards(record, narration(text, [verb], [5]))
                assert found is not None and found[1].text == turned
                assert all(hard.captions(narration(text, [verb], [5]), random.Random(0)))
                said = vocabulary.with_classes(narration(text, [], []))
                assert (said.verb_classes, said.noun_classes) == ((verb,), (5,))


def test_epics_class_files(tmp_path):
    header = "id,key,instances,category\n"
    verbs = header + "0,take,\"['collect-from', 'take']\",retrieve\n1,put-down,['put-down'],x\n"
    nouns = header + "0,board:chopping,\"['board:chopping', 'board']\",y\n"
    (tmp_path / "EPIC_100_verb_classes.csv").write_text(verbs)
    (tmp_path / "EPIC_100_noun_classes.csv").write_text(nouns)
    assert read_vocabulary(tmp_path) == Vocabulary(
        {0: ("take", "collect from"), 1: ("put down",)}, {0: ("chopping board", "board")}
    )
    (tmp_path / "EPIC_100_noun_classes.csv").write_text(header + "0,box,box,y\n")
    with pytest.raises(ValueError, match=r"noun_classes.csv, line 2"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_verbs": -1}, "may not be negative"),
        ({"reversed_share": 1.5}, r"lies in \[0, 1\]"),
        ({"reversed_share": 0.5}, "needs inverse_verbs"),
    ],
)
def test_impossible_settings_are_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        HardNegatives("v.json", **settings)
