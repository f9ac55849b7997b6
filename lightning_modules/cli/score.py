"""`eva02-at score`: EK-100 multi-instance retrieval of saved similarity matrices."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from lightning_modules.cli.parser import CommandParser, add_max_missing
from lightning_modules.training.closing import close


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "score",
        "mAP and nDCG of EK-100 multi-instance retrieval, as the benchmark defines them, in "
        "percent as JSON.",
    )
    parser.add_argument(
        "--annotations",
        required=True,
        metavar="DIR",
        type=Path,
        help="folder with EPIC_100_retrieval_SPLIT.csv and EPIC_100_retrieval_SPLIT_sentence.csv",
    )
    parser.add_argument(
        "--similarity",
        required=True,
        nargs="+",
        metavar="FILE.npy",
        type=Path,
        help="floating point matrix, rows in the order of the clip file, columns in that of the "
        "sentence file, NaN where a clip is missing; of several the (weighted) mean is scored",
    )
    add_max_missing(parser)
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="of several matrices; equal if absent"
    )
    parser.add_argument(
        "--tuned", type=Path, metavar="FILE.json", help="weights and scale that `tune` chose"
    )
    parser.add_argument("--split", default="test", metavar="SPLIT", help="test (default) or train")
    parser.add_argument(
        "--dual-softmax",
        type=float,
        metavar="SCALE",
        help="score the dual softmax of the matrix times SCALE (not plain retrieval any more)",
    )
    parser.add_argument(
        "--bank",
        nargs="+",
        metavar="FILE.npy",
        type=Path,
        default=[],
        help="of `evaluate --benchmark ek100_bank --prediction`, one a matrix: lower clips that "
        "are near every training sentence, by the scale that `tune --bank` chose",
    )
    parser.add_argument("--bank-scale", type=float, metavar="SCALE", help="of --bank")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the result to FILE")
    group = parser.add_argument_group("challenge submission")
    group.add_argument(
        "--submission",
        metavar="FILE.zip",
        type=Path,
        help="also write the matrix (cosines) as the EK-100 challenge takes it, validated",
    )
    for name in ("sls_pt", "sls_tl", "sls_td"):
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            default=-1,
            metavar="LEVEL",
            help="supervision level to declare; -1 (default): unknown",
        )
    return parser


def main(argv: list[str]) -> int:
    """Score a similarity matrix, or the mean of several.

    Args:
        argv: Words after `eva02-at score`.

    Raises:
        ValueError: An annotation file or a matrix is missing, malformed or of the wrong shape, a
            similarity is NaN, or too many clips are missing.
    """
    options = _parser().parse_args(argv)
    from datamodules.files import write_atomically
    from lightning_modules.evaluation.benchmarks.ek100_mir import RetrievalAnnotations
    from lightning_modules.evaluation.saved import score_saved
    from lightning_modules.evaluation.submission import Levels, write_submission
    from lightning_modules.evaluation.tuning import Tuned, without_zeros

    annotations = RetrievalAnnotations(options.annotations, options.split)
    tuned = None
    matrices, weights, scale = options.similarity, options.weights, options.dual_softmax
    bank, bank_scale = options.bank, options.bank_scale
    if options.tuned is not None:
        if weights is not None or scale is not None or bank_scale is not None:
            raise ValueError("--tuned holds weights and scale: give either it or those")
        tuned = Tuned.load(options.tuned)
        matrices, weights = without_zeros(matrices, tuned.weights)
        scale, bank_scale = tuned.dual_softmax, tuned.bank_scale
        if bank and bank_scale is not None:
            bank, _ = without_zeros(bank, tuned.weights)
        elif bank:
            raise ValueError(f"{options.tuned} found that no bank helps; leave --bank out")
    if bank_scale is not None and not bank:
        raise ValueError("a scale of a bank was chosen, and the bank is missing: give --bank")
    done = score_saved(
        matrices,
        annotations,
        weights=weights,
        scale=scale,
        bank=bank,
        bank_scale=bank_scale,
        max_missing=0.0 if options.submission else options.max_missing,
    )
    if options.submission is not None:
        levels = Levels(options.sls_pt, options.sls_tl, options.sls_td)
        write_submission(options.submission, done.similarity, *annotations.ids, levels)
    metrics = done.metrics if tuned is None else {**done.metrics, "tuned": asdict(tuned)}
    text = json.dumps(metrics, indent=2)
    print(text)
    if done.coverage.missing:
        print(done.coverage, file=sys.stderr)
    if options.json is not None:
        write_atomically(options.json, text + "\n")
    words = ("--annotations", options.annotations, "--split", options.split)
    matrix = ("--similarity", *options.similarity[:1])
    close("audit", *words, *matrix, wrote=(options.json, options.submission))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
