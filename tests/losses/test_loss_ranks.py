"""Losses over real gloo processes under DDP: value and gradients equal those of one process."""

import importlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gloo_ranks import run_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_modules import collectives
from lightning_modules.losses import (
    AdaptiveMaxMarginLoss,
    ContrastiveMultiSimilarityLoss,
    EgoNCELoss,
    EgoNCEPlusPlusLoss,
    InfoNCELoss,
    MaxMarginLoss,
    SigLIPLoss,
    SymmetricMultiSimilarityLoss,
    gather,
    gather_ids,
    gather_no_gradient,
    gather_with_gradient,
)

LOSSES = {
    "info_nce": InfoNCELoss(0.05),
    "info_nce_scale": InfoNCELoss(None),
    "ego_nce": EgoNCELoss(),
    "ego_nce_plus_plus": EgoNCEPlusPlusLoss(),
    "max_margin": MaxMarginLoss(),
    "adaptive": AdaptiveMaxMarginLoss(),
    "sms": SymmetricMultiSimilarityLoss(),
    "sms_and_info_nce": ContrastiveMultiSimilarityLoss(weight=0.2),
    "sms_rows": SymmetricMultiSimilarityLoss(),
}


class Encoder(nn.Module):
    """A linear tower a modality and a log scale, in fp64, so that any difference is a fault."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.video, self.text = nn.Linear(4, 6).double(), nn.Linear(3, 6).double()
        self.logit_scale = nn.Parameter(torch.tensor([2.5]))

    def forward(self, clips, tokens):
        video, text = self.video(clips), self.text(tokens)
        return F.normalize(video, dim=1), F.normalize(text, dim=1), self.logit_scale.exp()


def global_batch(size: int):
    draw = torch.Generator().manual_seed(5)
    clips, tokens = (
        torch.randn(size, width, generator=draw, dtype=torch.float64) for width in (4, 3)
    )
    verbs = torch.randint(-1, 3, (size, 2), generator=draw)
    nouns = torch.randint(-1, 4, (size, 3), generator=draw)
    relevance = torch.rand(size, size, generator=draw, dtype=torch.float64)
    return clips, tokens, verbs, nouns, relevance


def step(name: str, model: nn.Module, rows: slice, size: int, even: bool = False):
    """One forward and backward of a rank's rows; returns the loss and all parameter gradients."""
    clips, tokens, verbs, nouns, relevance = global_batch(size)
    video, text, scale = model(clips[rows], tokens[rows])
    if name == "ego_nce":
        # the second rank's noun rows are narrower, as padding to its own widest row leaves them
        width = 3 if rows.start == 0 else 2
        nouns = torch.cat([nouns[:4], nouns[4:].clone()])
        nouns[4:, 2] = -1
        loss = LOSSES[name](video, text, verbs[rows], nouns[rows, :width], even=even)
    elif name == "ego_nce_plus_plus":
        # captions of other pairs serve as the false ones; not every pair has both
        draw = torch.Generator().manual_seed(6)
        false = torch.stack([tokens.roll(1, 0), tokens.roll(2, 0)], dim=1)
        negatives = model(clips[:0], false[rows].flatten(0, 1))[1].unflatten(0, (-1, 2))
        is_negative = torch.rand(size, 2, generator=draw) < 0.7
        loss = LOSSES[name](
            video, text, negatives, is_negative[rows], nouns[rows], scale, even=even
        )
    elif name.startswith("info"):
        loss = LOSSES[name](video, text, logit_scale=scale, even=even)
    else:
        soft = relevance[rows] if name == "sms_rows" else relevance
        loss = LOSSES[name](video, text, soft, even=even)
    (loss + 0 * scale.sum()).backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def all_losses_of_a_rank(rank: int, sizes: list[int], even: bool):
    start = sum(sizes[:rank])
    rows = slice(start, start + sizes[rank])
    found = {
        name: step(name, DistributedDataParallel(Encoder()), rows, sum(sizes), even)
        for name in LOSSES
    }
    return found | {"siglip": siglip_step(DistributedDataParallel(LearntLoss()), rows, even)}


