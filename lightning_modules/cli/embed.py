"""`eva02-at embed`: features of one's own videos."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datamodules.files import write_atomically, write_whole
from datamodules.video.windows import Unreadable, Window, find_videos, read_clip_list
from lightning_modules.cli.model_options import add_model_options, load_from_options
from lightning_modules.cli.parser import CommandParser
from lightning_modules.cli.video_options import (
    add_video_options,
    embed_options,
    report_unreadable,
)
from lightning_modules.inference.embedding import Embedded, Embedder

_SUFFIXES = (".pt", ".npy", ".parquet")


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
    output: Path = options.output
    if output.suffix not in ("", *_SUFFIXES):
        raise ValueError(f"output {output} must end in {', '.join(_SUFFIXES)}, or be a folder")
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"output {output} needs pyarrow: pip install 'eva02-at[parquet]'")
    clip_list = [place for place in options.videos if place.endswith(".csv")]
    if clip_list and (len(options.videos) > 1 or options.rate is not None or not output.suffix):
        raise ValueError(
            "a .csv of clips stands alone: without other videos, without --rate, into one file"
        )
    videos = [] if clip_list else find_videos(options.videos)
    windows = read_clip_list(Path(clip_list[0])) if clip_list else []
    loaded = load_from_options(options, options.checkpoint)
    embedder = Embedder(loaded.model, embed_options(options))
    if not output.suffix:
        _check_same_features(output, {"model": loaded.model_hash(), **_how(options, embedder)})
        return _embed_into_folder(embedder, videos, output)
    unreadable: list[Unreadable] = []
    if videos:
        windows, unreadable = embedder.windows_of(videos)
    with tqdm(total=len(windows), unit="window", disable=None) as bar:
        result = embedder.windows(windows, bar.update)
    result.unreadable = unreadable + result.unreadable
    report_unreadable(result.unreadable)
    if not result.windows:
        raise ValueError("no video could be read")
    _write(options, embedder, result)
    print(f"{len(result.windows)} embeddings of {result.embeddings.shape[1]} in {output}")
    return 0


def _how(options: argparse.Namespace, embedder: Embedder) -> dict[str, Any]:
    return {
        "frames": embedder.num_frames,
        "rate": options.rate,
        "window_s": options.window_s,
        "dtype": options.dtype,
    }


def _check_same_features(folder: Path, about: dict[str, Any]) -> None:
    """A folder is filled by one model in one way; what is there already is kept."""
    description = folder / "features.json"
    if description.is_file() and json.loads(description.read_text()) != about:
        raise ValueError(
            f"{folder} holds features of another model or other options ({description.name}); "
            "name another folder, or remove this one"
        )
    write_atomically(description, json.dumps(about, indent=1) + "\n")


def _embed_into_folder(embedder: Embedder, videos: list[Path], folder: Path) -> int:
    """Write one tensor (windows, E) a video; a video with an unreadable part gets none.

    Row k is window k in time, so a hole would shift what follows it.
    """
    targets = {video: folder / f"{video.stem}.pt" for video in videos}
    if len(set(targets.values())) < len(videos):
        raise ValueError(f"two of the videos have one name; their features in {folder} would too")
    waiting = [video for video in videos if not targets[video].exists()]
    unreadable: list[Unreadable] = []
    for video in tqdm(waiting, unit="video", disable=None):
        windows, problems = embedder.windows_of([video])
        result = embedder.windows(windows)
        problems += result.unreadable
        unreadable += problems
        if not problems:
            _save_tensor(result.embeddings, targets[video])
    report_unreadable(unreadable)
    done = sum(target.exists() for target in targets.values())
    print(f"features of {done} of {len(videos)} videos in {folder}")
    if not done:
        raise ValueError("no video could be read")
    return 0


def _write(options: argparse.Namespace, embedder: Embedder, result: Embedded) -> None:
    output: Path = options.output
    about = {
        "checkpoint": str(options.checkpoint),
        **_how(options, embedder),
        "windows": [_row(window) for window in result.windows],
        "unreadable": [str(problem) for problem in result.unreadable],
    }
    write_atomically(output.with_suffix(".json"), json.dumps(about, indent=1) + "\n")
    if output.suffix == ".parquet":
        _save_table(result, output)
    else:
        _save_tensor(result.embeddings, output)


def _save_table(result: Embedded, path: Path) -> None:
    """Write the windows and their embeddings as the columns of one Parquet file."""
    import pyarrow
    from pyarrow import parquet

    columns = pyarrow.Table.from_pylist([_row(window) for window in result.windows])
    values = pyarrow.array(result.embeddings.flatten().numpy())
    rows = pyarrow.FixedSizeListArray.from_arrays(values, result.embeddings.shape[1])
    table = columns.append_column("embedding", rows)
    write_whole(path, lambda temporary: parquet.write_table(table, temporary))


def _save_tensor(embeddings: Tensor, path: Path) -> None:
    """Write .pt or .npy, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            if path.suffix == ".npy":
                np.save(file, embeddings.numpy())
            else:
                torch.save(embeddings, file)

    write_whole(path, write)


def _row(window: Window) -> dict[str, str | float]:
    return {
        "video": str(window.video),
        "start_s": round(window.start_s, 6),
        "end_s": round(window.end_s, 6),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
