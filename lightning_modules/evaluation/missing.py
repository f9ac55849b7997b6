"""How much of a benchmark may be missing, and how that is said: a part may not look like the whole.

Leaving clips out changes a figure in either direction (a fifth fewer videos to choose from makes
retrieval easier), so figures over a part are not comparable with anybody's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAX_MISSING = 0.01


class TooMuchMissing(ValueError):
    """More of a benchmark is missing than may be."""


@dataclass(frozen=True)
class Coverage:
    """How much of a benchmark could be measured.

    Attributes:
        missing: Units that could not.
        total: Units that the benchmark has.
        unit: What is counted: `clips`, or what falls with one of several clips.
    """

    missing: int
    total: int
    unit: str = "clips"

    @classmethod
    def of(cls, present: Tensor, unit: str = "clips") -> Coverage:
        """Count what an (n,) bool tensor says is there."""
        return cls(int((~present).sum()), len(present), unit)

    @property
    def share(self) -> float:
        """Share that is missing."""
        return self.missing / self.total

    def __str__(self) -> str:
        return f"{self.missing:,} of {self.total:,} {self.unit} missing ({self.share:.2%})"

    def check(self, limit: float, mend: str) -> None:
        """Refuse to measure too small a part.

        Args:
            limit: Greatest share that may be missing.
            mend: What to do about it.

        Raises:
            TooMuchMissing: More is missing.
        """
        if self.share > limit:
            raise TooMuchMissing(
                f"{self}, more than a share of {limit:g} (max_missing) allows: figures over a part "
                f"are not those of the whole. {mend}"
            )

    def headline(self, figures: str) -> str:
        """Figures with what they leave out, if anything."""
        return f"{figures} -- {self}" if self.missing else figures
