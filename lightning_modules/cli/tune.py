"""`eva02-at tune`: weights and scales for test time, chosen on held-out training clips."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_modules.cli.parser import CommandParser
from lightning_modules.training.closing import close


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "tune",
        "Choose the weights of several models' similarities on training clips that were held out, "
        "for `score --tuned`. Never on the test.",
    )
    parser.add_argument(
        "--annotations", required=True, type=Path, metavar="DIR", help="as `score` reads them"
    )
    parser.add_argument(
        "--similarity",
        required=True,
        nargs="+",
        type=Path,
        metavar="FILE.npy",
        help="of `evaluate --split train --prediction`, one a model; clips that were not held out "
        "are rows of NaN",
    )
    parser.add_argument(
        "--rerank-scores",
        type=Path,
        metavar="FILE.npy",
        help="choose K and W of a second look instead: what `evaluate --rerank ... "
        "--rerank-scores` wrote, beside the dual encoder's own --similarity",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.json")
    parser.add_argument("--split", default="train", help="(%(default)s)")
    parser.add_argument(
        "--objective", default="mean", choices=("mean", "map", "ndcg"), help="(%(default)s)"
    )
    parser.add_argument(
        "--transductive",
        action="store_true",
        help="also try dual softmax, which looks at all queries at once; the result says so",
    )
    parser.add_argument(
        "--bank",
        action="store_true",
        help="also try the normalisation by a bank of training sentences (QB-Norm)",
    )
    return parser


def main(argv: list[str]) -> int:
    """Choose and write.

    Args:
        argv: Words after `eva02-at tune`.

    Raises:
        ValueError: A file is missing or malformed, or the split is the test's.
    """
    options = _parser().parse_args(argv)
    from lightning_modules.evaluation.benchmarks.ek100_mir import RetrievalAnnotations
    from lightning_modules.evaluation.tuning import tune

    if options.rerank_scores is not None:
        return _rerank(options)
    tuned = tune(
        options.similarity,
        RetrievalAnnotations(options.annotations, options.split),
        options.split,
        objective=options.objective,
        transductive=options.transductive,
        bank=options.bank,
    )
    tuned.save(options.output)
    for path, weight, before in zip(options.similarity, tuned.weights, tuned.before, strict=True):
        print(f"{before:7.2f}  weight {weight:<6g} {path}")
    print(f"{tuned.value:7.2f}  together, dual softmax: {tuned.dual_softmax or 'none'}")
    if options.bank:
        told = f"scale {tuned.bank_scale:g}" if tuned.bank_scale else "none helps"
        print(f"{tuned.bank_gain:+7.2f}  by a bank of sentences: {told}")
    print(f"{tuned.objective} on {tuned.num_clips:,} clips of {tuned.split}")
    matrices = ("--similarity", *(f"TEST{k}.npy" for k in range(1, len(options.similarity) + 1)))
    close(
        *("score", "--annotations", options.annotations, *matrices, "--tuned", options.output),
        wrote=(options.output,),
        told="the same models' matrices of the test, in the same order",
    )
    return 0


def _rerank(options: argparse.Namespace) -> int:
    from lightning_modules.evaluation.benchmarks.ek100_mir import RetrievalAnnotations
    from lightning_modules.evaluation.tuning_rerank import tune_rerank

    if len(options.similarity) > 1 or options.transductive or options.bank:
        raise ValueError(
            "--rerank-scores wants one --similarity and neither --transductive nor --bank"
        )
    tuned = tune_rerank(
        options.similarity[0],
        options.rerank_scores,
        RetrievalAnnotations(options.annotations, options.split),
        options.split,
        objective=options.objective,
    )
    tuned.save(options.output)
    print(f"{tuned.before:7.2f}  the dual encoder alone")
    print(f"{tuned.value:7.2f}  with a second look at the top {tuned.top}, blend {tuned.blend:g}")
    print(
        f"{tuned.objective} on {tuned.num_clips:,} clips of {tuned.split}, K among "
        f"{', '.join(map(str, tuned.tried))}"
    )
    chosen = ("--top", tuned.top, "--blend", f"{tuned.blend:g}")
    close("evaluate", *chosen, wrote=(options.output,), told="and the test's words, --rerank too")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
