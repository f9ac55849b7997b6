"""Which queries the gallery shows, and the clips the model finds for them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from lightning_modules.demo.report.results import DemoResults

# Sentences of one verb share at least that verb's clips; others share a few clips of one noun.
_ALIKE = 1 / 3
_FRAMES = 4
_HEIGHT = 120  # pixels: about twice the height on the page, for fine screens


@dataclass(frozen=True)
class Hit:
    """A clip that was found.

    Attributes:
        rank: From 1.
        narration: What the clip shows.
        similarity: Cosine.
        relevance: In [0, 1].
        strip: JPEGs in base64 of some of its frames, in order; empty where none were given.
    """

    rank: int
    narration: str
    similarity: float
    relevance: float
    strip: list[str]

    @property
    def kind(self) -> str:
        """The mark's style: fully relevant, in part, not at all."""
        if self.relevance > 0.999:
            return "full"
        return "part" if self.relevance > 0 else "none"


@dataclass(frozen=True)
class Query:
    """A sentence and the clips found for it."""

    sentence: str
    hits: list[Hit]


def gallery_rows(
    similarity: np.ndarray,
    relevance: np.ndarray,
    num_queries: int = 6,
    top: int = 5,
    seed: int = 0,
) -> list[tuple[int, list[int]]]:
    """Draw queries that differ in what is relevant to them, with their most similar clips.

    Sentences are drawn at random, and one that shares over a third of its relevant clips with one
    already drawn (as those of the same verb do) waits until no other is left. The similarity has
    no say in the choice of queries, so that good and bad answers are shown as they come.

    Args:
        similarity: (V, S), clips by sentences.
        relevance: (V, S) in [0, 1].
        num_queries: How many sentences; fewer where there are fewer.
        top: Clips a sentence.
        seed: Of the draw.

    Returns:
        (sentence, its clips from the most similar on), as rows of the matrices.
    """
    order = np.random.default_rng(seed).permutation(similarity.shape[1])
    relevant = relevance >= 0.5  # the verb agrees, or all nouns do
    chosen: list[int] = []
    waiting: list[int] = []
    for sentence in order.tolist():
        alike = any(_overlap(relevant[:, sentence], relevant[:, c]) > _ALIKE for c in chosen)
        (waiting if alike else chosen).append(sentence)
    drawn = (chosen + waiting)[:num_queries]
    return [(s, np.argsort(-similarity[:, s], kind="stable")[:top].tolist()) for s in drawn]


def _overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard's index of two sets of clips."""
    return float((a & b).sum() / max(1, (a | b).sum()))


def gallery(results: DemoResults) -> list[Query]:
    """The queries of `gallery_rows` with what the page needs of each clip."""
    return [
        Query(
            results.sentences[sentence],
            [_hit(results, rank, clip, sentence) for rank, clip in enumerate(clips, start=1)],
        )
        for sentence, clips in gallery_rows(results.similarity, results.relevance)
    ]


def _hit(results: DemoResults, rank: int, clip: int, sentence: int) -> Hit:
    frames = results.frames.get(clip)
    return Hit(
        rank=rank,
        narration=results.narrations[clip],
        similarity=float(results.similarity[clip, sentence]),
        relevance=float(results.relevance[clip, sentence]),
        strip=[] if frames is None else _strip(frames),
    )


def _strip(frames: np.ndarray) -> list[str]:
    """Up to four frames, the first and the last among them."""
    picked = np.linspace(0, len(frames) - 1, min(_FRAMES, len(frames))).round().astype(int)
    return [_jpeg(frames[index]) for index in picked]


def _jpeg(frame: np.ndarray) -> str:
    image = Image.fromarray(frame)
    image.thumbnail((10_000, _HEIGHT))  # smaller frames are not enlarged
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
