"""`eva02-at search`: text-to-video search over a folder."""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from lightning_modules.inference.search import FolderSearch
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
        "--checkpoint",
        required=True,
        action="append",
        metavar="PATH",
        help="as `eva02-at convert` reads it; may be repeated: every model answers",
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
    second = parser.add_argument_group("a second look (docs/rerank.md)")
    second.add_argument(
        "--rerank",
        metavar="PATH",
        help="a run of a recipe of configs/rerank that was trained on the checkpoint: the first "
        "hits are decoded and looked at again",
    )
    second.add_argument(
        "--rerank-top", type=int, default=20, metavar="K", help="how many (%(default)s)"
    )
    second.add_argument(
        "--blend",
        type=float,
        default=1.0,
        metavar="W",
        help="what that counts beside the cosine (%(default)s)",
    )
    page = parser.add_argument_group("a page to type into")
    page.add_argument("--serve", action="store_true", help="answer in a browser until Ctrl-C")
    page.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on (%(default)s); any other than this machine's needs the token "
        "that is printed",
    )
    page.add_argument("--port", type=int, default=8000, help="0: any free one (%(default)s)")
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
    if options.rerank and len(options.checkpoint) > 1:
        raise ValueError("--rerank belongs to one --checkpoint")
    if not options.videos.is_dir():
        raise ValueError(f"{options.videos} is no folder; --videos takes one that holds videos")
    if (options.html and not options.query) or (options.serve and (options.query or options.html)):
        raise ValueError("a page (--html) needs a query; --serve is asked in the browser")
    if options.html and len(options.checkpoint) > 1:
        raise ValueError("a page (--html) shows one model; --serve shows several side by side")
    folders = [_open(options, path) for path in options.checkpoint]
    report_passed_over([options.videos])
    if options.serve:
        _serve(folders, options)
        return 0
    for folder in folders:
        _answer(folder, options)
    models = (word for path in options.checkpoint for word in ("--checkpoint", path))
    close("search", "--videos", options.videos, *models, "--serve", told="a page to type into")
    return 0


def _open(options: argparse.Namespace, path: str) -> FolderSearch:
    with importing():
        from lightning_modules.checkpoints.rerank import load_reranker
        from lightning_modules.evaluation.rerank import RerankOptions
        from lightning_modules.inference.search import open_folder
        from lightning_modules.inference.second_look import SecondLook

    loaded = load_from_options(options, path)
    how = RerankOptions(options.rerank_top, options.blend)
    # before the model gets the device and the type of the search: it is known by its weights
    reranker = load_reranker(options.rerank, loaded.model) if options.rerank else None
    folder = open_folder(options.videos, loaded, embed_options(options), options.index)
    if reranker is not None:
        weights = folder.embedder.model.logit_scale
        reranker = reranker.to(weights.device, weights.dtype)
        look = SecondLook(folder.embedder, reranker, how.top, how.blend)
        folder = replace(folder, second_look=look)
    print(folder.told)
    report_unreadable(folder.unreadable)
    if not len(folder.index):
        raise ValueError(f"no video in {options.videos} could be read")
    return folder


def _serve(folders: Sequence[FolderSearch], options: argparse.Namespace) -> None:
    try:
        from lightning_modules.inference.serve import LOOPBACK, SearchSite, serve
    except ImportError as error:
        raise ValueError(f"--serve needs {error.name}: pip install 'eva02-at[serve]'") from error
    token = None if options.host in LOOPBACK else secrets.token_urlsafe(16)
    serve(SearchSite(folders, options.template, token), options.host, options.port)


def _answer(folder: FolderSearch, options: argparse.Namespace) -> None:
    from datamodules.files import write_atomically

    started = time.monotonic()
    answers = folder.ask(options.query, options.top, options.template)
    if answers:
        _print(answers, options.videos)
        print(f"answered in {time.monotonic() - started:.3f} s")
    if options.html:
        write_atomically(options.html, folder.page(answers, options.workers))
        print(f"page in {options.html}, {time.monotonic() - started:.3f} s after the question")


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
