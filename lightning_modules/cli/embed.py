"""`eva02-at embed`: features of one's own videos."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_modules.cli.model_options import add_model_options, load_from_options
from lightning_modules.cli.parser import CommandParser
from lightning_modules.cli.video_options import (
    add_video_options,
    embed_options,
    report_passed_over,
    report_unreadable,
)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "embed",
        "Embed videos: each as one clip, the clips of a CSV, or sliding windows at a rate "
        "(for NLQ and MQ features: --rate 1.87 --frames 4).",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="as `eva02-at convert` reads it"
    )
    parser.add_argument(
        "--videos",
        required=True,
        nargs="+",
        metavar="PATH",
        help="videos, folders of them, .txt files with a path a line, or one .csv of clips with "
        "the columns video,start_s,end_s",
    )
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="PATH",
        help="FILE.pt, FILE.npy or FILE.parquet, with FILE.json naming the window of each row; or "
        "a folder, which gets one VIDEO.pt a video (those already there are kept)",
    )
    add_video_options(parser)
    add_model_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """Embed videos.

    Args:
        argv: Words after `eva02-at embed`.

    Raises:
        ValueError: a mistake in the options, or nothing could be read.
    """
    options = _parser().parse_args(argv)
    from lightning_modules.inference.features import check_places, write_features

    check_places(options.videos, options.output, options.rate)
    how = embed_options(options)
    written = write_features(
        load_from_options(options, options.checkpoint), options.videos, options.output, how
    )
    report_passed_over(options.videos)
    report_unreadable(written.unreadable)
    print(written.told)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
