"""`eva02-at search`: text-to-video search over a folder."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from pathlib import Path

from tqdm import tqdm

from datamodules.files import write_atomically
from datamodules.video.windows import Unreadable
from lightning_modules.checkpoints.conversion import LoadedModel
from lightning_modules.cli.model_options import add_model_options, load_from_options
from lightning_modules.cli.parser import CommandParser
from lightning_modules.cli.video_options import (
    add_video_options,
    embed_options,
    report_unreadable,
)
from lightning_modules.inference.embedding import Embedder
from lightning_modules.inference.search_index import SearchIndex
from lightning_modules.inference.search_page import Answer, clock, search_page

_INDEX_FOLDER = ".eva02-at"


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
        metavar="FILE",
        help=f"where the index lies (DIR/{_INDEX_FOLDER}/search-HASH.safetensors)",
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
    loaded = load_from_options(options, options.checkpoint)
    embedder = Embedder(loaded.model, embed_options(options))
    index = _up_to_date(options, loaded, embedder)
    if not len(index.embeddings):
        raise ValueError(f"no video in {options.videos} could be read")
    started = time.monotonic()
    texts = [options.template.replace("{}", query) for query in options.query]
    answers = [
        Answer(query, index.search(text, options.top))
        for query, text in zip(options.query, embedder.texts(texts) if texts else [], strict=True)
    ]
    if answers:
        _print(answers, options.videos)
        print(f"answered in {time.monotonic() - started:.3f} s")
    if options.html:
        facts = (
            f"{len(index.embeddings)} windows of {len(index.videos)} videos, {options.checkpoint}"
        )
        problems = [f"{video.path}: {video.problem}" for video in index.videos if video.problem]
        page = search_page(answers, options.videos, facts, problems, options.workers)
        write_atomically(options.html, page)
        print(f"page in {options.html}, {time.monotonic() - started:.3f} s after the question")
    return 0


def _up_to_date(
    options: argparse.Namespace, loaded: LoadedModel, embedder: Embedder
) -> SearchIndex:
    """Load the folder's index and read what is new."""
    how = [embedder.num_frames, options.rate, options.window_s, options.dtype]
    key = hashlib.sha256(json.dumps([loaded.model_hash(), *how]).encode()).hexdigest()
    path = options.index or options.videos / _INDEX_FOLDER / f"search-{key[:12]}.safetensors"
    index = SearchIndex.load(path, options.videos, key)
    started = time.monotonic()
    with tqdm(unit="video", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        num_read = index.update(embedder, path, show)
    print(
        f"index: {len(index.embeddings)} windows of {len(index.videos)} videos, {num_read} read "
        f"now in {time.monotonic() - started:.1f} s"
    )
    report_unreadable(
        [Unreadable(options.videos / v.path, v.problem) for v in index.videos if v.problem]
    )
    return index


def _print(answers: list[Answer], folder: Path) -> None:
    for answer in answers:
        print(f"\n{answer.query}")
        for rank, hit in enumerate(answer.hits, start=1):
            window = hit.window
            span = f"{clock(window.start_s)}-{clock(window.end_s)}"
            print(f"{rank:4}  {hit.score:6.3f}  {span:<16}  {window.video.relative_to(folder)}")
    print()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
