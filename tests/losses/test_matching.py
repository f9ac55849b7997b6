"""Mining and the matching loss: against loops, and over real gloo ranks."""

import math

import pytest
import torch
from gloo_ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_modules.losses.gather import GlobalBatch, gather_no_gradient
from lightning_modules.losses.matching import Pairs, matching_loss, mine_pairs

HOW = {"temperature": 0.2, "below": 0.6}


def global_batch(size: int = 9):
    draw = torch.Generator().manual_seed(2)
    clips, texts = (torch.randn(size, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    relevance = torch.randint(0, 5, (size, size), generator=draw) / 4
    return clips, texts, relevance


def test_pairs_are_the_batch_and_what_is_irrelevant_enough():
    clips, texts, relevance = global_batch()
    relevance[3] = 1.0  # no text of the batch is a negative of clip 3
    pairs = mine_pairs(clips @ texts.T, relevance, 7, **HOW)
    own, rest = list(range(9)), slice(9, None)
    assert pairs.clips[:9].tolist() == own and pairs.texts[:9].tolist() == own
    anchors = [i for i in own if i != 3]
    assert pairs.clips[rest][: len(anchors)].tolist() == anchors  # a mined text each, 3 has none
    assert pairs.texts[rest][len(anchors) :].tolist() == own  # and a mined clip for every text
    for clip, text in zip(pairs.clips[rest].tolist(), pairs.texts[rest].tolist(), strict=True):
        assert clip != text and relevance[clip, text] < 0.6
    again = mine_pairs(clips @ texts.T, relevance, 7, **HOW)
    assert torch.equal(again.texts, pairs.texts) and torch.equal(again.clips, pairs.clips)
    other = mine_pairs(clips @ texts.T, relevance, 8, **HOW)
    assert not (torch.equal(other.texts, pairs.texts) and torch.equal(other.clips, pairs.clips))


@pytest.mark.parametrize("side", [0, 1])
def test_draws_follow_the_softmax_of_what_is_allowed(side):
    similarity = torch.tensor([[0.9, 0.3, 0.1, 0.5], *[[0.0] * 4] * 3])
    relevance = torch.tensor([[1.0, 0.0, 0.2, 0.7], *[[1.0] * 4] * 3])
    if side:
        similarity, relevance = similarity.T, relevance.T
    drawn = [0, 0]
    for seed in range(2000):
        pairs = mine_pairs(similarity, relevance, seed, **HOW)
        mined = pairs.clips[6].item() if side else pairs.texts[4].item()  # mined texts come first
        drawn[mined - 1] += 1  # 0 is its own, 3 too relevant
    odds = math.exp((0.3 - 0.1) / 0.2)
    # three standard deviations of 2,000 draws are 0.03
    assert drawn[0] / 2000 == pytest.approx(odds / (1 + odds), abs=0.03)


def test_the_hardest_is_taken_as_the_temperature_falls():
    clips, texts, relevance = global_batch()
    similarity = clips @ texts.T
    pairs = mine_pairs(similarity, relevance, 0, temperature=1e-6, below=0.6)
    may = (relevance < 0.6) & ~torch.eye(9, dtype=torch.bool)
    hardest = similarity.masked_fill(~may, -torch.inf).argmax(1)
    assert may.any(1).all() and torch.equal(pairs.texts[9:18], hardest)


def test_a_batch_without_negatives_is_its_own_pairs():
    pairs = mine_pairs(torch.zeros(3, 3), torch.ones(3, 3), 0, **HOW)
    assert pairs.clips.tolist() == pairs.texts.tolist() == [0, 1, 2]


def test_the_loss_is_its_equation():
    logits = torch.tensor([0.3, -2.0, 1.5], dtype=torch.float64, requires_grad=True)
    relevance = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    loss = matching_loss(logits, relevance, 3, GlobalBatch([3], 0))
    slow = 0.0
    for logit, c in zip(logits.tolist(), relevance.tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        slow -= (c * math.log(p) + (1 - c) * math.log(1 - p)) / 3
    assert loss.item() == pytest.approx(slow, rel=1e-14)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradient, (logits.detach().sigmoid() - relevance) / 3)


class Head(nn.Module):
    """A bilinear re-ranker in fp64, so that any difference is a fault."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.weight = nn.Parameter(torch.randn(5, 5, dtype=torch.float64))

    def forward(self, clips, texts):
        return ((clips @ self.weight) * texts).sum(1)


def step(head: nn.Module, rows: slice, size: int):
    """One rank's part, as `RerankModule.training_step` does it."""
    clips, texts, relevance = global_batch(size)
    local = clips[rows]
    pairs = mine_pairs(gather_no_gradient(local) @ texts.T, relevance, 3, **HOW)
    batch = GlobalBatch.of(local)
    own: Pairs = pairs.of_clips(batch.first, len(local))
    logits = head(clips[own.clips], texts[own.texts])
    loss = matching_loss(logits, relevance[own.clips, own.texts], len(pairs), batch)
    loss.backward()
    return loss.detach(), next(head.parameters()).grad.clone()


def step_of_a_rank(rank: int, sizes: list[int]):
    start = sum(sizes[:rank])
    rows = slice(start, start + sizes[rank])
    return step(DistributedDataParallel(Head()), rows, sum(sizes))


@pytest.mark.distributed
@pytest.mark.parametrize("sizes", [[4, 4], [6, 1, 2]])
def test_ranks_equal_one_process(sizes):
    loss, gradient = step(Head(), slice(0, sum(sizes)), sum(sizes))
    assert gradient.abs().max() > 1e-3
    for rank_loss, rank_gradient in run_ranks(len(sizes), step_of_a_rank, sizes):
        # fp64: rounding of sums in another order
        torch.testing.assert_close(rank_loss, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(rank_gradient, gradient, rtol=1e-12, atol=1e-14)
