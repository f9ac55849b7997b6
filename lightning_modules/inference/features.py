"""Features of one's own videos as files: one for all windows, or one a video."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from datamodules.files import write_atomically, write_whole
from datamodules.video.windows import Unreadable, Window, find_videos, read_clip_list
from lightning_modules.checkpoints.conversion import LoadedModel
from lightning_modules.inference.embedding import Embedded, Embedder, EmbedOptions

_SUFFIXES = (".pt", ".npy", ".parquet")


@dataclass(frozen=True)
class Written:
    """What `write_features` did.

    Attributes:
        told: In words, what lies where.
        unreadable: What was left out, and why.
    """

    told: str
    unreadable: list[Unreadable]


def check_places(places: Sequence[str], output: Path, rate: float | None) -> None:
    """Refuse what cannot be embedded together, before a model is read.

    Args:
        places: Videos, folders, lists of paths, or one CSV of clips.
        output: A file, or a folder that gets one file a video.
        rate: Windows a second; None takes each video as one clip.

    Raises:
        ValueError: The output's kind is unknown, or a CSV does not stand alone.
    """
    if output.suffix not in ("", *_SUFFIXES):
        raise ValueError(f"output {output} must end in {', '.join(_SUFFIXES)}, or be a folder")
    if output.suffix == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise ValueError(f"output {output} needs pyarrow: pip install 'eva02-at[parquet]'")
    has_list = any(place.endswith(".csv") for place in places)
    if has_list and (len(places) > 1 or rate is not None or not output.suffix):
        raise ValueError(
            "a .csv of clips stands alone: without other videos, without --rate, into one file"
        )


def write_features(
    loaded: LoadedModel, places: Sequence[str], output: Path, options: EmbedOptions
) -> Written:
    """Embed videos and write their features.

    Args:
        loaded: The model.
        places: As `check_places`.
        output: As `check_places`.
        options: How.

    Raises:
        ValueError: Nothing could be read, or the folder holds features of another model.
    """
    embedder = Embedder(loaded, options)
    if not output.suffix:
        videos = find_videos(places)
        _check_same_features(output, {"model": loaded.model_hash(), **_how(embedder)})
        unreadable = _embed_into_folder(embedder, videos, output)
        done = sum((output / f"{video.stem}.pt").exists() for video in videos)
        if not done:
            raise ValueError(_nothing(unreadable))
        return Written(f"features of {done} of {len(videos)} videos in {output}", unreadable)
    if places[0].endswith(".csv"):
        windows, unreadable = read_clip_list(Path(places[0])), []
    else:
        windows, unreadable = embedder.windows_of(find_videos(places))
    with tqdm(total=len(windows), unit="window", disable=None) as bar:
        result = embedder.windows(windows, bar.update)
    result.unreadable = unreadable + result.unreadable
    if not result.windows:
        raise ValueError(_nothing(result.unreadable))
    _write(output, str(loaded.source.path), embedder, result)
    rows, width = result.embeddings.shape
    return Written(f"{rows} embeddings of {width} in {output}", result.unreadable)


def _nothing(unreadable: Sequence[Unreadable]) -> str:
    return "no video could be read" + (f": {unreadable[0]}" if unreadable else "")


def _how(embedder: Embedder) -> dict[str, Any]:
    options = embedder.options
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


def _embed_into_folder(embedder: Embedder, videos: list[Path], folder: Path) -> list[Unreadable]:
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
    return unreadable


def _write(output: Path, checkpoint: str, embedder: Embedder, result: Embedded) -> None:
    about = {
        "checkpoint": checkpoint,
        **_how(embedder),
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