class LearntLoss(nn.Module):
    """An encoder and a loss that learns, in one, so that both are averaged over ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.loss = Encoder(), SigLIPLoss(temperature=0.25, bias=-1.5).double()

    def forward(self, clips, tokens, even):
        video, text, scale = self.encoder(clips, tokens)
        return self.loss(video, text, even=even) + 0 * scale.sum()


def siglip_step(model: nn.Module, rows: slice, even: bool = False):
    clips, tokens, *_ = global_batch(8)
    loss = model(clips[rows], tokens[rows], even)
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]


def losses_by_the_old_names(rank: int, sizes: list[int], even: bool):
    """As torch 2.9 to 2.12 have them; 2.13 still does."""
    for name in ("all_gather_single", "reduce_scatter_single"):
        if hasattr(dist, name):
            delattr(dist, name)
    importlib.reload(collectives)
    gather.all_gather, gather.reduce_scatter = collectives.all_gather, collectives.reduce_scatter
    assert gather.all_gather is dist.all_gather_into_tensor
    assert gather.reduce_scatter is dist.reduce_scatter_tensor
    return all_losses_of_a_rank(rank, sizes, even)


@pytest.mark.distributed
def test_the_collectives_of_older_torch():
    new, old = (
        run_ranks(2, f, [3, 3], True) for f in (all_losses_of_a_rank, losses_by_the_old_names)
    )
    torch.testing.assert_close(old, new, rtol=0, atol=0)


@pytest.mark.distributed
@pytest.mark.parametrize(("sizes", "even"), [([4, 3], False), ([4, 0, 1], False), ([4, 4], True)])
def test_ranks_equal_one_process(sizes, even):
    ranks = run_ranks(len(sizes), all_losses_of_a_rank, sizes, even)
    total = sum(sizes)
    for name in [*LOSSES, "siglip"]:
        if name == "siglip":
            loss, gradients = siglip_step(LearntLoss(), slice(0, total))
            assert gradients[-1].abs() > 1e-3  # of the bias
        else:
            loss, gradients = step(name, Encoder(), slice(0, total), total)
        assert gradients[1].abs().max() > 1e-3, name  # of the video tower
        for rank_result in ranks:
            rank_loss, rank_gradients = rank_result[name]
            # fp64 throughout, the fp32 log scale apart: rounding of sums in another order
            torch.testing.assert_close(rank_loss, loss, rtol=1e-12, atol=0)
            for mine, reference in zip(rank_gradients, gradients, strict=True):
                tolerance = 1e-6 if reference.dtype == torch.float32 else 1e-12
                torch.testing.assert_close(mine, reference, rtol=tolerance, atol=1e-13)


ALONE = {
    "info_nce": InfoNCELoss(gather=False),
    "ego_nce": EgoNCELoss(gather=False),
    "sms": SymmetricMultiSimilarityLoss(gather=False),
}


def losses_of_own_rows(rank: int, sizes: list[int]):
    start = sum(sizes[:rank])
    own = slice(start, start + sizes[rank])
    clips, tokens, verbs, nouns, relevance = global_batch(sum(sizes))
    video, text, _ = Encoder()(clips[own], tokens[own])
    return {
        "info_nce": ALONE["info_nce"](video, text),
        "ego_nce": ALONE["ego_nce"](video, text, verbs[own], nouns[own]),
        "sms": ALONE["sms"](video, text, relevance[own, own]),
    }


@pytest.mark.distributed
def test_without_gathering_a_rank_is_alone():
    sizes = [4, 3]
    ranks = run_ranks(2, losses_of_own_rows, sizes)
    for rank, found in enumerate(ranks):
        alone = losses_of_own_rows(rank, sizes)
        assert {k: v.item() for k, v in found.items()} == pytest.approx(
            {k: v.item() for k, v in alone.items()}, rel=1e-12, abs=0
        )


def gathered_on_a_rank(rank: int):
    sizes = [2, 0, 3]
    rows = torch.full((sizes[rank], 2), float(rank + 1), requires_grad=True)
    gathered = gather_with_gradient(rows)
    # every rank weighs row b of the global batch by (b + 1) * (rank + 1)
    weights = torch.arange(1.0, 6)[:, None] * (rank + 1)
    (gathered * weights).sum().backward()
    ids = torch.full((sizes[rank], rank + 1), rank, dtype=torch.int64)
    both = gather_ids((ids, torch.full((sizes[rank], 2), 9, dtype=torch.int64)))()
    same = gather_ids((torch.full((2, 1), rank), ids.new_zeros(2, 3)), even=True, same_widths=True)
    return gathered.detach(), rows.grad, gather_no_gradient(ids), both, same()


@pytest.mark.distributed
def test_gathering_uneven_rows_keeps_order_and_sums_gradients():
    results = run_ranks(3, gathered_on_a_rank)
    for gathered, _, ids, both, same in results:
        assert torch.equal(both[0], ids) and both[1].tolist() == [[9, 9]] * 5
        assert same[0].flatten().tolist() == [0, 0, 1, 1, 2, 2] and same[1].shape == (6, 3)
        assert gathered[:, 0].tolist() == [1, 1, 3, 3, 3]
        assert ids.tolist() == [[0, -1, -1], [0, -1, -1], [2, 2, 2], [2, 2, 2], [2, 2, 2]]
    # 1 + 2 + 3 = 6 ranks' weights on each row
    assert [grad[:, 0].tolist() for _, grad, *_ in results] == [[6, 12], [], [18, 24, 30]]


def test_one_process_gathers_nothing():
    rows = torch.ones(2, 3)
    assert gather_with_gradient(rows) is rows
    assert gather_no_gradient(rows) is rows
    assert gather_ids((rows,))()[0] is rows
