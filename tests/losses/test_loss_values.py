"""Each loss against the slow loop of its equation: values and gradients, odd sizes and blocks."""

import math

import pair_loops
import pytest
import torch
import torch.nn.functional as F

from datamodules.batch import pad_class_ids
from datamodules.relevance import relevance_matrix
from lightning_modules.losses import (
    AdaptiveMaxMarginLoss,
    ContrastiveMultiSimilarityLoss,
    EgoNCELoss,
    EgoNCEPlusPlusLoss,
    HardLabelMultiSimilarityLoss,
    InfoNCELoss,
    MaxMarginLoss,
    SigLIPLoss,
    SymmetricMultiSimilarityLoss,
    blockwise,
)
from lightning_modules.losses.contrastive import _sharing, compared_sharing
from lightning_modules.losses.gather import GlobalBatch
from lightning_modules.losses.margin import _own_rows


def pairs(batch: int, dim: int = 5, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    video, text = (
        F.normalize(torch.randn(batch, dim, generator=generator, dtype=dtype), dim=1)
        for _ in range(2)
    )
    # similar partners, so that no hinge is active or inactive everywhere
    return video.requires_grad_(), F.normalize(text + 0.5 * video.detach(), dim=1).requires_grad_()


def soft_relevance(batch: int, seed: int = 1) -> torch.Tensor:
    """Asymmetric, with values below, inside and above the band, not 1 on the diagonal."""
    values = torch.tensor([0.0, 1 / 6, 0.25, 0.5, 0.55, 2 / 3, 0.75, 1.0], dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    return values[torch.randint(len(values), (batch, batch), generator=draw)]


def class_sets(batch: int, seed: int = 2):
    draw = torch.Generator().manual_seed(seed)
    verbs = [set(torch.randint(4, (1 + i % 2,), generator=draw).tolist()) for i in range(batch)]
    nouns = [set(torch.randint(6, (i % 4,), generator=draw).tolist()) for i in range(batch)]
    return verbs, nouns


def assert_same(fast, slow, inputs, rtol=1e-12):
    """Same value and same gradients; fp64, so the tolerance is rounding of a few thousand terms."""
    torch.testing.assert_close(fast, slow, rtol=rtol, atol=1e-14)
    fast_gradients = torch.autograd.grad(fast, inputs, retain_graph=True)
    for mine, reference in zip(fast_gradients, torch.autograd.grad(slow, inputs), strict=True):
        assert reference.abs().max() > 1e-4
        torch.testing.assert_close(mine, reference, rtol=rtol, atol=1e-14)


MARGIN_CASES = [
    (MaxMarginLoss(), pair_loops.max_margin, {}),
    (MaxMarginLoss(margin=0.5), pair_loops.max_margin, {"margin": 0.5}),
    (AdaptiveMaxMarginLoss(), pair_loops.adaptive_max_margin, {}),
    (SymmetricMultiSimilarityLoss(), pair_loops.sms, {}),
    (SymmetricMultiSimilarityLoss(relaxation=0.0), pair_loops.sms, {"relaxation": 0.0}),
    (
        SymmetricMultiSimilarityLoss(margin=0.3, relaxation=0.05, threshold=1.1 / 240),
        pair_loops.sms,
        {"margin": 0.3, "relaxation": 0.05, "threshold": 1.1 / 240},
    ),
    (ContrastiveMultiSimilarityLoss(weight=0.3, temperature=0.2), pair_loops.sms_and_info_nce, {}),
]


@pytest.mark.parametrize("block_elements", [1, 40, 2**20])
@pytest.mark.parametrize("batch", [3, 7, 13])
@pytest.mark.parametrize(("loss", "loop", "options"), MARGIN_CASES)
def test_margin_losses_follow_their_equations(
    loss, loop, options, batch, block_elements, monkeypatch
):
    monkeypatch.setitem(blockwise._BLOCK_ELEMENTS, "cpu", block_elements)
    video, text = pairs(batch)
    relevance = soft_relevance(batch)
    slow = loop(video, text, relevance, **options)
    assert_same(loss(video, text, relevance), slow, (video, text))


@pytest.mark.parametrize("negative", [0.0, 1.0])
def test_hard_labels_follow_eq_17(negative):
    video, text = pairs(9)
    relevance = (soft_relevance(9) > 0.5).double().fill_diagonal_(1)
    slow = pair_loops.hard_label_sms(video, text, relevance)
    assert_same(HardLabelMultiSimilarityLoss()(video, text, relevance), slow, (video, text))


@pytest.mark.parametrize("sign", [1, -1])
def test_the_band_is_open_at_its_ends(sign):
    """A difference of exactly the threshold belongs to the cases outside: 1/4 is exact."""
    loss = SymmetricMultiSimilarityLoss(margin=0.5, relaxation=0.1, threshold=0.25)
    gap, own, other = torch.tensor([[0.0]]), torch.tensor([[0.5]]), torch.tensor([[0.5 - sign / 4]])
    expected = 0.25 * 0.5  # relu(+-R * margin -+ gap); within the band it would be 0
    assert loss.penalty(gap, own, other).item() == expected
    assert loss.penalty(gap, own, other + sign / 64).item() == 0


@pytest.mark.parametrize(
    "kind",
    [
        InfoNCELoss,
        EgoNCELoss,
        MaxMarginLoss,
        AdaptiveMaxMarginLoss,
        SymmetricMultiSimilarityLoss,
        HardLabelMultiSimilarityLoss,
        SigLIPLoss,
        EgoNCEPlusPlusLoss,
    ],
)
def test_losses_look_over_all_ranks_unless_told_not_to(kind):
    assert kind().gather is True and kind(gather=False).gather is False


@pytest.mark.parametrize(
    ("loss", "values"),
    [
        (InfoNCELoss(), {"temperature": 0.05}),
        (EgoNCELoss(), {"temperature": 0.05}),
        (EgoNCEPlusPlusLoss(), {"temperature": 0.05}),
        (MaxMarginLoss(), {"margin": 0.2}),
        (AdaptiveMaxMarginLoss(), {"margin": 0.4}),
        (SymmetricMultiSimilarityLoss(), {"margin": 0.6, "relaxation": 0.1, "threshold": 0.1}),
        (HardLabelMultiSimilarityLoss(), {"margin": 0.3, "relaxation": 0.1, "threshold": 0.5}),
    ],
)
def test_defaults_are_the_papers(loss, values):
    assert {name: getattr(loss, name) for name in values} == values


def test_a_rank_takes_its_own_rows_of_a_whole_relevance():
    whole, batch = torch.arange(36.0).view(6, 6), GlobalBatch([2, 3, 1], rank=1)
    assert torch.equal(_own_rows(whole, 3, batch), whole[2:5])
    assert torch.equal(_own_rows(whole[2:5], 3, batch), whole[2:5])
    with pytest.raises(ValueError, match=r"= \(3, 6\) or \(B_global, B_global\) = \(6, 6\)"):
        _own_rows(whole[:, :3], 3, batch)


def test_hard_labels_accept_the_soft_labels_of_clips_without_nouns():
    labels, no_nouns = pad_class_ids([[3, 5], [5], [8]]), pad_class_ids([[], [], []])
    text_labels = pad_class_ids([[3], [5], [8]])
    soft = relevance_matrix(labels, no_nouns, text_labels, no_nouns).double()
    assert soft.tolist() == [[0.5, 0.5, 0], [0, 0.5, 0], [0, 0, 0.5]]
    video, text = pairs(3)
    slow = pair_loops.hard_label_sms(video, text, 2 * soft)
    assert_same(HardLabelMultiSimilarityLoss()(video, text, soft), slow, (video, text))


@pytest.mark.parametrize("block_elements", [1, 40, 2**20])
@pytest.mark.parametrize("batch", [1, 3, 7, 13])
def test_info_nce_follows_its_equation(batch, block_elements, monkeypatch):
    monkeypatch.setitem(blockwise._BLOCK_ELEMENTS, "cpu", block_elements)
    video, text = pairs(batch)
    fast, slow = InfoNCELoss(0.05)(video, text), pair_loops.info_nce(video, text, 0.05)
    if batch == 1:
        assert fast == slow == 0
    else:
        assert_same(fast, slow, (video, text))


@pytest.mark.parametrize("scale_shape", [(), (1,)])
def test_info_nce_with_a_learnable_scale(scale_shape):
    video, text = pairs(7)
    scale = torch.full(scale_shape, 14.3, dtype=torch.float64, requires_grad=True)
    slow = pair_loops.info_nce(video, text, 1 / scale.squeeze())
    fast = InfoNCELoss(temperature=None)(video, text, logit_scale=scale)
    # the scale enters in fp32, as models hold it: 1e-7 of it
    assert_same(fast, slow, (video, text, scale), rtol=1e-6)


@pytest.mark.parametrize("block_elements", [1, 40, 2**20])
@pytest.mark.parametrize("batch", [1, 3, 13])
def test_siglip_follows_its_equation(batch, block_elements, monkeypatch):
    monkeypatch.setitem(blockwise._BLOCK_ELEMENTS, "cpu", block_elements)
    video, text = pairs(batch)
    loss = SigLIPLoss(temperature=0.25, bias=-1.5).double()
    inputs = (video, text, loss.log_scale, loss.bias)
    slow = pair_loops.siglip(video, text, loss.log_scale, loss.bias)
    # the learnt scalars were rounded to fp32 before they became fp64 here: not a difference
    assert_same(loss(video, text), slow, inputs)


def test_siglip_starts_where_its_paper_does():
    loss = SigLIPLoss()
    assert loss.log_scale.item() == pytest.approx(math.log(10)) and loss.bias.item() == -10


def test_siglip_of_pairs_far_on_either_side_is_finite():
    """At t = 1000 a probability of e^-1000 is nothing in any float; its logarithm is -1000."""
    video = torch.eye(2)
    loss = SigLIPLoss(temperature=1e-3, bias=0.0)(video, -video)
    assert loss.item() == pytest.approx(1000 + math.log(2), rel=1e-6)  # and one zero a row


@pytest.mark.parametrize("block_elements", [1, 40, 2**20])
def test_ego_nce_follows_its_equation(block_elements, monkeypatch):
    monkeypatch.setitem(blockwise._BLOCK_ELEMENTS, "cpu", block_elements)
    video, text = pairs(13)
    verbs, nouns = class_sets(13)
    ids = (pad_class_ids([list(row) for row in rows]) for rows in (verbs, nouns))
    slow = pair_loops.ego_nce(video, text, verbs, nouns)
    assert abs(slow - pair_loops.info_nce(video, text)) > 1e-3  # there are further positives
    assert_same(EgoNCELoss()(video, text, *ids), slow, (video, text))


@pytest.mark.parametrize("block_elements", [1, 40, 2**20])
@pytest.mark.parametrize("batch", [1, 3, 13])
def test_ego_nce_plus_plus_follows_its_equation(batch, block_elements, monkeypatch):
    monkeypatch.setitem(blockwise._BLOCK_ELEMENTS, "cpu", block_elements)
    video, text = pairs(batch)
    draw = torch.Generator().manual_seed(9)
    negatives = torch.randn(batch, 4, 5, generator=draw, dtype=torch.float64)
    negatives = F.normalize(negatives + 2 * text.detach()[:, None], dim=2).requires_grad_()
    # some captions have fewer, one has none
    is_negative = (torch.arange(4) < torch.arange(batch)[:, None] % 5) | (batch == 1)
    _, nouns = class_sets(batch)
    ids = pad_class_ids([list(row) for row in nouns])
    given = [row[mask] for row, mask in zip(negatives, is_negative, strict=True)]
    slow = pair_loops.ego_nce_plus_plus(video, text, given, nouns)
    fast = EgoNCEPlusPlusLoss()(video, text, negatives, is_negative, ids)
    assert_same(fast, slow, (video, text, negatives))
    on_negatives = torch.autograd.grad(fast, negatives)[0]
    assert not on_negatives[~is_negative].any() and on_negatives[is_negative].any()


def test_ego_nce_plus_plus_without_negatives_and_shared_nouns_is_twice_info_nce():
    video, text = pairs(7)
    none = torch.zeros(7, 1, dtype=torch.bool)
    loss = EgoNCEPlusPlusLoss()(video, text, text.detach()[:, None], none, torch.full((7, 1), -1))
    torch.testing.assert_close(loss, 2 * InfoNCELoss()(video, text))


def test_ego_nce_survives_positives_far_below_the_maximum():
    """At temperature 0.01 the partner's share is e^-200, which fp32 cannot hold."""
    video = torch.eye(3)
    text = torch.stack([-video[0], video[0], video[0]])
    none = torch.full((3, 1), -1)
    loss = EgoNCELoss(temperature=0.01)(video, text, none, none)
    exact = pair_loops.ego_nce(video.double(), text.double(), [set()] * 3, [set()] * 3, 0.01)
    torch.testing.assert_close(loss, exact.float())


@pytest.mark.parametrize("loss", [case[0] for case in MARGIN_CASES])
def test_one_pair_has_no_negatives(loss):
    video, text = pairs(1)
    value = loss(video, text, torch.ones(1, 1))
    value.backward()
    assert value == 0
    assert not video.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", [SymmetricMultiSimilarityLoss(), InfoNCELoss()])
def test_half_precision_embeddings_are_computed_in_fp32(loss, dtype):
    video, text = (x.detach().to(dtype).requires_grad_() for x in pairs(9))
    rest = (soft_relevance(9).float(),) if isinstance(loss, SymmetricMultiSimilarityLoss) else ()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(video, text, *rest)
    expected = loss(video.detach().float(), text.detach().float(), *rest)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    value.backward()
    assert video.grad.dtype == dtype


def test_values_without_gradients_are_the_same():
    video, text = pairs(9)
    relevance = soft_relevance(9)
    loss = SymmetricMultiSimilarityLoss()
    with torch.no_grad():
        quiet = loss(video, text, relevance)
    assert not quiet.requires_grad
    assert quiet == loss(video, text, relevance)


def test_a_frozen_tower_gets_no_gradient():
    video, text = pairs(5)
    loss = SymmetricMultiSimilarityLoss()(video, text.detach(), soft_relevance(5))
    loss.backward()
    assert video.grad.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v, t: InfoNCELoss(temperature=0.0), "must be positive"),
        (
            lambda v, t: EgoNCEPlusPlusLoss()(v, t, t[:4, None], torch.ones(5, 1), torch.ones(5)),
            r"negatives have shape \(4, 1, 5\) and is_negative \(5, 1\)",
        ),
        (lambda v, t: SigLIPLoss(temperature=-0.1), "temperature -0.1 given; it must be positive"),
        (lambda v, t: SigLIPLoss()(v[:3], t), r"video has shape \(3, 5\) and text \(5, 5\)"),
        (lambda v, t: InfoNCELoss(temperature=None)(v, t), "needs the model's logit_scale"),
        (lambda v, t: InfoNCELoss()(v, t[:4]), r"video has shape \(5, 5\) and text \(4, 5\)"),
        (lambda v, t: MaxMarginLoss()(v, t, torch.ones(5, 4)), r"relevance has shape \(5, 4\)"),
        (
            lambda v, t: EgoNCELoss()(v, t, torch.zeros(4, 1), torch.zeros(5, 1)),
            r"verb_classes has shape \(4, 1\)",
        ),
        (lambda v, t: SymmetricMultiSimilarityLoss(threshold=0.0), "threshold must be positive"),
        (lambda v, t: SymmetricMultiSimilarityLoss(relaxation=-0.1), "may not be negative"),
        (lambda v, t: ContrastiveMultiSimilarityLoss(weight=-1), "weight -1 of InfoNCE given"),
    ],
)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(*pairs(5))


def test_comparing_ids_finds_the_classes_that_the_table_finds():
    """EgoNCE's positives on a GPU, where the number of classes would have to be waited for."""
    ids = torch.randint(-1, 6, (30, 3), generator=torch.Generator().manual_seed(0))
    for rows in (slice(0, 30), slice(7, 9)):
        got, expected = compared_sharing(ids)(rows), _sharing(ids)(rows)
        assert expected.any() and not expected.all()
        assert torch.equal(got, expected)
