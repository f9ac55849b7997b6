"""`eva02-at bench NAME`: ratios against the obvious alternative, one module a bench."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from lightning_modules.training.closing import close

# Imported only when run: each pulls in another part of the project.
BENCHES = {
    "kernels": "rotation, attention and encoder block against the field's formulation",
    "checkpoint": "a step's wait for a checkpoint, written in the background or not",
    "data": "reading and decoding clips",
    "eval": "mAP and nDCG against full sorts in numpy",
    "gpu": "all that only a GPU can show, in ten minutes (`make gpu`)",
    "loss": "retrieval losses against the (2*B*B, 1) formulation",
    "search": "growing, opening and asking an index of windows",
    "store": "waiting for remote shards, fetched ahead or when asked for",
    "step": "a training step against one written as AVION's users run it",
}


def main(argv: list[str]) -> int:
    """Run one bench.

    Args:
        argv: The bench's name, then its own options.

    Raises:
        ValueError: for an unknown name.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: eva02-at bench NAME [--json FILE] [options]\n")
        print("\n".join(f"  {name:<11}{text}" for name, text in BENCHES.items()))
        return 0 if argv else 2
    name, *rest = argv
    if name not in BENCHES:
        raise ValueError(f"unknown bench {name!r}; one of: {', '.join(BENCHES)}")
    run: Callable[[list[str]], int] = importlib.import_module(
        f"lightning_modules.bench.{name}"
    ).main
    code = run(rest)
    close(told="docs/performance.md has the figures of other machines")
    return code
