"""Anybody's video files to model inputs: found, cut into windows, decoded in child processes.

Times are seconds from a file's first frame. A window is shown by T frames at the centres of its T
equal segments, as in training; the frame at a time is the one on the screen then, so that odd and
variable frame rates keep their timing.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from datamodules.video.crops import resize_and_centre_crop
from datamodules.video.frames import UNREADABLE, Limits, Video, read_frames
from datamodules.video.workers import ITEM_LIMIT_S, Job, run_jobs

SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts"})
_COLUMNS = ("video", "start_s", "end_s")
_EPSILON_S = 1e-6
_PROBED_AT_ONCE = 16  # videos in a child: starting one takes as long as probing a few
_SEEK_S = 10.0  # farther apart, seeking is quicker than decoding what lies between


@dataclass(frozen=True)
class Window:
    """A part of a video: seconds from its first frame."""

    video: Path
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Length:
    """How long a video is: seconds to the end of its last frame, and of a frame (the mean)."""

    duration_s: float
    frame_s: float


@dataclass(frozen=True)
class Unreadable:
    """A video, or a window of one, that could not be decoded, and why."""

    video: Path
    reason: str
    window: Window | None = None

    def __str__(self) -> str:
        w = self.window
        span = "" if w is None else f" ({w.start_s:.2f}-{w.end_s:.2f} s)"
        return f"{self.video}{span}: {self.reason}"


def find_videos(places: Iterable[str | Path]) -> list[Path]:
    """List video files.

    Args:
        places: Video files, folders (searched to the bottom, hidden names left out), or text
            files with one path a line, relative to the text file.

    Raises:
        FileNotFoundError: a place does not exist.
        ValueError: no video is found.
    """
    found: dict[Path, None] = {}
    for place in map(Path, places):
        if place.is_dir():
            files = sorted(p for p in place.rglob("*") if _is_video(p))
            found |= dict.fromkeys(p for p in files if not _is_hidden(p.relative_to(place)))
        elif place.suffix == ".txt" and place.is_file():
            lines = place.read_text().splitlines()
            found |= dict.fromkeys(place.parent / line.strip() for line in lines if line.strip())
        elif place.is_file():
            found[place] = None
        else:
            raise FileNotFoundError(f"videos {place}: no such file or folder")
    if not found:
        raise ValueError(
            f"no video in {', '.join(map(str, places))}; looked for {', '.join(sorted(SUFFIXES))}"
        )
    return list(found)


def passed_over(places: Iterable[str | Path]) -> dict[Path, list[Path]]:
    """List the files of folders that `find_videos` leaves out; hidden ones are not meant."""
    found = {}
    for folder in filter(Path.is_dir, map(Path, places)):
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        others = [p for p in files if not _is_hidden(p.relative_to(folder)) and not _is_video(p)]
        if others:
            found[folder] = others
    return found


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def read_clip_list(path: Path) -> list[Window]:
    """Read a CSV with the columns `video,start_s,end_s`; paths are relative to the CSV.

    Raises:
        ValueError: a column is missing, or a row is no span; names the row.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in _COLUMNS if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path} lacks the column {missing[0]}; it needs {','.join(_COLUMNS)}")
        windows = []
        for number, row in enumerate(reader, start=2):
            try:
                window = Window(
                    path.parent / row["video"], float(row["start_s"]), float(row["end_s"])
                )
            except (TypeError, ValueError):
                raise ValueError(f"{path} line {number}: start_s and end_s must be seconds") from (
                    None
                )
            if not 0 <= window.start_s < window.end_s < math.inf:
                raise ValueError(f"{path} line {number}: 0 <= start_s < end_s must hold")
            windows.append(window)
    if not windows:
        raise ValueError(f"{path} lists no clip")
    return windows


def sliding_windows(
    video: Path, length: Length, rate: float, window_s: float | None = None
) -> list[Window]:
    """Cover a video with windows at a fixed rate, its last frame included.

        rate 2, windows of 0.5 s, video of 1.7 s:   |0   |0.5 |1.0 |1.5| -> the last is 0.2 s

    Window k is centred at (k + 1/2) / rate and clipped to the video; the first that holds no frame
    ends the list.

    Args:
        video: The file.
        length: How long it is.
        rate: Windows a second.
        window_s: Length of a window; 1 / rate (neighbours touch) by default.
    """
    duration_s = length.duration_s
    window_s = 1 / rate if window_s is None else window_s
    count = math.floor((duration_s - length.frame_s) * rate + _EPSILON_S) + 1
    windows = []
    for centre in ((k + 0.5) / rate for k in range(count)):
        start_s = max(0.0, centre - window_s / 2)
        end_s = min(duration_s, centre + window_s / 2)
        if start_s >= end_s:  # a short window whose centre lies beyond the end
            start_s, end_s = max(0.0, duration_s - window_s), duration_s
        windows.append(Window(video, start_s, end_s))
    return windows


