"""A folder's index, brought up to date and asked."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from datamodules.video.windows import Unreadable
from lightning_modules.checkpoints.conversion import LoadedModel
from lightning_modules.inference.embedding import Embedder, EmbedOptions
from lightning_modules.inference.search_index import Among, SearchIndex
from lightning_modules.inference.search_page import Answer, search_page
from lightning_modules.inference.second_look import SecondLook

INDEX_FOLDER = ".eva02-at"


@dataclass(frozen=True)
class FolderSearch:
    """A folder of videos that can be asked.

    Attributes:
        folder: The folder.
        loaded: The model.
        embedder: The same, ready to embed.
        index: Of the folder, up to date.
        told: In words, what was read.
        second_look: A re-ranker, if there is one.
    """

    folder: Path
    loaded: LoadedModel
    embedder: Embedder
    index: SearchIndex
    told: str
    second_look: SecondLook | None = None

    @property
    def unreadable(self) -> list[Unreadable]:
        """Videos that are not in the index, and why."""
        return [Unreadable(self.folder / v.path, v.problem) for v in self.index.videos if v.problem]

    def ask(
        self,
        queries: Sequence[str],
        top: int,
        template: str = "{}",
        among: Among | None = None,
    ) -> list[Answer]:
        """Answer queries.

        Args:
            queries: Sentences.
            top: Hits a query.
            template: Each query is put in here.
            among: Which windows are meant.
        """
        if not queries:
            return []
        texts = self.embedder.texts([template.replace("{}", query) for query in queries])
        background = self.index.background()
        answers = []
        for query, text in zip(queries, texts, strict=True):
            look = self.second_look
            hits = self.index.search(text, max(top, look.top if look else 0), among)
            if look is not None:
                hits = look.again(template.replace("{}", query), hits)[:top]
            sure = [background.surer_than(hit.z) if background else 0.0 for hit in hits]
            answers.append(Answer(query, hits, sure))
        return answers

    def page(self, answers: Sequence[Answer], num_workers: int) -> str:
        """Lay answers out as an HTML page with the frames in it."""
        facts = (
            f"{len(self.index)} windows of {len(self.index.videos)} videos, "
            f"{self.loaded.source.path}"
        )
        problems = [
            f"{video.path}: {video.problem}" for video in self.index.videos if video.problem
        ]
        return search_page(list(answers), self.folder, facts, problems, num_workers)


def open_folder(
    folder: Path, loaded: LoadedModel, options: EmbedOptions, index_path: Path | None = None
) -> FolderSearch:
    """Load a folder's index and read what is new or changed.

    Args:
        folder: The videos.
        loaded: The model.
        options: How videos become windows; their rate is the index's.
        index_path: Where the index lies; a hidden folder beside the videos by default.

    Raises:
        ValueError: No video could be read.
    """
    embedder = Embedder(loaded, options)
    how = [embedder.num_frames, options.rate, options.window_s, options.dtype]
    key = hashlib.sha256(json.dumps([loaded.model_hash(), *how]).encode()).hexdigest()
    path = index_path or folder / INDEX_FOLDER / f"search-{key[:12]}"
    index = SearchIndex.load(path, folder, key)
    started = time.monotonic()
    with tqdm(unit="video", disable=None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        num_read = index.update(embedder, path, show)
    told = (
        f"index: {len(index)} windows of {len(index.videos)} videos, {num_read} read "
        f"now in {time.monotonic() - started:.1f} s"
    )
    return FolderSearch(folder, loaded, embedder, index, told)
