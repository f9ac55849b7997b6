"""How sure a search is: a hit's score against what sentences that mean nothing here reach.

A cosine has no scale of its own: each sentence has its own mean and spread over the windows of an
index, and the best of many windows is always well above the mean. So a score is first put in
standard deviations above its sentence's mean over the index (z), and z is then compared with the
best z that each sentence of a fixed bank reaches on the same index. A query whose best window
stands out no more than the bank's do has no answer here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

_THINGS = (
    "a cat", "the moon", "a trumpet", "the tax form", "a glacier", "two penguins", "an aeroplane",
    "the choir", "a volcano", "the referee", "a chess board", "an elephant",
)  # fmt: skip
_DEEDS = (
    "plays the piano", "crosses a desert", "is painted blue", "falls from the sky",
    "wins an election", "swims under ice", "lands at night", "is sold at an auction",
    "sings in the rain", "writes a letter", "burns in a field", "dances on a roof",
)  # fmt: skip
# Sentences of any kind; one that happens to be true of an index moves one rank among 144.
BANK = tuple(f"{thing} {deed}" for thing in _THINGS for deed in _DEEDS)


@dataclass
class Moments:
    """Count, sum and sum of squares of scores, block by block."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, scores: Tensor) -> None:
        """Take in a block."""
        scores = scores.double()
        self.count += len(scores)
        self.total += float(scores.sum())
        self.squares += float(scores.square().sum())

    def z(self, score: float) -> float:
        """A score in standard deviations above the mean; 0 where nothing spreads."""
        if self.count < 2:
            return 0.0
        mean = self.total / self.count
        variance = self.squares / self.count - mean * mean
        return (score - mean) / math.sqrt(variance) if variance > 1e-12 else 0.0


@dataclass
class Background:
    """How each of the bank's S sentences scores on N windows.

    Attributes:
        bank_count: (1,) int64, N.
        bank_sum: (S,) float64.
        bank_squares: (S,) float64.
        bank_max: (S,) float64.
    """

    bank_count: Tensor
    bank_sum: Tensor
    bank_squares: Tensor
    bank_max: Tensor
    FIELDS: ClassVar[tuple[str, ...]] = ("bank_count", "bank_sum", "bank_squares", "bank_max")

    @classmethod
    def of(cls, bank: Tensor, blocks: Iterable[Tensor]) -> Background:
        """Score the bank.

        Args:
            bank: (S, E) embeddings of `BANK`.
            blocks: (n, E) embeddings of windows.
        """
        found = cls(
            torch.zeros(1, dtype=torch.int64),
            torch.zeros(len(bank), dtype=torch.float64),
            torch.zeros(len(bank), dtype=torch.float64),
            torch.full((len(bank),), -torch.inf, dtype=torch.float64),
        )
        for block in blocks:
            if not len(block):
                continue
            scores = (bank @ block.T).double()
            found.bank_count += len(block)
            found.bank_sum += scores.sum(1)
            found.bank_squares += scores.square().sum(1)
            found.bank_max = torch.maximum(found.bank_max, scores.amax(1))
        return found

    @classmethod
    def joined(cls, parts: Sequence[Background]) -> Background | None:
        """The background of several sets of windows together; None for no window."""
        parts = [part for part in parts if int(part.bank_count)]
        if not parts:
            return None
        return cls(
            torch.stack([p.bank_count for p in parts]).sum(0),
            torch.stack([p.bank_sum for p in parts]).sum(0),
            torch.stack([p.bank_squares for p in parts]).sum(0),
            torch.stack([p.bank_max for p in parts]).amax(0),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def best_z(self) -> Tensor:
        """(S,) how far the best window of each sentence stands out, ascending."""
        mean = self.bank_sum / self.bank_count
        spread = (self.bank_squares / self.bank_count - mean.square()).clamp(min=1e-12).sqrt()
        return ((self.bank_max - mean) / spread).sort().values

    def surer_than(self, z: float) -> float:
        """Share of the bank's sentences whose best window stands out less than this."""
        best = self.best_z()
        return float((best < z).sum()) / len(best)
