"""`eva02-at audit`: what an EK-100 retrieval figure is worth."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.cli.parser import CommandParser
from lightning_modules.training.closing import close

if TYPE_CHECKING:
    from lightning_modules.evaluation.audit import Audit

_FOUND = 1


def _parser() -> CommandParser:
    parser = CommandParser(
        "audit",
        "A blind oracle from the captions alone, signs that a model saw the captions of test "
        "clips, test clips that were trained on, and the figure by kinds of clips. Ends with 1 "
        "where something speaks against the figure.",
    )
    parser.add_argument(
        "--annotations", required=True, type=Path, metavar="DIR", help="as `score` reads them"
    )
    parser.add_argument("--split", default="test", help="(%(default)s)")
    parser.add_argument(
        "--similarity", type=Path, metavar="FILE.npy", help="of `evaluate --prediction`"
    )
    parser.add_argument(
        "--train-split",
        default="train",
        metavar="SPLIT",
        help="for duplicates and rare actions, if its files are in DIR (%(default)s)",
    )
    parser.add_argument("--shards", metavar="MANIFEST", help="of the split: compares stored bytes")
    parser.add_argument("--train-shards", metavar="MANIFEST", help="of training")
    parser.add_argument("--json", type=Path, metavar="FILE")
    return parser


def main(argv: list[str]) -> int:
    """Audit a matrix, or a benchmark's data alone.

    Args:
        argv: Words after `eva02-at audit`.

    Raises:
        ValueError: A file is missing or malformed, or only one of two manifests is given.
    """
    options = _parser().parse_args(argv)
    if (options.shards is None) != (options.train_shards is None):
        raise ValueError("--shards and --train-shards are compared: give both, or neither")
    from datamodules.files import write_atomically
    from datamodules.manifest import Manifest
    from lightning_modules.evaluation.audit import audit
    from lightning_modules.evaluation.benchmarks.ek100_mir import RetrievalAnnotations
    from lightning_modules.evaluation.saved import read_similarity

    annotations = RetrievalAnnotations(options.annotations, options.split)
    has_train = (options.annotations / f"EPIC_100_retrieval_{options.train_split}.csv").is_file()
    train = RetrievalAnnotations(options.annotations, options.train_split) if has_train else None
    shape = (len(annotations.clips), len(annotations.sentences))
    matrix = read_similarity(options.similarity, shape) if options.similarity else None
    manifests = None
    if options.shards is not None:
        manifests = Manifest.load(options.train_shards), Manifest.load(options.shards)
    found = audit(annotations, matrix, train, manifests)
    _print(found)
    if train is None:
        print(f"no training files in {options.annotations}: duplicates were not looked for")
    if options.json is not None:
        content: dict[str, Any] = {**dataclasses.asdict(found), "warnings": found.warnings}
        write_atomically(options.json, json.dumps(content, indent=1) + "\n")
    words = ("--annotations", options.annotations, "--similarity", options.similarity or "FILE.npy")
    close("score", *words, "--submission", "FILE.zip", wrote=(options.json,))
    return _FOUND if found.warnings else 0


def _print(found: Audit) -> None:
    for title, figures in (("blind oracle", found.oracle), ("this matrix", found.figures)):
        if figures is not None:
            both = [f"{name} {figures[name]['avg']:.2f}" for name in ("map", "ndcg")]
            print(f"{title:<14}{', '.join(both)}")
    if found.pairing is not None:
        signal = found.pairing
        print(
            f"{'pairing':<14}own caption first among those of equal classes: "
            f"{signal.own_first:.1%} of {signal.num_clips:,} clips, by chance {signal.chance:.1%} "
            f"(at most {signal.chance_high:.1%})"
        )
    for kind, groups in found.kinds.items():
        print(f"\n{kind:<28}{'clips':>7}   V-T mAP              nDCG")
        for group, row in groups.items():
            print(
                f"  {group:<26}{row['num_clips']:>7,}   {_shown(row, 'map')}  {_shown(row, 'ndcg')}"
            )
    if found.duplicates is not None:
        for example in found.duplicates.examples:
            print(f"in training: {example}")
    print()
    print("\n".join(f"WARNING: {text}" for text in found.warnings) or "nothing speaks against it")


def _shown(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:5.1f} [{low:5.1f}, {high:5.1f}]"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
