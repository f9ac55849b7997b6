"""`eva02-at embed`: features of one's own videos."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_modules.cli.model_options import add_model_options, load_from_options
from lightning_modules.cli.parser import CommandParser
from lightning_modules.cli.startup import importing
from lightning_modules.cli.video_options import (
    add_video_options,
    embed_options,
    report_passed_over,
    report_unreadable,
)
from lightning_modules.training.closing import close


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "embed",
        "Embed videos: each as one clip, the clips of a CSV, or sliding windows at a rate "
        "(for NLQ and MQ features: --rate 1.87 --frames 4); or sentences, with --texts.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="as `eva02-at convert` reads it"
    )
    parser.add_argument(
        "--videos",
        nargs="+",
        metavar="PATH",
        help="videos, folders of them, .txt files with a path a line, or one .csv of clips with "
        "the columns video,start_s,end_s",
    )
    parser.add_argument(
        "--texts",
        type=Path,
        metavar="FILE",
        help="sentences instead: a .txt, a .jsonl with query_id and query, or Ego4D's nlq_*.json; "
        "--output is then FILE.npy, FILE.pt, sentence.npy (EgoVLP, VSLNet) or FOLDER.lmdb "
        "(GroundNLQ, OSGNet)",
    )
    parser.add_argument(
        "--per-token", action="store_true", help="of --texts: hidden states of every token"
    )
    parser.add_argument(
        "--template", default="{}", metavar="TEXT", help="of --texts: '#C C {}' for narrations"
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
    if (options.texts is None) == (options.videos is None):
        raise ValueError("give --videos or --texts, one of them")
    if options.texts is not None:
        return _embed_texts(options)
    with importing():
        from lightning_modules.inference.features import check_places, write_features

    check_places(options.videos, options.output, options.rate)
    how = embed_options(options)
    written = write_features(
        load_from_options(options, options.checkpoint), options.videos, options.output, how
    )
    report_passed_over(options.videos)
    report_unreadable(written.unreadable)
    print(written.told)
    close("search", "--checkpoint", options.checkpoint, "--videos", "DIR", "sentence")
    return 0


def _embed_texts(options: argparse.Namespace) -> int:
    from lightning_modules.inference.embedding import Embedder
    from lightning_modules.inference.texts import (
        check_text_output,
        read_queries,
        write_text_features,
    )

    if "{}" not in options.template:
        raise ValueError(f"template {options.template!r} has no {{}} for the sentence")
    check_text_output(options.output, options.per_token)
    queries = read_queries(options.texts)
    loaded = load_from_options(options, options.checkpoint)
    embedder = Embedder(loaded, embed_options(options))
    how = (options.per_token, options.template)
    print(write_text_features(embedder, queries, options.output, *how))
    close("embed", "--checkpoint", options.checkpoint, "--videos", "PATH", "--output", "FILE.pt")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
