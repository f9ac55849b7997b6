"""Learning-rate schedules as pure functions of the optimiser step."""

from __future__ import annotations

import math
from collections.abc import Callable


def learning_rate_factor(
    *,
    schedule: str,
    total_steps: int,
    warmup_steps: int,
    start_factor: float,
    end_factor: float,
) -> Callable[[int], float]:
    """Return the factor on the peak learning rate as a function of the optimiser step.

    Linear from `start_factor` at step 0 to 1 at `warmup_steps`; then 1 for `constant`, or half a
    cosine down to `end_factor` at step `total_steps` for `cosine`. Beyond `total_steps` the last
    value holds.

    Args:
        schedule: `constant` or `cosine`.
        total_steps: Optimiser steps of the whole run; unused by `constant`.
        warmup_steps: Steps of the linear rise; 0 for none.
        start_factor: Factor at step 0.
        end_factor: Factor at the end of the cosine.

    Raises:
        ValueError: The warm-up fills the whole run of a cosine, or the schedule is unknown.
    """
    if schedule not in ("constant", "cosine"):
        raise ValueError(f"unknown schedule {schedule!r}; one of: constant, cosine")
    if schedule == "cosine" and warmup_steps >= total_steps:
        raise ValueError(
            f"the warm-up takes {warmup_steps} of {total_steps} optimiser steps; a cosine needs "
            "at least one step after it: shorten the warm-up or train for longer"
        )

    def factor(step: int) -> float:
        if step < warmup_steps:
            return start_factor + (1.0 - start_factor) * step / warmup_steps
        if schedule == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return end_factor + (1.0 - end_factor) * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor
