"""What is not in a set of shards: listed in a file, and too much of it ends the build."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datamodules.files import write_atomically

REJECTS_NAME = "rejects.jsonl"
MAX_REJECTS = 0.1  # what the command line allows


def write_rejects(folder: Path, rejects: Iterable[Mapping[str, Any]]) -> None:
    """Write one line a reject: `clip_id`, `video_id`, `reason`, and `row` where it is one."""
    write_atomically(folder / REJECTS_NAME, "".join(json.dumps(r) + "\n" for r in rejects))


def first_word(reason: str) -> str:
    """The kind of a reason: what stands before its colon."""
    return reason.partition(":")[0]


def check_rejects(
    rejects: Sequence[Mapping[str, Any]],
    total: int,
    max_rejects: float,
    hints: Sequence[str] = (),
) -> None:
    """Refuse to go on where more is rejected than the user allows.

    Args:
        rejects: What is not there.
        total: Clips, rows or samples that were looked at.
        max_rejects: Greatest share of them.
        hints: What else to tell, such as paths that were looked for.

    Raises:
        ValueError: It is more; counts the kinds of reasons and names the first rejects.
    """
    if not 0 <= max_rejects <= 1:
        raise ValueError(f"max_rejects is {max_rejects}; it is a share, from 0 to 1")
    if len(rejects) <= max_rejects * total:
        return
    kinds = Counter(first_word(reject["reason"]) for reject in rejects).most_common(4)
    raise ValueError(
        f"{len(rejects)} of {total} clips ({len(rejects) / total:.1%}) are rejected, more than "
        f"--max-rejects {max_rejects:g} allows: {', '.join(f'{n} {kind}' for kind, n in kinds)}; "
        f"the first: {rejects[0]['clip_id']}: {rejects[0]['reason']:.300}. "
        f"{' '.join([*hints, 'Check'])} the folder, the layout and the annotations, or allow more"
    )
