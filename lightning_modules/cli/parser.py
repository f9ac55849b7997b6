"""The argument parser of the commands that are not recipes."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


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
