"""The options of `eva02-at evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_modules.cli.model_options import add_model_options
from lightning_modules.cli.parser import CommandParser, add_max_missing

BENCHMARKS = (
    "ek100_mir",
    "ek100_cls",
    "ek100_bank",
    "egomcq",
    "egohoi",
    "charades_ego",
    "text_video",
)
DTYPES = ("float32", "bfloat16", "bf16-mixed")


def evaluate_parser() -> argparse.ArgumentParser:
    """Parser of the words after `eva02-at evaluate`."""
    parser = CommandParser(
        "evaluate",
        "Evaluate a checkpoint on a benchmark exactly as its protocol says; figures in percent.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--zoo", metavar="NAME", help="a public checkpoint of `eva02-at zoo`")
    which.add_argument(
        "--checkpoint",
        metavar="PATH",
        help="as `eva02-at convert` reads it; a run of recognition is for ek100_cls",
    )
    parser.add_argument("--benchmark", required=True, choices=BENCHMARKS)
    parser.add_argument(
        "--shards",
        required=True,
        metavar="MANIFEST",
        help="manifest of the benchmark's clips, or its folder: `eva02-at shards build` with the "
        "format ek100, egomcq, egohoi, charades_ego_test or csv",
    )
    parser.add_argument(
        "--allow-pipe", action="store_true", help="run the command if MANIFEST is pipe:COMMAND"
    )
    parser.add_argument(
        "--cache-dir",
        metavar="DIR",
        help="folder for copies of shards, if MANIFEST is a URL",
    )
    parser.add_argument(
        "--cache-gb", type=float, default=100.0, metavar="N", help="what it may hold (%(default)s)"
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="PATH",
        help="folder of EK-100's or Charades-Ego's CSVs, egomcq.json, EgoHOIBench's "
        "table or a vocabulary; none for text_video",
    )
    parser.add_argument("--split", help="part of the data; the benchmark's usual one if absent")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result, with each query's own value"
    )
    parser.add_argument(
        "--prediction", type=Path, metavar="FILE.npy", help="write the similarities or logits"
    )
    parser.add_argument(
        "--submission",
        type=Path,
        metavar="FILE.zip",
        help="ek100_mir: write the challenge's zip, validated",
    )
    add_max_missing(parser)
    _add_test_time_options(parser)
    _add_rerank_options(parser)
    _add_running_options(parser)
    add_model_options(parser)
    return parser


def _add_test_time_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("test time (each is named in the result)")
    group.add_argument("--flip", action="store_true", help="average with flipped clips")
    group.add_argument(
        "--views", type=int, default=1, metavar="K", help="average K interleaved clips of T frames"
    )
    group.add_argument(
        "--dual-softmax", type=float, metavar="SCALE", help="retrieval by dual softmax"
    )
    group.add_argument(
        "--template", default="{}", metavar="TEXT", help="set each prompt in here: '#C C {}'"
    )


def _add_rerank_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("a second look (docs/rerank.md)")
    group.add_argument(
        "--rerank",
        metavar="PATH",
        help="a run of a recipe of configs/rerank that was trained on this very checkpoint",
    )
    group.add_argument(
        "--top",
        type=int,
        metavar="K",
        help="candidates of each clip and of each text; 0 looks at none. Chosen by `tune`",
    )
    group.add_argument(
        "--blend",
        type=float,
        metavar="W",
        help="what a second look counts beside the cosine. Chosen by `tune`",
    )
    group.add_argument(
        "--rerank-scores",
        type=Path,
        metavar="FILE.npy",
        help="write the scores alone, 0 where nobody looked: for `tune`",
    )


def _add_running_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("running")
    group.add_argument("--batch-size", type=int, default=16, metavar="N")
    group.add_argument("--workers", type=int, default=2, metavar="N", help="decoders a process")
    group.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="processes on this node; under torchrun or srun give what they were told",
    )
    group.add_argument("--nodes", type=int, default=1, metavar="N")
    group.add_argument("--accelerator", default="auto", choices=["auto", "cpu", "cuda"])
    group.add_argument(
        "--dtype",
        default="float32",
        choices=DTYPES,
        help="of weights and sums, or bf16-mixed as recipes train (%(default)s)",
    )
    group.add_argument(
        "--max-fault-rate",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of damaged clips above which the evaluation ends (%(default)s)",
    )
