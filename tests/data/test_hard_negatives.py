"""Hard negatives in the training stream: what they add, and that they change nothing else."""

import json

import pytest
import torch

from datamodules.pretrain import PretrainDataModule
from datamodules.tokenizer import Tokenizer
from datamodules.vocabulary import HardNegatives

VERBS = [["open"], ["pull"], ["lift"], ["turn"], ["wipe"]]
NOUNS = [[f"drawer {v}"] for v in range(4)] + [[f"lid {n}"] for n in range(6)]
NOUNS += [[f"handle {k}"] for k in range(8)]


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocabulary") / "v.json"
    path.write_text(json.dumps({"verbs": VERBS, "nouns": NOUNS}))
    return str(path)


def stream(shards, hard, rank=0, world=1, skip=0):
    """The epoch's batches of a rank, from a step on."""
    module = PretrainDataModule(
        [str(shards / "manifest.json")],
        num_frames=3,
        image_size=16,
        num_workers=0,
        global_batch_size=8,
        seed=4,
        lanes=8,
        hard_negatives=hard,
    )
    module._rank_and_world_size = lambda: (rank, world)
    module.load_state_dict({**module.state_dict(), "epoch": 1, "samples": 8 * skip})
    return list(module.train_dataloader())


def pairs(batches):
    """Every pair by its sample and how often that came before: the clip's own, then backwards."""
    found = {}
    for batch in batches:
        for b in range(len(batch)):
            sample = int(batch.sample_index[b])
            negatives = [] if batch.negative_tokens is None else batch.negative_tokens[b]
            found[sample, (sample, 0) in found] = (
                batch.video[b],
                batch.tokens[b][batch.tokens[b] > 0].tolist(),
                [row[row > 0].tolist() for row in negatives],
                batch.verb_classes[b].tolist(),
                batch.text_verb_classes[b].tolist(),
            )
    return found


def same(one, other):
    assert one.keys() == other.keys()
    for key, (video, *rest) in one.items():
        assert torch.equal(video, other[key][0]) and rest == list(other[key][1:])


def hard(vocabulary, share=1.0):
    return HardNegatives(vocabulary, 2, 1, [["open", "pull"]], share)


def test_the_pairs_themselves_stay_as_they_were(shards, vocabulary):
    plain, more = pairs(stream(shards, None)), pairs(stream(shards, hard(vocabulary)))
    own = {key: pair for key, pair in more.items() if not key[1]}
    assert own.keys() == plain.keys() and len(more) > len(own)
    for key, (video, tokens, _, *classes) in own.items():
        assert torch.equal(video, plain[key][0])
        assert [tokens, *classes] == [plain[key][1], *plain[key][3:]]


def test_backwards_is_the_same_clip_turned_round_with_the_inverse_verb(shards, vocabulary):
    found = pairs(stream(shards, hard(vocabulary)))
    word = {name: Tokenizer()([f"{name}s"])[0, 1].item() for name in ("open", "pull")}
    for (sample, backwards), (video, tokens, _, verbs, text_verbs) in found.items():
        of_forward = found[sample, False]
        says = [name for name, token in word.items() if token in of_forward[1]]
        reversible = of_forward[3] == [VERBS.index(says)]
        assert ((sample, True) in found) == reversible
        if backwards:
            assert torch.equal(video, of_forward[0].flip(1)) and not torch.equal(
                video, of_forward[0]
            )
            assert verbs == text_verbs == [1 - of_forward[3][0]]
            swap = {word["open"]: word["pull"], word["pull"]: word["open"]}
            assert tokens == [swap.get(token, token) for token in of_forward[1]]


def test_negatives_are_there_where_the_caption_names_its_classes(shards, vocabulary):
    for (_, _), (_, tokens, negatives, verbs, _) in pairs(stream(shards, hard(vocabulary))).items():
        word = Tokenizer()([f"{VERBS[verbs[0]][0]}s"])[0, 1].item()
        assert [bool(row) for row in negatives] == [word in tokens, word in tokens, True]
        assert all(row != tokens for row in negatives)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_two_ranks_hold_the_pairs_of_one(shards, vocabulary, share):
    whole = stream(shards, hard(vocabulary, share))
    parts = [stream(shards, hard(vocabulary, share), rank, 2) for rank in range(2)]
    assert not whole[0].even
    for batch, *halves in zip(whole, *parts, strict=True):
        same(pairs([batch]), pairs(halves))
    count = sum(map(len, whole))
    assert count > 32 and (share == 1 or count < sum(map(len, stream(shards, hard(vocabulary)))))


def test_a_resumed_stream_goes_on_with_the_same(shards, vocabulary):
    same(
        pairs(stream(shards, hard(vocabulary), skip=2)),
        pairs(stream(shards, hard(vocabulary))[2:]),
    )


def test_captions_alone_leave_the_batches_even(shards, vocabulary):
    batches = stream(shards, HardNegatives(vocabulary, num_verbs=1))
    assert all(batch.even and len(batch) == 8 for batch in batches)
    assert batches[0].negative_tokens.shape[:2] == (8, 1)


def test_a_vocabulary_of_other_words_is_told(shards, vocabulary, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("datamodules.stream.clips._MANY_PLAIN", 16)
    path = tmp_path / "v.json"
    others = {"verbs": [[f"fly {v}"] for v in range(5)], "nouns": [["moon"]] * 18}
    path.write_text(json.dumps(others))
    stream(shards, hard(vocabulary))
    assert not caplog.records
    stream(shards, HardNegatives(str(path), 2, 1, [["fly 0", "fly 1"]], 1.0))
    (record,) = caplog.records
    assert "16 clips in a row have none" in record.message and "the last is '" in record.message
