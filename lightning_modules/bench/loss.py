"""`eva02-at bench loss`: retrieval and contrastive losses against the field's formulations."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.bench.timing import Row, add_output_argument, compare, report
from lightning_modules.cli.parser import CommandParser
from lightning_modules.losses import (
    AdaptiveMaxMarginLoss,
    EgoNCELoss,
    InfoNCELoss,
    MaxMarginLoss,
    SymmetricMultiSimilarityLoss,
)

PairLoss = Callable[..., Tensor]


def _off_diagonal_pairs(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """(2*B*(B-1), 1) vectors of the partner's and of the others' entries, both directions.

    As the field writes max-margin losses: the diagonal is expanded to every pair, both directions
    are concatenated, and the diagonal's own pairs are dropped by index.
    """
    size = len(matrix)
    partner = matrix.diagonal().unsqueeze(1).expand(size, size).contiguous().view(-1, 1)
    partner = torch.cat([partner, partner], 0)
    others = torch.cat([matrix.reshape(-1, 1), matrix.T.reshape(-1, 1)], 0)
    keep = (torch.ones(size, size) - torch.eye(size)).view(-1, 1)
    kept = torch.cat([keep, keep], 0).flatten().nonzero().flatten()
    return partner.index_select(0, kept), others.index_select(0, kept)


def field_sms(video: Tensor, text: Tensor, relevance: Tensor) -> Tensor:
    """Eq. 16 on (2*B*B, 1) vectors."""
    partner, others = _off_diagonal_pairs(video @ text.T)
    partner_relevance, other_relevance = _off_diagonal_pairs(relevance)
    difference = partner_relevance - other_relevance
    penalty = torch.where(
        difference >= 0.1,
        F.relu(difference * 0.6 - (partner - others)),
        torch.where(
            difference <= -0.1,
            F.relu(-difference * 0.6 + (partner - others)),
            F.relu((partner - others).abs() - 0.1),
        ),
    )
    return penalty.mean()


def field_max_margin(video: Tensor, text: Tensor, relevance: Tensor) -> Tensor:
    """MI-MM on (2*B*B, 1) vectors."""
    partner, others = _off_diagonal_pairs(video @ text.T)
    return F.relu(0.2 - (partner - others)).mean()


def field_adaptive_max_margin(video: Tensor, text: Tensor, relevance: Tensor) -> Tensor:
    """Adaptive MI-MM on (2*B*B, 1) vectors."""
    partner, others = _off_diagonal_pairs(video @ text.T)
    partner_relevance, _ = _off_diagonal_pairs(relevance)
    return F.relu(partner_relevance * 0.4 - (partner - others)).mean()


def field_info_nce(video: Tensor, text: Tensor) -> Tensor:
    """Cross entropy over the rows and the columns of the whole matrix."""
    logits = video @ text.T / 0.05
    partners = torch.arange(len(logits))
    return (F.cross_entropy(logits, partners) + F.cross_entropy(logits.T, partners)) / 2


def field_ego_nce(video: Tensor, text: Tensor, verbs: Tensor, nouns: Tensor) -> Tensor:
    """Softmax of the whole matrix, masked sums of positives, both directions."""
    positive = torch.eye(len(verbs))
    positive = positive + (_multi_hot(verbs) @ _multi_hot(verbs).T) * (
        _multi_hot(nouns) @ _multi_hot(nouns).T
    )
    logits = video @ text.T / 0.05
    probabilities = (logits.softmax(1), logits.T.softmax(1))
    losses = [-(p * (positive > 0)).sum(1).log().mean() for p in probabilities]
    return (losses[0] + losses[1]) / 2


def _multi_hot(ids: Tensor) -> Tensor:
    return F.one_hot(ids + 1).sum(1)[:, 1:].float()


def losses() -> dict[str, tuple[PairLoss, PairLoss]]:
    """Name -> (the field's formulation, ours) at the paper's settings."""
    return {
        "SMS": (field_sms, SymmetricMultiSimilarityLoss()),
        "MI-MM": (field_max_margin, MaxMarginLoss()),
        "adaptive MI-MM": (field_adaptive_max_margin, AdaptiveMaxMarginLoss()),
        "InfoNCE": (field_info_nce, InfoNCELoss()),
        "EgoNCE": (field_ego_nce, EgoNCELoss()),
    }


def inputs(batch: int, dim: int) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, ...]]]:
    """Random unit embeddings, and what each family of losses takes besides them."""
    draw = torch.Generator().manual_seed(0)
    video, text = (
        F.normalize(torch.randn(batch, dim, generator=draw), dim=1).requires_grad_()
        for _ in range(2)
    )
    verbs = torch.randint(118, (batch, 1), generator=draw)
    nouns = torch.randint(582, (batch, 2), generator=draw)
    # as many distinct values as EK-100's relevance has, a tenth of them positive
    relevance = torch.randint(1, 19, (batch, batch), generator=draw, dtype=torch.uint8).float()
    relevance = relevance.div_(18).mul_(torch.rand(batch, batch, generator=draw) < 0.1)
    relevance.fill_diagonal_(1)
    rest: dict[str, tuple[Tensor, ...]] = {"InfoNCE": (), "EgoNCE": (verbs, nouns)}
    return video, text, {name: rest.get(name, (relevance,)) for name in losses()}


def _step(loss: PairLoss, video: Tensor, text: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
    """Forward and backward; returns the loss."""
    video.grad = text.grad = None
    value = loss(video, text, *rest)
    value.backward()
    return value.detach()


def _difference(field: PairLoss, ours: PairLoss, video: Tensor, *rest: object) -> float:
    """Largest difference of the video gradients over the largest gradient."""
    gradients = []
    for loss in (field, ours):
        _step(loss, video, *rest)  # type: ignore[arg-type]
        assert video.grad is not None
        gradients.append(video.grad)
    return ((gradients[0] - gradients[1]).abs().max() / gradients[0].abs().max()).item()


def _rows(options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    chosen = {name: pair for name, pair in losses().items() if options.only in (None, name)}
    video, text, rest = inputs(options.batch, options.dim)
    for name, (field, ours) in chosen.items():
        cases = {
            "field": partial(_step, field, video, text, rest[name]),
            "ours": partial(_step, ours, video, text, rest[name]),
        }
        group = f"{name} B={options.batch}"
        pair = compare(group, cases, rounds=options.rounds, memory=True)
        difference = _difference(field, ours, video, text, rest[name])
        pair[1].notes["gradients differ by"] = f"{difference:.0e}"
        rows += pair
    if options.large:
        video, text, rest = inputs(options.large, options.dim)
        for name, (_, ours) in chosen.items():
            case = {"ours": partial(_step, ours, video, text, rest[name])}
            group = f"{name} B={options.large}"
            (row,) = compare(group, case, rounds=1, warmup=0, memory=True)
            row.notes["one (B, B) matrix"] = f"{options.large**2 * 4 / 2**20:.0f} MiB"
            rows.append(row)
    return rows


def main(argv: list[str]) -> int:
    """Time forward and backward of each loss in turns with the field's formulation.

    Args:
        argv: Words after `eva02-at bench loss`.
    """
    parser = CommandParser("bench loss", "Losses, forward + backward, against the field's forms.")
    parser.add_argument("--batch", type=int, default=4096, help="global batch (default 4096)")
    parser.add_argument("--dim", type=int, default=256, help="embedding dimension (default 256)")
    parser.add_argument(
        "--large",
        type=int,
        default=16384,
        help="also run ours alone at this batch, where the field's form would not fit (0: no)",
    )
    parser.add_argument("--only", choices=list(losses()), help="one loss only")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    add_output_argument(parser)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    report(_rows(options), options.json)
    return 0
