"""Options by which several commands say how videos are read and embedded."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datamodules.video.windows import Unreadable
    from lightning_modules.inference.embedding import EmbedOptions

_MOST_NAMED = 20


def add_video_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how a video becomes windows and windows become embeddings."""
    group = parser.add_argument_group("reading the videos")
    group.add_argument("--rate", type=float, metavar="R", help="windows a second")
    group.add_argument(
        "--window-s", type=float, metavar="S", help="length of a window in seconds (1 / rate)"
    )
    group.add_argument(
        "--frames", type=int, metavar="T", help="frames of a window (what the model was made for)"
    )
    group.add_argument("--batch-size", type=int, default=16, help="windows in a pass (%(default)s)")
    group.add_argument(
        "--workers",
        type=int,
        default=max(1, min(8, os.cpu_count() or 1)),
        help="decoding processes (%(default)s)",
    )
    group.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="leave out, and name, videos with larger frames (33 million, which is 8K)",
    )
    group.add_argument("--device", help="of the model (cuda where there is one, else cpu)")
    group.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="(%(default)s)"
    )


def embed_options(options: argparse.Namespace) -> EmbedOptions:
    """What the options say."""
    import torch

    from datamodules.video.frames import Limits
    from lightning_modules.inference.embedding import EmbedOptions

    limits = Limits() if options.max_pixels is None else Limits(options.max_pixels)
    return EmbedOptions(
        num_frames=options.frames,
        rate=options.rate,
        window_s=options.window_s,
        batch_size=options.batch_size,
        num_workers=options.workers,
        device=options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        dtype=options.dtype,
        limits=limits,
    )


def report_passed_over(places: Iterable[str | Path]) -> None:
    """Name, on the error stream, the files of folders that are not taken for videos."""
    from datamodules.video.windows import passed_over

    for folder, files in passed_over(places).items():
        named = ", ".join(str(file.relative_to(folder)) for file in files[:_MOST_NAMED])
        more = len(files) - _MOST_NAMED
        rest = f" ({more} more not shown)" if more > 0 else ""
        print(f"{len(files)} files in {folder} are passed over: {named}{rest}", file=sys.stderr)


def report_unreadable(unreadable: Sequence[Unreadable]) -> None:
    """Name what could not be read, and count it, on the error stream."""
    for problem in unreadable[:_MOST_NAMED]:
        print(f"unreadable: {problem}", file=sys.stderr)
    if unreadable:
        videos = len({problem.video for problem in unreadable})
        more = len(unreadable) - _MOST_NAMED
        rest = f" ({more} more not shown)" if more > 0 else ""
        print(f"{len(unreadable)} unreadable in {videos} videos{rest}", file=sys.stderr)
