"""What a multi-instance retrieval figure is worth: a blind oracle, signs of a leak, and where it
comes from.

The benchmark's relevance is made from the classes of the captions, so a system that sees a test
clip's own caption, in whatever way, scores far above what video can give. Three checks tell:

- The **blind oracle** ranks sentences by the words that they share with the clip's own caption,
  without any video. A figure near or above it wants an explanation.
- The **pairing signal**: among clips whose classes are the same, every caption is equally relevant
  to each. How much more similar is a clip to its own caption than to the others', and than the
  other clips are to it? Captions are permuted among such clips to see what chance gives. A model
  that was given the pairing knows its own caption almost always; an honest one seldom.
- **Duplicates**: test clips whose bytes, or whose seconds of video, are in the training set.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.annotations.epic import RetrievalClip, Sentence
from datamodules.manifest import Manifest
from lightning_modules.evaluation.benchmarks.ek100_mir import (
    RetrievalAnnotations,
    scores_as_metrics,
)
from lightning_modules.evaluation.intervals import bootstrap
from lightning_modules.metrics.functional import MultiInstanceScores

_PERMUTATIONS = 200
# The share of own captions found first, beyond chance, from which a leak is the likely cause. What
# captions of equal classes differ in and video shows (a colour, a side) stays far below.
LEAK_ABOVE = 0.3


def blind_oracle(clips: Sequence[RetrievalClip], sentences: Sequence[Sentence]) -> Tensor:
    """Similarity of each clip's own caption to each sentence: cosine of their sets of words.

    Returns:
        (clips, sentences) float32.
    """
    vocabulary: dict[str, int] = {}

    def rows(texts: Sequence[str]) -> list[list[int]]:
        return [
            [vocabulary.setdefault(word, len(vocabulary)) for word in set(_words(text))]
            for text in texts
        ]

    own, other = rows([c.narration for c in clips]), rows([s.text for s in sentences])

    def matrix(words: list[list[int]]) -> Tensor:
        found = torch.zeros(len(words), max(1, len(vocabulary)))
        for row, columns in enumerate(words):
            found[row, columns] = 1.0
        return torch.nn.functional.normalize(found, dim=1)

    return matrix(own) @ matrix(other).T


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@dataclass(frozen=True)
class PairingSignal:
    """Whether a similarity matrix knows which caption belongs to which clip.

    Attributes:
        own_first: Share of clips whose own caption is the most similar of those of equal classes,
            each column centred over the clips of the same classes.
        chance: The same with captions permuted among such clips, mean of the permutations.
        chance_high: The permutations' greatest.
        num_clips: Clips that have others, and captions, of the same classes.
    """

    own_first: float
    chance: float
    chance_high: float
    num_clips: int

    @property
    def excess(self) -> float:
        """Beyond chance."""
        return self.own_first - self.chance

    @property
    def is_leak(self) -> bool:
        """True where it cannot be chance and is more than video usually tells."""
        return self.own_first > self.chance_high and self.excess > LEAK_ABOVE


def pairing_signal(
    similarity: Tensor,
    clips: Sequence[RetrievalClip],
    sentences: Sequence[Sentence],
    seed: int = 0,
) -> PairingSignal | None:
    """Look for the pairing in a matrix.

    Args:
        similarity: (clips, sentences), no NaN.
        clips: Rows.
        sentences: Columns.
        seed: Of the permutations.

    Returns:
        None where no clip has others of the same classes with other captions.
    """
    column_of = {sentence.text: column for column, sentence in enumerate(sentences)}
    groups: dict[tuple[int, frozenset[int]], list[int]] = {}
    for row, clip in enumerate(clips):
        if clip.narration in column_of:
            key = clip.verb_class, frozenset(clip.all_noun_classes)
            groups.setdefault(key, []).append(row)
    draw = np.random.default_rng(seed)
    hits, total = 0, 0
    permuted = np.zeros(_PERMUTATIONS)
    for rows in groups.values():
        own_columns = [column_of[clips[row].narration] for row in rows]
        columns = sorted(set(own_columns))
        if len(columns) < 2:
            continue
        block = similarity[rows][:, columns].double()
        # a caption that is near every clip of its classes tells nothing of the pairing
        first = (block - block.mean(0)).argmax(1).numpy()
        own = np.searchsorted(columns, own_columns)
        hits += int((first == own).sum())
        total += len(rows)
        for trial in range(_PERMUTATIONS):
            permuted[trial] += (first == draw.permutation(own)).sum()
    if not total:
        return None
    shares = permuted / total
    return PairingSignal(hits / total, float(shares.mean()), float(shares.max()), total)


@dataclass(frozen=True)
class Duplicates:
    """Test clips that the training set holds too.

    Attributes:
        same_bytes: Clips whose stored bytes are in the training shards; None if those were not
            given.
        same_seconds: Clips that overlap a training clip of the same video.
        examples: A few of them, in words.
    """

    same_bytes: int | None
    same_seconds: int
    examples: list[str]


def find_duplicates(
    train: Sequence[RetrievalClip],
    test: Sequence[RetrievalClip],
    train_manifest: Manifest | None = None,
    test_manifest: Manifest | None = None,
) -> Duplicates:
    """Find test clips that were trained on."""
    spans: dict[str, list[tuple[float, float, str]]] = {}
    for clip in train:
        spans.setdefault(clip.video_id, []).append((clip.start_s, clip.stop_s, clip.narration_id))
    examples = []
    for clip in test:
        for start_s, stop_s, name in spans.get(clip.video_id, ()):
            if clip.start_s < stop_s and start_s < clip.stop_s:
                examples.append(f"{clip.narration_id} overlaps {name} in {clip.video_id}")
                break
    same_seconds, same_bytes = len(examples), None
    if train_manifest is not None and test_manifest is not None:
        known = _checksums(train_manifest)
        same = [known[key] + f" is {name}" for key, name in _checksums(test_manifest).items()
                if key in known]  # fmt: skip
        same_bytes, examples = len(same), same + examples
    return Duplicates(same_bytes, same_seconds, examples[:5])


def _checksums(manifest: Manifest) -> dict[tuple[int, int], str]:
    """(bytes, CRC32) of each stored clip, and its name."""
    found = {}
    for number in range(len(manifest.shards)):
        index = manifest.load_index(number)
        for row in range(len(index)):
            stored = index.rows[row]
            found[int(stored["video_bytes"]), int(stored["crc32"])] = index.record(row).clip_id
    return found


def by_kind(
    scores: MultiInstanceScores,
    clips: Sequence[RetrievalClip],
    train: Sequence[RetrievalClip] | None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Video-to-text mAP and nDCG of kinds of clips, in percent with 95 % intervals.

    Args:
        scores: Of all clips, in their order.
        clips: The queries.
        train: Tells which action classes are rare; None leaves that out.

    Returns:
        kind -> group -> `num_clips`, `map`, `map_interval`, `ndcg`, `ndcg_interval`.
    """
    kinds: dict[str, Callable[[RetrievalClip], str]] = {
        "number of nouns": lambda c: (
            str(min(3, len(set(c.all_noun_classes))))
            + ("+" if len(set(c.all_noun_classes)) >= 3 else "")
        ),
        "seconds": lambda c: _length(c.stop_s - c.start_s),
    }
    if train is not None:
        seen = Counter((clip.verb_class, clip.noun_class) for clip in train)
        kinds["training clips of the action"] = lambda c: _rarity(seen[c.verb_class, c.noun_class])
    values = {
        "map": scores.v2t.query_map.double().numpy(),
        "ndcg": scores.v2t.query_ndcg.double().numpy(),
    }
    result: dict[str, dict[str, dict[str, Any]]] = {}
    for kind, group_of in kinds.items():
        groups: dict[str, list[int]] = {}
        for row, clip in enumerate(clips):
            groups.setdefault(group_of(clip), []).append(row)
        result[kind] = {name: _figures(values, rows) for name, rows in sorted(groups.items())}
    return result


