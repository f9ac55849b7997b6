"""`eva02-at runs`: the runs below a folder, a line each."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from lightning_modules.cli.parser import CommandParser
from lightning_modules.training.closing import close


def main(argv: list[str]) -> int:
    """List runs.

    Args:
        argv: Words after `eva02-at runs`.

    Raises:
        ValueError: There is no run.
    """
    parser = CommandParser(
        "runs", "The runs below a folder: state, step, speed, best figure, owner."
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs"), help="(%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(argv)
    from lightning_modules.training.runs import as_table, find_runs, read_run

    runs = [read_run(folder) for folder in find_runs(options.folder)]
    if options.json:
        print(json.dumps([{**asdict(run), "path": str(run.path)} for run in runs], indent=1))
    else:
        print(as_table(runs, options.folder))
    stopped = next((run.path for run in runs if run.state == "stopped"), None)
    run_dir = stopped or runs[0].path
    verb, told = ("fit", "goes on") if stopped else ("test", "its newest checkpoint")
    close(verb, "--config", run_dir / "config.yaml", f"--run_dir={run_dir}", told=told)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
