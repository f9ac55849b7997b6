"""mAP and nDCG against the protocol in plain numpy, by hand, and at every edge."""

import numpy as np
import pytest
import torch
from retrieval_protocol import protocol, relevance_of_sets
from torch.utils._python_dispatch import TorchDispatchMode

from datamodules.batch import pad_class_ids
from datamodules.relevance import relevance_matrix
from lightning_modules.metrics.functional import (
    class_sets,
    multi_instance_map,
    multi_instance_ndcg,
    multi_instance_scores,
    multi_instance_scores_from_classes,
    multi_instance_scores_from_embeddings,
    ranking,
)
from lightning_modules.metrics.functional.class_relevance import relevance_block
from lightning_modules.metrics.functional.repeatable import sum_by_group

# Two implementations that sum in fp64 in different orders.
TOLERANCE = 1e-12


def class_items(num: int, seed: int) -> list[tuple[int, set]]:
    draw = np.random.default_rng(seed)
    return [
        (int(draw.integers(4)), set(draw.integers(6, size=1 + i % 3).tolist())) for i in range(num)
    ]


def padded(items: list[tuple[int, set]]) -> tuple[torch.Tensor, torch.Tensor]:
    return pad_class_ids([[verb] for verb, _ in items]), pad_class_ids([list(n) for _, n in items])


def case(num_videos: int, num_texts: int, dtype=torch.float32, tied: bool = False):
    texts = class_items(num_texts, seed=1)
    videos = [texts[i % num_texts] for i in range(num_videos)]
    relevance = torch.from_numpy(relevance_of_sets(videos, texts))
    draw = torch.Generator().manual_seed(num_videos)
    similarity = torch.randn(num_videos, num_texts, generator=draw)
    if tied:  # few values, both zeros among them
        similarity = (similarity * 2).round() / 4
        assert (similarity == 0).any()
        assert torch.signbit(similarity[similarity == 0]).any()
    return similarity.to(dtype), relevance


@pytest.mark.parametrize("block_elements", [1, 100, 2**19])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(31, 17), (5, 23)])
def test_matches_the_protocol(shape, dtype, tied, block_elements, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK_ELEMENTS", block_elements)
    monkeypatch.setattr(ranking, "MIN_ROWS", 1)
    similarity, relevance = case(*shape, dtype, tied)
    expected = protocol(similarity.double().numpy(), relevance.numpy())
    for name, function in (("map", multi_instance_map), ("ndcg", multi_instance_ndcg)):
        mine = [value.item() for value in function(similarity, relevance)]
        assert mine == pytest.approx(expected[name], abs=TOLERANCE, rel=0)


def test_by_hand():
    # places of the items: 1 has relevance .5, 2 has 1, 3 has 0, 4 has 1
    similarity = torch.tensor([[0.8, 0.9, 0.1, 0.5]])
    relevance = torch.tensor([[1.0, 0.5, 1.0, 0.0]], dtype=torch.float64)
    v2t, _ = multi_instance_map(similarity, relevance)
    assert v2t.item() == pytest.approx((1.5 / 2 + 2.5 / 4) / 2)
    v2t, _ = multi_instance_ndcg(similarity, relevance)
    # k = 3: the relevant item in place 4 gains nothing
    gain, ideal = 0.5 + 1 / np.log2(3), 1 + 1 / np.log2(3) + 0.5 / np.log2(4)
    assert v2t.item() == pytest.approx(gain / ideal)


def test_graded_relevance_is_cumulated_not_binary():
    similarity, relevance = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0.0, 0.5, 1.0]])
    assert multi_instance_map(similarity, relevance)[0].item() == pytest.approx(1.5 / 3)