def _figures(values: dict[str, np.ndarray], rows: list[int]) -> dict[str, Any]:
    figures: dict[str, Any] = {"num_clips": len(rows)}
    for name, of_all in values.items():
        part = of_all[rows]
        known = part[~np.isnan(part)]
        mean = 100 * float(known.mean()) if len(known) else float("nan")
        figures[name] = mean
        figures[f"{name}_interval"] = bootstrap([part.tolist()], mean)
    return figures


def _length(seconds: float) -> str:
    for limit, name in ((1.0, "0-1"), (3.0, "1-3"), (10.0, "3-10")):
        if seconds < limit:
            return name
    return "over 10"


def _rarity(count: int) -> str:
    for limit, name in ((1, "0"), (10, "1-9"), (100, "10-99")):
        if count < limit:
            return name
    return "100 and more"


@dataclass(frozen=True)
class Audit:
    """Everything that was found.

    Attributes:
        oracle: Metrics of the blind oracle.
        figures: Metrics of the matrix; None where there is none.
        pairing: See there.
        kinds: See `by_kind`.
        duplicates: See there; None without training annotations.
    """

    oracle: dict[str, Any]
    figures: dict[str, Any] | None
    pairing: PairingSignal | None
    kinds: dict[str, dict[str, dict[str, Any]]]
    duplicates: Duplicates | None

    @property
    def warnings(self) -> list[str]:
        """What speaks against the figures, in words; empty where nothing does."""
        told = []
        if self.figures is not None:
            for name in ("map", "ndcg"):
                value, oracle = self.figures[name]["avg"], self.oracle[name]["avg"]
                if value > oracle:
                    told.append(
                        f"{name} {value:.2f} is above the blind oracle's {oracle:.2f}: video "
                        "without captions is not known to give that"
                    )
        if self.pairing is not None and self.pairing.is_leak:
            told.append(
                f"{self.pairing.own_first:.1%} of clips know their own caption among those of "
                f"equal classes, {self.pairing.chance:.1%} by chance: the captions of test clips "
                "have reached the video side"
            )
        if self.duplicates is not None:
            if self.duplicates.same_bytes:
                told.append(f"{self.duplicates.same_bytes} test clips are in the training shards")
            if self.duplicates.same_seconds:
                told.append(
                    f"{self.duplicates.same_seconds} test clips overlap training clips of the same "
                    "video"
                )
        return told


