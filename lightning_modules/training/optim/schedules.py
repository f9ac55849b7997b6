"""Learning-rate schedules as pure functions of the optimiser step."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class LearningRateFactor:
    """The factor on the peak learning rate as a function of the optimiser step.

    Linear from `start_factor` at step 0 to 1 at `warmup_steps`; then 1 for `constant`, or half a
    cosine down to `end_factor` at step `total_steps` for `cosine`. Beyond `total_steps` the last
    value holds. An object and not a closure: `LambdaLR` keeps its numbers in a checkpoint.

    Args:
        schedule: `constant` or `cosine`.
        total_steps: Optimiser steps of the whole run; unused by `constant`.
        warmup_steps: Steps of the linear rise; 0 for none.
        start_factor: Factor at step 0.
        end_factor: Factor at the end of the cosine.

    Raises:
        ValueError: The warm-up fills the whole run of a cosine, or the schedule is unknown.
    """

    schedule: str
    total_steps: int
    warmup_steps: int
    start_factor: float
    end_factor: float

    def __post_init__(self) -> None:
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"unknown schedule {self.schedule!r}; one of: constant, cosine")
        if self.schedule == "cosine" and self.warmup_steps >= self.total_steps:
            raise ValueError(
                f"the warm-up takes {self.warmup_steps} of {self.total_steps} optimiser steps; a "
                "cosine needs at least one step after it: shorten the warm-up or train for longer"
            )

    def __call__(self, step: int) -> float:
        """Return the factor at a step, counted from 0."""
        if step < self.warmup_steps:
            return self.start_factor + (1.0 - self.start_factor) * step / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / (self.total_steps - self.warmup_steps))
        return self.end_factor + (1.0 - self.end_factor) * 0.5 * (1.0 + math.cos(math.pi * done))