def test_tied_items_rank_by_index():
    same = torch.zeros(1, 3)
    ranks = [multi_instance_map(same, torch.eye(3)[[i]])[0].item() for i in range(3)]
    assert ranks == pytest.approx([1, 1 / 2, 1 / 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_nothing_but_ties_rank_by_index(dtype):
    similarity = torch.zeros(3, 1000, dtype=dtype)
    similarity[1, 500:] = 1.0
    expected = torch.arange(1000).repeat(3, 1)
    expected[1] = expected[1].roll(500)
    assert torch.equal(ranking.descending_order(similarity), expected)


def test_a_matrix_that_does_not_fit_the_classes_is_refused():
    ids = torch.zeros(4, 1, dtype=torch.int64)
    videos, texts = class_sets((ids[:3], ids), (ids[:3], ids))
    told = r"shape \(4, 3\); with 3 videos \(rows\) and 4 texts \(columns\) it must be \(3, 4\)"
    with pytest.raises(ValueError, match=told):
        multi_instance_scores_from_classes(torch.zeros(4, 3), videos, texts)


def test_infinite_similarities_rank():
    similarity = torch.tensor([[-torch.inf, 1.0, torch.inf]])
    assert multi_instance_map(similarity, torch.tensor([[1.0, 0, 0]]))[0].item() == 1 / 3


def test_queries_without_a_match_are_left_out_and_counted():
    similarity = torch.tensor([[2.0, 1.0], [1.0, 2.0], [1.0, 2.0]])
    relevance = torch.tensor([[1.0, 0.0], [0.5, 0.0], [0.0, 0.0]])
    scores = multi_instance_scores(similarity, relevance)
    assert (scores.v2t.map, scores.v2t.num_queries) == (1.0, 3)
    assert scores.v2t.num_excluded_map == 2
    assert scores.v2t.num_excluded_ndcg == 1
    assert scores.v2t.ndcg == pytest.approx((1 + 0) / 2)
    assert (scores.t2v.num_excluded_map, scores.t2v.num_excluded_ndcg) == (1, 1)
    nothing = multi_instance_scores(similarity, torch.zeros(3, 2))
    assert np.isnan(nothing.v2t.map)
    assert nothing.v2t.num_excluded_map == 3


@pytest.mark.parametrize("block_elements", [50, 2**19])
def test_embeddings_score_as_their_matrix_does(block_elements, monkeypatch):
    monkeypatch.setattr(ranking, "BLOCK_ELEMENTS", block_elements)
    monkeypatch.setattr(ranking, "MIN_ROWS", 1)
    texts = class_items(19, seed=3)
    videos = class_items(40, seed=4)
    draw = torch.Generator().manual_seed(0)
    video, text = torch.randn(40, 8, generator=draw), torch.randn(19, 8, generator=draw)
    (video_verbs, video_nouns), (text_verbs, text_nouns) = padded(videos), padded(texts)
    sets = class_sets((video_verbs, text_verbs), (video_nouns, text_nouns))
    scores = multi_instance_scores_from_embeddings(video, text, *sets)
    relevance = torch.from_numpy(relevance_of_sets(videos, texts))
    assert scores == multi_instance_scores(video @ text.T, relevance)
    assert scores == multi_instance_scores_from_classes(video @ text.T, *sets)
    assert scores.v2t.num_excluded_map > 0


def test_relevance_blocks_equal_the_training_labels():
    """The metric may not import the data room's formula; it must be the same one."""
    videos, texts = class_items(12, seed=5), class_items(9, seed=6)
    videos[3] = (1, set())
    texts[4] = (1, set())
    verbs = pad_class_ids([[verb, (verb + i) % 4] for i, (verb, _) in enumerate(videos)])
    nouns = padded(videos)[1]
    rows = (verbs, torch.cat([nouns, nouns[:, :1]], dim=1))  # an id twice counts once
    columns = padded(texts)
    left, right = class_sets((rows[0], columns[0]), (rows[1], columns[1]))
    block = relevance_block(left, right, slice(0, 12))
    torch.testing.assert_close(block.float(), relevance_matrix(*rows, *columns), rtol=0, atol=1e-7)
    assert torch.equal(relevance_block(left, right, slice(2, 5)), block[2:5])


@pytest.mark.parametrize(
    ("similarity", "relevance", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 2), r"shape \(2, 3\) and relevance \(3, 2\)"),
        (torch.ones(3), torch.ones(3), "must be a floating point matrix"),
        (torch.ones(0, 3), torch.ones(0, 3), "at least one"),
        (torch.tensor([[1.0, torch.nan]]), torch.ones(1, 2), "1 NaN among 2"),
        (torch.ones(1, 2), torch.tensor([[1.0, 1.5]]), r"must lie in \[0, 1\]"),
        (torch.ones(1, 2), torch.tensor([[1.0, -0.5]]), r"must lie in \[0, 1\]"),
        (torch.ones(1, 2), torch.tensor([[1.0, torch.nan]]), r"must lie in \[0, 1\]"),
        (torch.ones(1, 2, dtype=torch.int64), torch.ones(1, 2), "must be a floating point"),
    ],
)
def test_bad_input_is_refused(similarity, relevance, message):
    with pytest.raises(ValueError, match=message):
        multi_instance_map(similarity, relevance)


def test_embeddings_that_do_not_fit_are_refused():
    verbs, nouns = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)
    sets = class_sets((verbs, verbs), (nouns, nouns))
    with pytest.raises(ValueError, match="one row of classes each"):
        multi_instance_scores_from_embeddings(torch.ones(3, 4), torch.ones(2, 4), *sets)
    with pytest.raises(ValueError, match=r"shape \(3, 2\).* must be \(2, 2\)"):
        multi_instance_scores_from_classes(torch.ones(3, 2), *sets)
    with pytest.raises(ValueError, match="class ids of texts"):
        class_sets((verbs, verbs), (nouns, nouns[:1]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("tied", [False, True])
def test_the_gpu_ranks_alike(tied):
    similarity, relevance = case(31, 17, tied=tied)
    assert torch.equal(
        ranking.descending_order(similarity), ranking.descending_order(similarity.cuda()).cpu()
    )
    on_cpu = multi_instance_scores(similarity, relevance)
    on_gpu = multi_instance_scores(similarity.cuda(), relevance.cuda())
    assert on_gpu.v2t.map == pytest.approx(on_cpu.v2t.map, abs=TOLERANCE)
    assert on_gpu.t2v.ndcg == pytest.approx(on_cpu.t2v.ndcg, abs=TOLERANCE)


def test_nothing_that_deterministic_mode_refuses_on_a_gpu():
    """There it raises for a weighted `bincount` and for running sums of floats."""
    draw = torch.Generator().manual_seed(0)
    values, group = torch.rand(50, generator=draw, dtype=torch.float64), torch.arange(50) % 7
    expected = group.bincount(values, minlength=9)
    assert torch.equal(sum_by_group(values, group, 9), expected)
    weighted: list[object] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.bincount.default and len(args) > 1 and args[1] is not None:
                weighted.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        group.bincount(values)
        assert weighted.pop()  # it would be seen
        multi_instance_map(torch.rand(6, 9, generator=draw), torch.eye(6, 9))
        multi_instance_ndcg(torch.rand(6, 9, generator=draw), torch.eye(6, 9) / 2 + 0.1)
    assert weighted == []