def audit(
    annotations: RetrievalAnnotations,
    similarity: Tensor | None = None,
    train: RetrievalAnnotations | None = None,
    manifests: tuple[Manifest, Manifest] | None = None,
) -> Audit:
    """Audit a benchmark's data and, where given, a similarity matrix.

    Args:
        annotations: Of the split that the matrix is about.
        similarity: (clips, sentences); rows of NaN are missing clips.
        train: Training annotations, for rare classes and duplicates.
        manifests: Shards of training and of this split, for duplicates.
    """
    clips, sentences = annotations.clips, annotations.sentences
    oracle = scores_as_metrics(annotations.score(blind_oracle(clips, sentences)))
    figures, pairing, kinds = None, None, {}
    if similarity is not None:
        present = ~similarity.isnan().all(dim=1)
        kept = present.nonzero().flatten().tolist()
        scores = annotations.score(similarity, present)
        figures = scores_as_metrics(scores)
        there = [clips[row] for row in kept]
        pairing = pairing_signal(similarity[present], there, sentences)
        kinds = by_kind(scores, there, None if train is None else train.clips)
    duplicates = None
    if train is not None:
        duplicates = find_duplicates(train.clips, clips, *(manifests or (None, None)))
    return Audit(oracle, figures, pairing, kinds, duplicates)
