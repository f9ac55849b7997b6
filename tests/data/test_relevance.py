"""Relevance against a loop written from its definition."""

import random

import pytest
import torch

from datamodules.batch import pad_class_ids
from datamodules.relevance import _overlap, compared_overlap, relevance_matrix


def slow(verbs, nouns, text_verbs, text_nouns):
    out = torch.zeros(len(verbs), len(text_verbs))
    for i in range(len(verbs)):
        for j in range(len(text_verbs)):
            a, b = set(nouns[i]), set(text_nouns[j])
            iou = len(a & b) / len(a | b) if a | b else 0.0
            out[i, j] = 0.5 * (verbs[i] == text_verbs[j]) + 0.5 * iou
    return out


def random_items(generator, count):
    verbs = [generator.randrange(5) for _ in range(count)]
    nouns = [[generator.randrange(9) for _ in range(generator.randrange(5))] for _ in range(count)]
    return verbs, nouns


def test_equals_the_definition():
    generator = random.Random(0)
    verbs, nouns = random_items(generator, 37)
    text_verbs, text_nouns = random_items(generator, 23)
    expected = slow(verbs, nouns, text_verbs, text_nouns)
    got = relevance_matrix(verbs, nouns, text_verbs, text_nouns)
    assert got.dtype == torch.float32
    # one float32 division each: equal to rounding of the loop's float64
    torch.testing.assert_close(got, expected, rtol=0, atol=6e-8)
    padded = relevance_matrix(
        torch.tensor(verbs),
        pad_class_ids(nouns),
        torch.tensor(text_verbs),
        pad_class_ids(text_nouns),
    )
    assert torch.equal(padded, got)


def test_own_texts_have_relevance_exactly_one():
    verbs, nouns = [3, 1], [[8, 2, 7], [5]]
    assert relevance_matrix(verbs, nouns).diagonal().tolist() == [1.0, 1.0]


def test_padding_and_missing_classes_match_nothing():
    got = relevance_matrix(torch.tensor([-1, 2]), torch.tensor([[-1, -1], [4, -1]]))
    assert got.tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_several_verbs_share_one():
    got = relevance_matrix(
        torch.tensor([[1, 2]]), [[0]], torch.tensor([[2, -1], [3, -1]]), [[1], [0]]
    )
    assert got.tolist() == [[0.5, 0.5]]


def test_large_ids_need_no_large_table():
    assert relevance_matrix([10**12], [[10**12]]).tolist() == [[1.0]]


def test_rows_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match="clips have 2 rows of verb ids and 1"):
        relevance_matrix([1, 2], [[3]])
    with pytest.raises(ValueError, match="given together"):
        relevance_matrix([1], [[3]], [1])


def test_comparing_ids_counts_as_the_product_of_indicators_does():
    """What runs on a GPU, where the number of distinct ids would have to be waited for."""
    draw = torch.Generator().manual_seed(0)
    for rows, width, other_rows, other_width in ((1, 1, 1, 1), (5, 3, 7, 2), (40, 6, 23, 5)):
        left = torch.randint(-1, 9, (rows, width), generator=draw)
        right = torch.randint(-1, 9, (other_rows, other_width), generator=draw)
        for got, expected in zip(compared_overlap(left, right), _overlap(left, right), strict=True):
            assert got.dtype == torch.float32 and torch.equal(got, expected)
