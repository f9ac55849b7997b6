"""Plain text-video retrieval: recall at k and median rank."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_modules.metrics.functional.ranking import rank_of, refuse_nan, row_blocks


def retrieval_ranks(queries: Tensor, items: Tensor, partner: Tensor) -> Tensor:
    """Rank of each query's partner among all items by dot product, in blocks of queries.

    Args:
        queries: (Q, E) embeddings.
        items: (n, E) embeddings.
        partner: (Q,) the item that belongs to each query, or (Q, P) several, padded with -1, of
            which the best placed counts.

    Returns:
        (Q,) int64 ranks, 1 is best; ties: the smaller item index first.

    Raises:
        ValueError: Shapes do not match, a partner is no item, a query has no partner, or an
            embedding is NaN.
    """
    partners = partner[:, None] if partner.ndim == 1 else partner
    if queries.shape[1:] != items.shape[1:] or len(partners) != len(queries):
        raise ValueError(
            f"queries {tuple(queries.shape)}, items {tuple(items.shape)} and partner "
            f"{tuple(partner.shape)} do not fit; they must be (Q, E), (n, E) and (Q,) or (Q, P)"
        )
    if partners.max() >= len(items) or (partners < 0).all(dim=1).any():
        raise ValueError(f"each query needs a partner among the {len(items)} items")
    ranks = []
    for rows in row_blocks(len(queries), len(items)):
        similarity = queries[rows] @ items.T
        belongs = similarity.new_zeros((len(similarity), len(items) + 1), dtype=torch.bool)
        belongs.scatter_(1, partners[rows] % (len(items) + 1), True)  # -1 is the column cut off
        ranks.append(best_ranks(similarity, belongs[:, :-1]))
    return torch.cat(ranks)


def best_ranks(similarity: Tensor, belongs: Tensor) -> Tensor:
    """Rank of the best placed of the items that belong to each query.

    Args:
        similarity: (Q, n).
        belongs: (Q, n) bool, at least one item a query.

    Returns:
        (Q,) int64 ranks, 1 is best; ties: the smaller item index first.

    Raises:
        ValueError: A similarity is NaN.
    """
    refuse_nan(similarity, "similarity")
    best = similarity.masked_fill(~belongs, -torch.inf).amax(dim=1, keepdim=True)
    first = ((similarity == best) & belongs).to(torch.uint8).argmax(dim=1)
    return rank_of(similarity, first)


def recall_summary(ranks: Tensor) -> dict[str, float]:
    """R@1, R@5 and R@10 as fractions, and the median rank MdR.

    Args:
        ranks: (Q,) 1-based ranks, at least one.

    Returns:
        `r1`, `r5`, `r10`, `mdr`; the median of an even number is the mean of the middle two.
    """
    result = {f"r{k}": (ranks <= k).double().mean().item() for k in (1, 5, 10)}
    result["mdr"] = ranks.double().quantile(0.5).item()
    return result
