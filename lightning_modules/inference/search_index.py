"""An index of a folder's videos for text search, in parts that are only ever added.

    .eva02-at/search-1f0c.../part-01732...-4711.safetensors    600 videos, 81,000 windows
                             part-01732...-4711.safetensors     12 videos,  1,300 windows (newer)

A part holds the windows of some videos. A video's newest part counts; windows of videos that have
changed or left are passed over. Bytes are written once when they are new, and again only when small
parts are put together, so that an index of millions of windows grows by what is new. Parts are
mapped into memory, not read: a query goes through them block by block.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datamodules.files import write_whole
from datamodules.video.windows import Window, find_videos
from lightning_modules.inference.calibration import BANK, Background, Moments
from lightning_modules.inference.embedding import Embedded, Embedder

_FORMAT = "eva02-at search index 2"
_SLICE = 64  # videos between two looks at the clock
_SAVE_EVERY_S = 60.0
_CANDIDATES = 50  # looked at for each hit wanted: neighbours of better ones are passed over
_BLOCK = (
    1 << 12
)  # windows scored at a time: in float32 they fit the cache, 5 times faster than 2^16
_SMALL_ROWS, _MOST_SMALL = 1 << 16, 16  # so many parts below that size are put together
_PARALLEL = ("video", "spans", "embeddings")


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
    """A window that answers a query.

    Attributes:
        window: Where.
        score: Cosine similarity.
        z: The same in standard deviations above the query's mean over the whole index.
    """

    window: Window
    score: float
    z: float = 0.0


@dataclass(frozen=True)
class Among:
    """Which windows a question is about.

    Attributes:
        video: Letters that the video's path holds, in any case.
        start_s: The window ends after this.
        end_s: The window begins before this.
    """

    video: str = ""
    start_s: float = 0.0
    end_s: float = math.inf

    @property
    def is_all(self) -> bool:
        """True where every window is meant."""
        return self == Among()


@dataclass
class Part:
    """Windows of some videos, as one file holds them.

    Row n belongs to videos[video[n]] from spans[n, 0] to spans[n, 1] seconds.

    Attributes:
        videos: Those that were read, or tried.
        video: (N,) int64.
        spans: (N, 2) float64.
        embeddings: (N, E) float16: cosines move by less than 1e-3, and half as much is read.
        background: How a bank of sentences scores on these windows.
        path: The file; None for one that is not written yet.
        live: Numbers of the videos that count; None for all.
        alive: (N,) bool, which rows count; None for all.
    """

    videos: list[IndexedVideo]
    video: Tensor
    spans: Tensor
    embeddings: Tensor
    background: Background
    path: Path | None = None
    live: list[int] | None = None
    alive: Tensor | None = None

    @property
    def num_alive(self) -> int:
        """Rows that count."""
        return len(self.video) if self.alive is None else int(self.alive.sum())

    def keep(self, live: list[int]) -> None:
        """Let only the videos with these numbers, and their rows, count."""
        if len(live) == len(self.videos):
            self.live = self.alive = None
            return
        wanted = torch.zeros(len(self.videos), dtype=torch.bool)
        wanted[live] = True
        self.live, self.alive = live, wanted[self.video]

    @property
    def live_videos(self) -> list[IndexedVideo]:
        """Those that count."""
        return self.videos if self.live is None else [self.videos[number] for number in self.live]

    def rows(self, among: Among) -> Tensor | None:
        """(N,) bool, which rows count and are meant; None for all."""
        if among.is_all:
            return self.alive
        letters = among.video.casefold()
        named = torch.tensor([letters in v.path.casefold() for v in self.videos], dtype=torch.bool)
        meant = named[self.video] if len(self.videos) else torch.zeros(0, dtype=torch.bool)
        meant &= (self.spans[:, 1] > among.start_s) & (self.spans[:, 0] < among.end_s)
        return meant if self.alive is None else meant & self.alive

    @classmethod
    def read(cls, path: Path, key: str) -> Part | None:
        """Map a file; None if it is of another model, other options or another version.

        Raises:
            ValueError: The file is no part of an index, or damaged.
        """
        try:
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["index"])
                if about["format"] != _FORMAT or about["key"] != key:
                    return None
                video, spans, embeddings = (file.get_tensor(name) for name in _PARALLEL)
                background = Background(**{n: file.get_tensor(n) for n in Background.FIELDS})
            videos = [IndexedVideo(**video) for video in about["videos"]]
            return cls(videos, video, spans, embeddings, background, path)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path} is no part of a search index, or is damaged ({error!r}); remove it, and "
                "its videos are read anew"
            ) from None

    def write(self, folder: Path, key: str) -> None:
        """Write the part under a name of its own, whole or not at all."""
        # the clock puts later parts after earlier ones, the process keeps two writers apart
        self.path = folder / f"part-{time.time_ns():020}-{os.getpid()}.safetensors"
        about = {"format": _FORMAT, "key": key, "videos": [asdict(v) for v in self.videos]}
        tensors = {name: getattr(self, name).contiguous() for name in _PARALLEL}
        tensors |= self.background.tensors()
        metadata = {"index": json.dumps(about)}
        try:
            write_whole(self.path, lambda file: save_file(tensors, file, metadata=metadata))
        except OSError as error:
            told = f"the index {folder} cannot be written ({error.strerror}); see --index"
            raise OSError(error.errno, told) from error


@dataclass
class SearchIndex:
    """Embeddings of every window of a folder's videos.

    Attributes:
        folder: The folder.
        key: What the embeddings depend on besides the videos: model and options.
        parts: Oldest first.
    """

    folder: Path
    key: str
    parts: list[Part] = field(default_factory=list)

    @classmethod
    def load(cls, path: Path, folder: Path, key: str) -> SearchIndex:
        """Map an index; an empty one where there is none, or one of another model or options.

        Args:
            path: Folder of the parts.
            folder: Of the videos.
            key: See the class.

        Raises:
            ValueError: A file is no part of an index, or damaged.
        """
        if path.is_file():
            raise ValueError(f"the index {path} is a file; name a folder (or remove the file)")
        found = (Part.read(file, key) for file in sorted(path.glob("part-*.safetensors")))
        return cls(folder, key, [part for part in found if part is not None])

    def __len__(self) -> int:
        return sum(part.num_alive for part in self.parts)

    @property
    def videos(self) -> list[IndexedVideo]:
        """Those that count, in the order of the parts."""
        return [video for part in self.parts for video in part.live_videos]

    def stale(self) -> list[Path]:
        """Let only what is in the folder as it was read count; returns the videos to read."""
        now = {str(p.relative_to(self.folder)): p for p in find_videos([self.folder])}
        missing = dict(now)
        for part in reversed(self.parts):
            live = []
            for number, old in enumerate(part.videos):
                path = missing.get(old.path)
                if path is not None and _describe(path, old.path, old.problem) == old:
                    live.append(number)
                    del missing[old.path]
            part.keep(live)
        return list(missing.values())

    def update(
        self,
        embedder: Embedder,
        path: Path,
        on_videos: Callable[[int, int], object] = lambda done, total: None,
    ) -> int:
        """Read what is new or changed in the folder, and add it from time to time.

        Args:
            embedder: Must be the one of `key`.
            path: Folder of the parts.
            on_videos: Called with the numbers of videos finished and to read.

        Returns:
            How many videos were read.
        """
        todo = self.stale()
        bank = embedder.texts(BANK)
        waiting: list[tuple[dict[Path, IndexedVideo], Embedded]] = []
        saved_at = time.monotonic()
        for start in range(0, len(todo), _SLICE):
            group = todo[start : start + _SLICE]
            # before reading: a file that changes meanwhile is read again next time
            states = {v: _describe(v, str(v.relative_to(self.folder)), None) for v in group}
            windows, unreadable = embedder.windows_of(group)
            result = embedder.windows(windows)
            result.unreadable = unreadable + result.unreadable
            waiting.append((states, result))
            on_videos(start + len(group), len(todo))
            if time.monotonic() - saved_at > _SAVE_EVERY_S:
                self._add(waiting, bank, path)
                waiting, saved_at = [], time.monotonic()
        if waiting:
            self._add(waiting, bank, path)
        self._tidy(bank, path)
        return len(todo)

    def _add(
        self, read: Sequence[tuple[dict[Path, IndexedVideo], Embedded]], bank: Tensor, path: Path
    ) -> None:
        videos: list[IndexedVideo] = []
        rows: list[int] = []
        for states, result in read:
            problems: dict[Path, str] = {}
            for problem in result.unreadable:
                problems.setdefault(problem.video, problem.reason)
            place = {video: len(videos) + number for number, video in enumerate(states)}
            videos += [
                IndexedVideo(state.path, state.mtime_ns, state.size, problems.get(video))
                for video, state in states.items()
            ]
            rows += [place[window.video] for window in result.windows]
        windows = [window for _, result in read for window in result.windows]
        spans = torch.tensor([(w.start_s, w.end_s) for w in windows], dtype=torch.float64)
        embeddings = torch.cat([result.embeddings for _, result in read]).half()
        video = torch.tensor(rows, dtype=torch.int64)
        background = Background.of(bank, _blocks(embeddings))
        part = Part(videos, video, spans.reshape(-1, 2), embeddings, background)
        part.write(path, self.key)
        self.parts.append(part)

    def _tidy(self, bank: Tensor, path: Path) -> None:
        """Put small parts together once there are many; drop those without a row that counts.

        A part is written before those it replaces are removed: a video is in the newest, whenever
        the process ends. A part that is mostly dead counts as a small one.
        """
        small = [part for part in self.parts if part.num_alive < _SMALL_ROWS]
        if len(small) <= _MOST_SMALL:
            return
        videos: list[IndexedVideo] = []
        rows, spans, embeddings = [], [], []
        for part in small:
            alive = slice(None) if part.alive is None else part.alive
            place = torch.full((len(part.videos),), -1)
            live = part.live_videos
            place[slice(None) if part.live is None else part.live] = torch.arange(len(live))
            rows.append(place[part.video[alive]] + len(videos))
            spans.append(part.spans[alive])
            embeddings.append(part.embeddings[alive])
            videos += live
        joined = torch.cat(embeddings)
        background = Background.of(bank, _blocks(joined))
        part = Part(videos, torch.cat(rows), torch.cat(spans), joined, background)
        part.write(path, self.key)
        for old in small:
            if old.path is not None:
                old.path.unlink(missing_ok=True)
        self.parts = [p for p in self.parts if not any(p is old for old in small)] + [part]

    def search(self, query: Tensor, count: int, among: Among | None = None) -> list[Hit]:
        """Find the windows nearest to a query, best first; ties in the order of the index.

        A window that overlaps a better one of the same video is left out.

        Args:
            query: (E,) L2-normalised.
            count: How many to return at most.
            among: Which windows are meant; the mean that a hit stands out from is that of all.
        """
        number = count * _CANDIDATES
        moments = Moments()
        best: list[tuple[float, int, int]] = []  # score, part, row
        for place, part in enumerate(self.parts):
            scores = torch.cat([block @ query for block in _blocks(part.embeddings)])
            moments.add(scores if part.alive is None else scores[part.alive])
            meant = part.rows(among or Among())
            if meant is not None:
                scores = scores.masked_fill(~meant, -torch.inf)
            top = torch.topk(scores, min(number, len(scores)))
            rows = zip(top.values.tolist(), top.indices.tolist(), strict=True)
            best += [(score, place, row) for score, row in rows]
        best = sorted(best, key=lambda found: (-found[0], *found[1:]))[:number]
        return self._distinct(best, moments, count)

    def _distinct(
        self, best: Iterable[tuple[float, int, int]], moments: Moments, count: int
    ) -> list[Hit]:
        hits: list[Hit] = []
        for score, place, row in best:
            if len(hits) == count or score == -torch.inf:
                break
            part = self.parts[place]
            start_s, end_s = part.spans[row].tolist()
            window = Window(self.folder / part.videos[int(part.video[row])].path, start_s, end_s)
            if not any(_overlap(window, hit.window) for hit in hits):
                hits.append(Hit(window, score, moments.z(score)))
        return hits

    def background(self) -> Background | None:
        """How the bank's sentences score on the whole index; None where it is empty."""
        return Background.joined([part.background for part in self.parts])


def _blocks(embeddings: Tensor) -> Iterable[Tensor]:
    """Float32 blocks of rows."""
    for start in range(0, max(1, len(embeddings)), _BLOCK):
        yield embeddings[start : start + _BLOCK].float()


def _describe(path: Path, name: str, problem: str | None) -> IndexedVideo:
    try:
        status = path.stat()
    except OSError as error:  # a dangling link
        return IndexedVideo(name, 0, 0, problem or str(error))
    return IndexedVideo(name, status.st_mtime_ns, status.st_size, problem)


def _overlap(a: Window, b: Window) -> bool:
    return a.video == b.video and a.start_s < b.end_s and b.start_s < a.end_s