def probe_videos(
    videos: Sequence[Path], num_workers: int, limits: Limits | None = None
) -> Iterator[tuple[Path, Length | Unreadable]]:
    """Measure videos in child processes; yields (video, its length or what is wrong with it).

    Packets are counted, since headers are often wrong: no frame at the end is lost.
    """
    jobs = [videos[i : i + _PROBED_AT_ONCE] for i in range(0, len(videos), _PROBED_AT_ONCE)]
    measure = partial(_measure, limits=limits or Limits())
    for results in in_children(measure, jobs, num_workers, lambda video: video):
        yield from results


def read_windows(
    windows: Sequence[Window],
    num_frames: int,
    size: int,
    num_workers: int,
    batch_size: int = 16,
    limits: Limits | None = None,
) -> Iterator[tuple[list[Window], Tensor, list[Unreadable]]]:
    """Decode windows in child processes: a video that crashes the decoder is a counted loss.

    Args:
        windows: In the order of videos and time, which is how they are read fastest.
        num_frames: T.
        size: Side of the frames: shorter side resized, centre cropped, as in evaluation.
        num_workers: Child processes.
        batch_size: Most windows in a yielded batch.
        limits: What a video may declare.

    Yields:
        Windows that were read, their (B, 3, T, size, size) uint8, and what could not be read; in
        no fixed order.
    """
    batches = [windows[i : i + batch_size] for i in range(0, len(windows), batch_size)]

    def read(group: Sequence[Window]) -> list[NDArray[np.uint8]]:
        return _read_spans(group, num_frames, size, limits or Limits())

    jobs = [_neighbours(batch) for batch in batches]
    for results in in_children(read, jobs, num_workers, lambda group: group[0].video):
        kept, clips, lost = [], [], []
        for group, result in results:
            if isinstance(result, Unreadable):
                lost += [Unreadable(w.video, result.reason, w) for w in group]
            else:
                kept += group
                clips += result
        yield kept, torch.from_numpy(np.stack(clips)) if clips else torch.empty(0), lost


def _neighbours(windows: Sequence[Window]) -> list[list[Window]]:
    """Group windows of one video that are worth one pass over it."""
    groups: list[list[Window]] = []
    for window in windows:
        last = groups[-1][-1] if groups else None
        if last and last.video == window.video and 0 <= window.start_s - last.start_s < _SEEK_S:
            groups[-1].append(window)
        else:
            groups.append([window])
    return groups


def in_children(
    read: Callable[[Any], Any],
    jobs: Sequence[Sequence[Any]],
    num_workers: int,
    video_of: Callable[[Any], Path],
) -> Iterator[list[tuple[Any, Any]]]:
    """Read videos in child processes, since a damaged one can crash the decoder.

    Args:
        read: Called with an item; what it returns must not hold torch tensors.
        jobs: Lists of items; a list is one child's work.
        num_workers: Children at a time.
        video_of: The video that an item reads.

    Yields:
        For each list, in no fixed order: its items with what was read, or an `Unreadable`.
    """

    def work(job: Job, begin: Callable[[str | None], None]) -> list[Any]:
        torch.set_num_threads(1)  # a forked child has no threads of torch's pool
        results = []
        for item in job.payload:
            video = video_of(item)
            if str(video) in job.crashed:
                results.append(Unreadable(video, job.crashed[str(video)]))
                continue
            begin(str(video))
            try:
                results.append(read(item))
            except UNREADABLE as error:
                reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
                results.append(Unreadable(video, reason))
        return results

    numbered = [Job(number, items) for number, items in enumerate(jobs)]
    for event in run_jobs(work, numbered, num_workers, ITEM_LIMIT_S):
        if event.result is not None:
            yield list(zip(event.job.payload, event.result, strict=True))


def _measure(path: Path, limits: Limits) -> Length:
    """From the first frame to the end of the last, by the packets' timestamps."""
    with Video(path, limits) as video:
        stamps = video.stamps()
        next(video.frames())  # a header without pictures is found out here
    return Length(stamps.duration_s, stamps.duration_s / len(stamps.starts_s))


def _read_spans(
    windows: Sequence[Window], num_frames: int, size: int, limits: Limits
) -> list[NDArray[np.uint8]]:
    """Decode windows of one video, each to (3, T, size, size) uint8."""
    times = [
        window.start_s + (t + 0.5) * (window.end_s - window.start_s) / num_frames
        for window in windows
        for t in range(num_frames)
    ]
    wanted = sorted(set(times))
    small: dict[float, Tensor] = {}
    frames = read_frames(windows[0].video, wanted, limits)
    for time, frame in zip(wanted, frames, strict=True):
        small[time] = resize_and_centre_crop(frame[None], size)[:, 0]
    clips = [times[i : i + num_frames] for i in range(0, len(times), num_frames)]
    # numpy: torch would pass tensors as handles that die with the process
    return [torch.stack([small[time] for time in clip], dim=1).numpy() for clip in clips]
