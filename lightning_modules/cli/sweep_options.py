"""The options of `eva02-at sweep`."""

from __future__ import annotations

import argparse
from pathlib import Path

from lightning_modules.cli.model_options import add_model_options
from lightning_modules.cli.parser import CommandParser


def sweep_parser() -> argparse.ArgumentParser:
    """Parser of the words after `eva02-at sweep`."""
    parser = CommandParser(
        "sweep",
        "Evaluate checkpoints on benchmarks. What has a result already is not run again; a cell "
        "that fails leaves the others alone and is named in the table. "
        "`eva02-at sweep table DIR` writes the table of what is there.",
    )
    parser.add_argument(
        "--checkpoints",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files, checkpoints' folders, runs (every complete checkpoint of one), or globs",
    )
    parser.add_argument(
        "--benchmark",
        action="append",
        required=True,
        dest="benchmarks",
        metavar="'NAME OPTIONS'",
        help="a benchmark of `eva02-at evaluate` with its options; may be repeated",
    )
    parser.add_argument(
        "--options",
        action="append",
        default=[],
        metavar="'OPTIONS'",
        help="--options='--flip': add to every benchmark; each set is a column of its own",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="the sweep's files"
    )
    parser.add_argument("--jobs", type=int, default=1, help="cells at a time, here (%(default)s)")
    parser.add_argument(
        "--retry-failed",
        action="store_true",
        help="run failed cells again (killed ones always are)",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="how often cells whose processes or jobs were killed are tried (%(default)s)",
    )
    _add_slurm_options(parser)
    _add_watch_options(parser)
    add_model_options(parser)
    return parser


def _add_slurm_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("on a SLURM cluster")
    group.add_argument("--slurm", action="store_true", help="submit job arrays instead")
    group.add_argument(
        "--sbatch",
        default="",
        metavar="'WORDS'",
        help="for sbatch: '--partition=gpu --gpus=1 --time=02:00:00'",
    )
    group.add_argument("--throttle", type=int, default=16, help="most cells at once (%(default)s)")


def _add_watch_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("beside a training run")
    group.add_argument(
        "--watch", action="store_true", help="go on: evaluate checkpoints as training writes them"
    )
    group.add_argument(
        "--every-s", type=float, default=60.0, help="seconds between two looks (%(default)s)"
    )
    group.add_argument(
        "--until-step", type=int, metavar="N", help="end when a checkpoint of step N is evaluated"
    )
