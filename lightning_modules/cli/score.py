"""`eva02-at score`: EK-100 multi-instance retrieval of saved similarity matrices."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datamodules.files import write_atomically
from lightning_modules.cli.parser import CommandParser
from lightning_modules.evaluation.benchmarks.ek100_mir import (
    RetrievalAnnotations,
    scores_as_metrics,
)
from lightning_modules.evaluation.similarity import dual_softmax, ensemble
from lightning_modules.evaluation.submission import Levels, write_submission


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
        "sentence file; of several the (weighted) mean is scored",
    )
    parser.add_argument(
        "--weights", nargs="+", type=float, metavar="W", help="of several matrices; equal if absent"
    )
    parser.add_argument("--split", default="test", metavar="SPLIT", help="test (default) or train")
    parser.add_argument(
        "--dual-softmax",
        type=float,
        metavar="SCALE",
        help="score the dual softmax of the matrix times SCALE (not plain retrieval any more)",
    )
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
        ValueError: An annotation file or a matrix is missing, malformed or of the wrong shape, or
            a similarity is NaN.
    """
    options = _parser().parse_args(argv)
    annotations = RetrievalAnnotations(options.annotations, options.split)
    expected = (len(annotations.clips), len(annotations.sentences))
    matrices = [read_similarity(path, expected) for path in options.similarity]
    similarity = ensemble(matrices, options.weights)
    scored = similarity
    if options.dual_softmax is not None:
        scored = dual_softmax(similarity, options.dual_softmax)
    result = scores_as_metrics(annotations.score(scored))
    if options.dual_softmax is not None:
        result["dual_softmax"] = options.dual_softmax
    if options.submission is not None:
        write_submission(
            options.submission,
            similarity,
            [clip.narration_id for clip in annotations.clips],
            [sentence.narration_id for sentence in annotations.sentences],
            Levels(options.sls_pt, options.sls_tl, options.sls_td),
        )
    text = json.dumps(result, indent=2)
    print(text)
    if options.json is not None:
        write_atomically(options.json, text + "\n")
    return 0


def read_similarity(path: Path, expected: tuple[int, int]) -> Tensor:
    """Read a .npy matrix without running code it may carry.

    Args:
        path: The file.
        expected: (clips, sentences) that it must have.

    Raises:
        ValueError: No such file, not a .npy file, or another shape or type than expected.
    """
    if not path.is_file():
        raise ValueError(f"similarity file {path} does not exist; give the path of an existing one")
    try:
        matrix = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"{path} is no plain .npy array ({error}); write it with numpy.save"
        ) from None
    if not isinstance(matrix, np.ndarray):
        raise ValueError(f"{path} is an archive of arrays (.npz); give a single .npy array")
    if matrix.shape != expected:
        raise ValueError(
            f"{path} has shape {matrix.shape}; it must be {expected}: {expected[0]} clips (rows) "
            f"and {expected[1]} sentences (columns)"
        )
    if matrix.dtype.kind != "f" or matrix.dtype.itemsize > 8:
        raise ValueError(
            f"{path} has dtype {matrix.dtype}; it must be float32 (or float16, float64)"
        )
    return torch.from_numpy(np.ascontiguousarray(matrix, matrix.dtype.newbyteorder("=")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
