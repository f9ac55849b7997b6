"""An index of a folder's videos for text search: one file, brought up to date file by file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datamodules.files import write_whole
from datamodules.video.windows import Window, find_videos
from lightning_modules.inference.embedding import Embedded, Embedder

_FORMAT = "eva02-at search index 1"
_SLICE = 64  # videos between two looks at the clock
_SAVE_EVERY_S = 60.0
_CANDIDATES = 50  # looked at for each hit wanted: neighbours of better ones are passed over


@dataclass(frozen=True)
class IndexedVideo:
    """A video as it was when it was read.

    Attributes:
        path: Relative to the folder.
        mtime_ns: Time of its last change.
        size: Bytes.
        problem: Why it, or a part of it, could not be read.
    """

    path: str
    mtime_ns: int
    size: int
    problem: str | None = None


@dataclass(frozen=True)
class Hit:
    """A window that answers a query: the cosine similarity is `score`."""

    window: Window
    score: float


@dataclass
class SearchIndex:
    """Embeddings of every window of a folder's videos.

    Row n belongs to videos[video[n]] from spans[n, 0] to spans[n, 1] seconds.

    Attributes:
        folder: The folder.
        key: What the embeddings depend on besides the videos: model and options.
        videos: Those that were read, or tried.
        video: (N,) int64.
        spans: (N, 2) float64.
        embeddings: (N, E) float32.
    """

    folder: Path
    key: str
    videos: list[IndexedVideo] = field(default_factory=list)
    video: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    spans: Tensor = field(default_factory=lambda: torch.empty(0, 2, dtype=torch.float64))
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    @classmethod
    def load(cls, path: Path, folder: Path, key: str) -> SearchIndex:
        """Read an index; an empty one where there is none, or one of another model or options.

        Raises:
            ValueError: the file is no index, or damaged.
        """
        if not path.is_file():
            return cls(folder, key)
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["index"])
                tensors = {name: file.get_tensor(name) for name in ("video", "spans", "embeddings")}
            if about["format"] != _FORMAT or about["key"] != key:
                return cls(folder, key)
            return cls(folder, key, [IndexedVideo(**v) for v in about["videos"]], **tensors)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no search index, or is damaged ({error!r}); remove it, and the folder "
                "is indexed anew"
            ) from None

    def save(self, path: Path) -> None:
        """Write the index, whole or not at all."""
        about = {
            "format": _FORMAT,
            "key": self.key,
            "videos": [asdict(video) for video in self.videos],
        }
        tensors = {"video": self.video, "spans": self.spans, "embeddings": self.embeddings}
        metadata = {"index": json.dumps(about)}
        try:
            write_whole(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))
        except OSError as error:
            raise OSError(f"the index {path} cannot be written ({error}); see --index") from error

    def stale(self) -> tuple[list[Path], int]:
        """Drop what has left the folder or changed there.

        Returns:
            The videos to read, and how many were dropped.
        """
        now = {str(p.relative_to(self.folder)): p for p in find_videos([self.folder])}
        keep = [number for number, old in enumerate(self.videos) if old == self._state(old, now)]
        dropped = len(self.videos) - len(keep)
        if dropped:
            place = torch.full((len(self.videos),), -1)
            place[keep] = torch.arange(len(keep))
            rows = place[self.video] >= 0
            self.video = place[self.video][rows]
            self.spans, self.embeddings = self.spans[rows], self.embeddings[rows]
            self.videos = [self.videos[number] for number in keep]
        known = {old.path for old in self.videos}
        return [path for name, path in now.items() if name not in known], dropped

    def _state(self, old: IndexedVideo, now: dict[str, Path]) -> IndexedVideo | None:
        return _describe(now[old.path], old.path, old.problem) if old.path in now else None

    def update(
        self,
        embedder: Embedder,
        path: Path,
        on_videos: Callable[[int, int], object] = lambda done, total: None,
    ) -> int:
        """Read what is new or changed in the folder, and save from time to time.

        Args:
            embedder: Must be the one of `key`.
            path: Where to save.
            on_videos: Called with the numbers of videos finished and to read.

        Returns:
            How many videos were read.
        """
        todo, dropped = self.stale()
        saved_at = time.monotonic()
        for start in range(0, len(todo), _SLICE):
            part = todo[start : start + _SLICE]
            # before reading: a file that changes meanwhile is read again next time
            states = {v: _describe(v, str(v.relative_to(self.folder)), None) for v in part}
            windows, unreadable = embedder.windows_of(part)
            result = embedder.windows(windows)
            result.unreadable = unreadable + result.unreadable
            self._add(states, result)
            on_videos(start + len(part), len(todo))
            if time.monotonic() - saved_at > _SAVE_EVERY_S:
                self.save(path)
                saved_at = time.monotonic()
        if todo or dropped or not path.exists():
            self.save(path)
        return len(todo)

    def _add(self, states: dict[Path, IndexedVideo], result: Embedded) -> None:
        problems: dict[Path, str] = {}
        for problem in result.unreadable:
            problems.setdefault(problem.video, problem.reason)
        first = len(self.videos)
        place = {video: first + number for number, video in enumerate(states)}
        self.videos += [
            IndexedVideo(state.path, state.mtime_ns, state.size, problems.get(video))
            for video, state in states.items()
        ]
        if not result.windows:
            return
        video = torch.tensor([place[w.video] for w in result.windows])
        spans = torch.tensor([(w.start_s, w.end_s) for w in result.windows], dtype=torch.float64)
        old = self.embeddings if len(self.embeddings) else result.embeddings[:0]
        self.video = torch.cat((self.video, video))
        self.spans = torch.cat((self.spans, spans))
        self.embeddings = torch.cat((old, result.embeddings))

    def search(self, query: Tensor, count: int) -> list[Hit]:
        """Find the windows nearest to a query, best first; ties in the order of the index.

        A window that overlaps a better one of the same video is left out.

        Args:
            query: (E,) L2-normalised.
            count: How many to return at most.
        """
        if not len(self.embeddings):
            return []
        scores = self.embeddings @ query
        number = min(len(scores), count * _CANDIDATES)
        best = torch.topk(scores, number).indices
        best = best[torch.sort(scores[best], descending=True, stable=True).indices]
        hits: list[Hit] = []
        for row in best.tolist():
            start_s, end_s = self.spans[row].tolist()
            window = Window(self.folder / self.videos[int(self.video[row])].path, start_s, end_s)
            if not any(_overlap(window, hit.window) for hit in hits):
                hits.append(Hit(window, float(scores[row])))
            if len(hits) == count:
                break
        return hits


def _describe(path: Path, name: str, problem: str | None) -> IndexedVideo:
    try:
        status = path.stat()
    except OSError as error:  # a dangling link
        return IndexedVideo(name, 0, 0, problem or str(error))
    return IndexedVideo(name, status.st_mtime_ns, status.st_size, problem)


def _overlap(a: Window, b: Window) -> bool:
    return a.video == b.video and a.start_s < b.end_s and b.start_s < a.end_s
