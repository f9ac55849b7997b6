"""`eva02-at bench eval`: mAP and nDCG against the protocol as the field writes it in numpy."""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from lightning_modules.bench.timing import Row, add_output_argument, compare, report
from lightning_modules.cli.parser import CommandParser
from lightning_modules.metrics.functional import ClassSets, class_sets, multi_instance_scores
from lightning_modules.metrics.functional.class_relevance import relevance_block
from lightning_modules.metrics.functional.multi_instance import score_direction

DIM = 256


def field_map(similarity: np.ndarray, relevance: np.ndarray) -> float:
    """MAP by full argsorts of whole matrices."""
    rows = np.arange(len(similarity))[:, None]
    ranked = relevance[rows, (-similarity).argsort()]
    cumulated = np.cumsum(ranked, axis=1)
    cumulated[ranked != 1] = 0
    precision = cumulated / (np.arange(ranked.shape[1]) + 1)
    return float(np.mean(precision.sum(1) / (ranked == 1).sum(1)))


def _field_dcg(similarity: np.ndarray, relevance: np.ndarray, counted: np.ndarray) -> np.ndarray:
    rows = np.arange(len(similarity))[:, None]
    order = np.argsort(similarity)[:, ::-1]
    divisors = np.repeat(np.log2(np.arange(similarity.shape[1]) + 2)[None], len(similarity), 0)
    return (relevance[rows, order] * counted / divisors).sum(1)


def field_ndcg(similarity: np.ndarray, relevance: np.ndarray) -> float:
    """NDCG by full argsorts of whole matrices; the ideal order by one more."""
    counted = (np.sort(relevance)[:, ::-1] > 0).astype(int)
    gain = _field_dcg(similarity, relevance, counted)
    return float(np.mean(gain / _field_dcg(relevance, relevance, counted)))


def field_scores(similarity: np.ndarray, relevance: np.ndarray) -> list[float]:
    """Both scores of both directions."""
    both = ((similarity, relevance), (similarity.T, relevance.T))
    return [score(*pair) for score in (field_map, field_ndcg) for pair in both]


def our_scores(similarity: torch.Tensor, relevance: torch.Tensor) -> list[float]:
    """Both scores of both directions."""
    scores = multi_instance_scores(similarity, relevance)
    return [scores.v2t.map, scores.t2v.map, scores.v2t.ndcg, scores.t2v.ndcg]


def random_classes(num_videos: int, num_texts: int) -> tuple[ClassSets, ClassSets]:
    """Classes whose relevance is about as dense as EK-100's; each video repeats some text's."""
    draw = np.random.default_rng(0)
    verbs = (draw.random((num_texts, 1)) ** 3 * 97).astype(np.int64)
    nouns = (draw.random((num_texts, 3)) ** 2 * 300).astype(np.int64)
    for width in (1, 2):  # a third of the texts each with one, two and three nouns
        nouns[width - 1 :: 3, width:] = -1
    own = np.arange(num_videos) % num_texts
    texts = torch.from_numpy(verbs), torch.from_numpy(nouns)
    videos = texts[0][own], texts[1][own]
    return class_sets((videos[0], texts[0]), (videos[1], texts[1]))


def _matrix_rows(options: argparse.Namespace) -> list[Row]:
    videos, texts = random_classes(options.videos, options.texts)
    relevance = relevance_block(videos, texts, slice(None))
    draw = torch.Generator().manual_seed(0)
    similarity = torch.randn(options.videos, options.texts, generator=draw)
    cases = {
        "numpy": partial(field_scores, similarity.numpy(), relevance.numpy()),
        "ours": partial(our_scores, similarity, relevance),
    }
    group = f"mAP + nDCG {options.videos} x {options.texts}"
    rows = compare(group, cases, rounds=options.rounds, memory=True)
    difference = np.abs(np.subtract(cases["numpy"](), cases["ours"]())).max()
    rows[1].notes["scores differ by"] = f"{difference:.0e}"
    rows[1].notes["relevant pairs"] = f"{(relevance > 0).double().mean():.1%}"
    return rows


def _embedding_row(options: argparse.Namespace) -> Row:
    """Score some queries against all items; another of either direction costs the same."""
    videos, texts = random_classes(options.items, options.items)
    draw = torch.Generator().manual_seed(0)
    video, text = (
        F.normalize(torch.randn(options.items, DIM, generator=draw), dim=1) for _ in range(2)
    )

    def some_queries() -> object:
        return score_direction(
            lambda rows: video[rows] @ text.T,
            lambda rows: relevance_block(videos, texts, rows),
            options.queries,
            options.items,
        )

    group = f"from embeddings, {options.queries} of {options.items} queries x {options.items}"
    (row,) = compare(group, {"ours": some_queries}, rounds=options.rounds, memory=True)
    both_directions_s = row.median_s * 2 * options.items / options.queries
    row.notes["both directions, extrapolated"] = f"{both_directions_s / 60:.1f} min"
    row.notes["one matrix"] = f"{options.items**2 * 4 / 2**30:.1f} GiB"
    return row


def main(argv: list[str]) -> int:
    """Time the metric in turns with plain numpy, and at a size that no matrix would fit.

    Args:
        argv: Words after `eva02-at bench eval`.
    """
    parser = CommandParser("bench eval", "mAP and nDCG against full sorts in numpy.")
    parser.add_argument("--videos", type=int, default=9668, help="default: EK-100's test set")
    parser.add_argument("--texts", type=int, default=3842, help="default: EK-100's test set")
    parser.add_argument(
        "--items", type=int, default=100_000, help="videos and texts of the large case (0: none)"
    )
    parser.add_argument("--queries", type=int, default=256, help="queries timed of the large case")
    parser.add_argument("--rounds", type=int, default=3, help="timed turns (default 3)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as many as cores)")
    add_output_argument(parser)
    options = parser.parse_args(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = _matrix_rows(options)
    if options.items:
        rows.append(_embedding_row(options))
    report(rows, options.json)
    return 0
