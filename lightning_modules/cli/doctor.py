"""`eva02-at doctor`: would a training job run on this machine or allocation, and run fast."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from datamodules.files import write_atomically
from lightning_modules.cli.parser import CommandParser
from lightning_modules.training.closing import close


def main(argv: list[str]) -> int:
    """Examine the machine, or with `srun` or `torchrun` in front every node of the allocation.

    Args:
        argv: Words after `eva02-at doctor`.

    Returns:
        0; 1 where a training job would fail or crawl (the screen has the mend).

    Raises:
        ValueError: The folder does not exist.
    """
    parser = CommandParser("doctor", __doc__.split(": ")[1])
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="where a run would write: its disk is timed"
    )
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="whose training step is timed (B/16; on a CPU the demo's)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="seconds: no decoding, no step, no kernels' numbers"
    )
    parser.add_argument("--json", type=Path, help="write it all; `eva02-at plan --doctor` reads it")
    args = parser.parse_args(argv)
    from lightning_modules.doctor.examine import examine
    from lightning_modules.doctor.finding import as_json, screen, verdict
    from lightning_modules.models import PRESETS

    if args.preset is not None and args.preset not in PRESETS:
        raise ValueError(f"--preset {args.preset}: one of {', '.join(PRESETS)}")
    if not args.folder.is_dir():
        raise ValueError(
            f"--folder {args.folder} is no directory; name one where a run would write"
        )
    logging.getLogger("kernels").setLevel(logging.ERROR)  # the screen says it
    result = examine(args.folder, args.preset, args.quick)
    if result is None:
        return 0  # rank 0 speaks
    title, findings, cluster = result
    print(screen(title, findings))
    if args.json:
        content = as_json(findings, cluster)
        write_atomically(args.json, json.dumps(content, indent=2) + "\n")
    told = "" if args.json else "FILE.json: of --json"
    words = ("--config", "RECIPE", "--doctor", args.json or "FILE.json")
    close("plan", *words, wrote=(args.json,), told=told)
    return verdict(findings)
