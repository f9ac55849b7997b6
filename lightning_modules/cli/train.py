"""`eva02-at fit | validate | test | predict`: any recipe."""

from __future__ import annotations

import argparse
import os
import sys

from lightning_modules.cli.recipe_help import short_help, topic_help
from lightning_modules.cli.startup import importing


def main(argv: list[str]) -> int:
    """Run one of Lightning's verbs on a recipe.

    Args:
        argv: The verb, then the recipe's words.

    Returns:
        The exit code.
    """
    verb, words = argv[0], argv[1:]
    if not words:
        raise ValueError(f"`eva02-at {verb}` needs a recipe: --config NAME; see `eva02-at recipes`")
    for word in words:
        if word in ("-h", "--help"):
            print(short_help(verb))
            return 0
        if word.startswith("--help.") and word != "--help.all":
            print(topic_help(word.removeprefix("--help.")))
            return 0
    words = ["--help" if word == "--help.all" else word for word in words]
    with importing():
        import torch

        from kernels import c_library

        if not torch.cuda.is_available():
            c_library.begin()
        from lightning_modules.training.messages import shorten
        from lightning_modules.training.recipe import build_cli
        from lightning_modules.training.run.launch import check_slurm, meet
        from lightning_modules.training.verbs import run_verb

    check_slurm()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        cli = build_cli(words)
    except SystemExit as stop:  # --help and --print_config end the parser this way
        return int(stop.code or 0)
    except argparse.ArgumentError as error:
        raise ValueError(shorten(str(error))) from error
    meet()
    return run_verb(verb, cli)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
