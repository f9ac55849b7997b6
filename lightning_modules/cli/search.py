"""`eva02-at search`: text-to-video search over a folder."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_modules.cli.model_options import add_model_options, load_from_options
from lightning_modules.cli.parser import CommandParser
from lightning_modules.cli.video_options import (
    add_video_options,
    embed_options,
    report_unreadable,
)

if TYPE_CHECKING:
    from lightning_modules.inference.search_page import Answer


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "search",
        "Find the moments of a folder's videos that a sentence describes. The folder is indexed at "
        "the first call; later ones read only what is new or changed.",
    )
    parser.add_argument("query", nargs="*", help="sentences; none only brings the index up to date")
    parser.add_argument("--videos", required=True, type=Path, metavar="DIR", help="the folder")
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="as `eva02-at convert` reads it"
    )
    parser.add_argument("--top", type=int, default=12, help="hits a query (%(default)s)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with the frames")
    parser.add_argument(
        "--template",
        default="{}",
        help="what a query is put into; models trained on Ego4D's narrations know '#C C {}'",
    )
    parser.add_argument(
        "--index",
        type=Path,
        metavar="DIR",
        help="where the index lies (DIR/.eva02-at/search-HASH)",
    )
    add_video_options(parser)
    parser.set_defaults(rate=0.5)
    add_model_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """Search a folder.

    Args:
        argv: Words after `eva02-at search`.

    Raises:
        ValueError: a mistake in the options, or nothing could be read.
    """
    options = _parser().parse_args(argv)
    if options.top < 1:
        raise ValueError(f"top is {options.top}; at least one hit must be asked for")
    if "{}" not in options.template:
        raise ValueError(f"template {options.template!r} has no {{}} for the query")
    if not options.videos.is_dir():
        raise ValueError(f"{options.videos} is no folder")
    if options.html and not options.query:
        raise ValueError("a page (--html) needs a query")
    from datamodules.files import write_atomically
    from lightning_modules.inference.search import open_folder

    loaded = load_from_options(options, options.checkpoint)
    folder = open_folder(options.videos, loaded, embed_options(options), options.index)
    print(folder.told)
    report_unreadable(folder.unreadable)
    if not len(folder.index):
        raise ValueError(f"no video in {options.videos} could be read")
    started = time.monotonic()
    answers = folder.ask(options.query, options.top, options.template)
    if answers:
        _print(answers, options.videos)
        print(f"answered in {time.monotonic() - started:.3f} s")
    if options.html:
        write_atomically(options.html, folder.page(answers, options.workers))
        print(f"page in {options.html}, {time.monotonic() - started:.3f} s after the question")
    return 0


def _print(answers: list[Answer], folder: Path) -> None:
    from lightning_modules.inference.search_page import NOTHING_FITS, clock

    for answer in answers:
        print(f"\n{answer.query}")
        if not answer.fits:
            print(f"  {NOTHING_FITS}")
        for rank, hit in enumerate(answer.hits, start=1):
            window = hit.window
            span = f"{clock(window.start_s)}-{clock(window.end_s)}"
            sure = f"{answer.sure[rank - 1]:5.0%} sure" if answer.sure else ""
            where = window.video.relative_to(folder)
            print(f"{rank:4}  {hit.score:6.3f}  {sure}  {span:<16}  {where}")
    print()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
