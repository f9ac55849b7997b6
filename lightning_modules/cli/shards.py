"""`eva02-at shards build | verify | info | browse`: annotations and videos to WebDataset shards."""

from __future__ import annotations

import importlib

from lightning_modules.cli.parser import CommandParser

# name -> (module with its work, imported when it is called; the functions; what it does)
COMMANDS = {
    "build": (
        ("shards_build", "add_build", "build"),
        "make shards from annotations and videos, or go on with it",
    ),
    "verify": (
        ("shards_look", "add_verify", "verify_shards"),
        "compare shards with their manifest; exit code 1 if they differ",
    ),
    "info": (("shards_look", "add_info", "info"), "counts, sizes, durations, classes"),
    "browse": (
        ("shards_look", "add_browse", "browse"),
        "a page to look at: samples, histograms, rejects",
    ),
}


def main(argv: list[str]) -> int:
    """Run one subcommand.

    Args:
        argv: Words after `eva02-at shards`.

    Returns:
        The exit code; 1 if `verify` found faults and was not told to repair.

    Raises:
        ValueError: For the user's mistakes.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: eva02-at shards COMMAND [options]\n")
        print("\n".join(f"  {name:<8}{text}" for name, (_, text) in COMMANDS.items()))
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        raise ValueError(f"unknown command `shards {name}`; one of: {', '.join(COMMANDS)}")
    (module_name, add_options, work), text = COMMANDS[name]
    module = importlib.import_module(f"lightning_modules.cli.{module_name}")
    parser = CommandParser(f"shards {name}", text)
    getattr(module, add_options)(parser)
    code: int = getattr(module, work)(parser.parse_args(rest))
    return code
