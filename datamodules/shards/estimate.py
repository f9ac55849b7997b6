"""What a build will cost, before it is started."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass

from datamodules.shards.plan import BuildPlan
from datamodules.shards.rejects import first_word
from datamodules.video.pieces import RejectedClip


@dataclass(frozen=True)
class BuildEstimate:
    """The answer of a dry run.

    Attributes:
        num_clips: Clips whose source is there.
        num_rejected: Clips without a source or a span, by reason's first word.
        hours: Footage in the clips.
        num_bytes: Size of the shards, extrapolated from the trial clips.
        core_hours: Time of one core to make them, likewise.
        num_trials: Trial clips that could be made.
        looked_for: The first paths that are not there.
    """

    num_clips: int
    num_rejected: dict[str, int]
    hours: float
    num_bytes: int
    core_hours: float
    num_trials: int
    looked_for: tuple[str, ...] = ()

    def __str__(self) -> str:
        rejected = ", ".join(f"{n} {why}" for why, n in sorted(self.num_rejected.items()))
        missing = "".join(f"not there: {path}\n" for path in self.looked_for)
        return (
            f"{self.num_clips} clips, {self.hours:.2f} h; rejected: {rejected or 'none'}\n"
            f"{missing}about {self.num_bytes / 1e9:.3g} GB and {self.core_hours:.3g} core hours, "
            f"from {self.num_trials} clips made on trial; nothing was written"
        )


def estimate_build(plan: BuildPlan, num_trials: int = 16) -> BuildEstimate:
    """Look for every clip's source and make a few clips, evenly spread, without writing.

    Args:
        plan: What would be built.
        num_trials: Clips to make on trial.
    """
    survey = plan.survey()
    found = survey.found
    rejected = Counter(first_word(reject["reason"]) for reject in survey.rejects)
    total_s = sum(seconds for _, seconds in found)
    trial_s, num_bytes, trials = 0.0, 0, 0
    started = time.perf_counter()
    for record, seconds in found[:: max(1, -(-len(found) // num_trials))]:
        try:
            # a tar adds two headers, the json and padding, about 2 KiB
            num_bytes += len(plan.encode(record).data) + 2048
            trial_s += seconds
            trials += 1
        except RejectedClip:
            continue
    scale = total_s / trial_s if trial_s else 0.0
    took_s = time.perf_counter() - started
    return BuildEstimate(
        len(found),
        dict(rejected),
        total_s / 3600,
        int(num_bytes * scale),
        took_s * scale / 3600,
        trials,
        tuple(survey.looked_for),
    )
