"""The argument parser of the commands that are not recipes."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from lightning_modules.evaluation.missing import MAX_MISSING


class CommandParser(argparse.ArgumentParser):
    """argparse with our manners: a mistake is one line, and no option may be abbreviated.

    Args:
        command: The word after `eva02-at`.
        description: What the command does.
        kwargs: As argparse's.
    """

    def __init__(self, command: str, description: str, **kwargs: Any) -> None:
        super().__init__(
            prog=f"eva02-at {command}",
            description=description,
            allow_abbrev=False,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        """Raise the user's mistake, which the dispatcher turns into one line and exit code 2."""
        raise ValueError(f"{message}. `{self.prog} --help` lists the options.")


def share_that_may_miss(text: str) -> float:
    """Parse the option --max-missing."""
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share from 0 to 1")
    return share


def add_max_missing(parser: argparse.ArgumentParser) -> None:
    """Add the option --max-missing."""
    parser.add_argument(
        "--max-missing",
        type=share_that_may_miss,
        default=MAX_MISSING,
        metavar="SHARE",
        help="share of the benchmark that may be missing, else it is an error (default "
        "%(default)s); a submission may miss nothing",
    )
