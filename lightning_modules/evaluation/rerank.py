"""Two-stage retrieval: what a dual encoder places first is looked at again, pair by pair.

A query's candidates are its K nearest: sentences of a clip, clips of a sentence. A pair is looked
at once, whichever direction wants it, by the rank that has embedded its clip: patches never travel.
Each direction then has a matrix of its own,

    S'_ij = S_ij + W p_ij,    p_ij = 0 where (i, j) is no candidate of the query

and p lies in (0, 1), so that the K nearest stay before what was not looked at. One matrix for both
would let the other side's candidates in: whether a clip's sentence is looked at would then depend
on the other clips that ask.

Shape legend: V clips, S sentences, M places of a clip, L words, W channels of the head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_modules.evaluation.interface import Benchmark
from lightning_modules.evaluation.predictors import DualEncoderPredictor, Predictor, SecondStage
from lightning_modules.losses.gather import gather_no_gradient
from lightning_modules.models.rerank import ReRanker, words_of

_AT_A_TIME = 256  # sentences that a clip meets in one pass


@dataclass(frozen=True)
class RerankOptions:
    """How a re-ranker takes part.

    Attributes:
        top: K; 0 leaves the dual encoder's matrix as it is.
        blend: W, at least 0; chosen, as K is, on clips held out of training (`eva02-at tune`).
    """

    top: int = 50
    blend: float = 1.0

    def __post_init__(self) -> None:
        if self.top < 0 or not (math.isfinite(self.blend) and self.blend >= 0):
            raise ValueError(
                f"re-ranking the top {self.top} with blend {self.blend} given; both are at least 0"
            )

    def __str__(self) -> str:
        return f"top {self.top} re-ranked with blend {self.blend:g}"


class RerankPredictor(Predictor):
    """A dual encoder with a second look.

    Args:
        first: The dual encoder's predictor.
        reranker: In evaluation mode, on the same device.
        options: How it takes part.
    """

    has_texts = True

    def __init__(
        self, first: DualEncoderPredictor, reranker: ReRanker, options: RerankOptions
    ) -> None:
        self.first, self.reranker, self.options = first, reranker, options
        self.width = first.width
        self._fresh: tuple[Tensor, ...] = ()  # of the batch just encoded
        self._places: dict[int, Tensor] = {}  # clip_index -> (M, W), this rank's
        self._words: list[tuple[Tensor, Tensor, Tensor]] = []  # index, words, mask; this rank's

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return self.first.device

    def encode_clips(self, video: Tensor) -> Tensor:
        """The dual encoder's embeddings, to the bit; the patches wait for `keep_clips`."""
        if not self.options.top:
            return self.first.encode_clips(video)
        embeddings, patches = self.first.model.encode_video_with_patches(video)
        self._fresh = (self.reranker.places(patches),)
        return embeddings

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """The dual encoder's embeddings, to the bit; the words wait for `keep_texts`."""
        if not self.options.top:
            return self.first.encode_texts(tokens)
        embeddings, words = self.first.model.encode_text_with_words(tokens)
        self._fresh = self.reranker.words(words), words_of(tokens)
        return embeddings

    def keep_clips(self, index: Tensor, mask: Tensor) -> None:
        """Keep the batch's places in the host's memory."""
        fresh, self._fresh = self._fresh, ()
        for places in fresh:
            kept = zip(index[mask].tolist(), places.detach()[mask].cpu(), strict=True)
            self._places.update(kept)

    def keep_texts(self, index: Tensor, mask: Tensor) -> None:
        """Keep the batch's words."""
        fresh, self._fresh = self._fresh, ()
        if fresh:
            words, known = (part.detach()[mask] for part in fresh)
            self._words.append((index.to(words.device)[mask], words, known))

    def mean(self, views: Sequence[Tensor]) -> Tensor:
        """Patches of several views have no mean.

        Raises:
            ValueError: Always.
        """
        raise ValueError("a re-ranker looks at one view of a clip: leave out --views and --flip")

    def check(self, benchmark: Benchmark) -> None:
        """The benchmark compares every clip with every text, and has as many as are asked for.

        Raises:
            ValueError: It does not, or has not.
        """
        if not benchmark.compares_all:
            raise ValueError(
                f"benchmark {benchmark.name} does not rank every clip against every text, so there "
                "is nothing to re-rank; that is for ek100_mir and text_video"
            )
        clips, texts = len(benchmark.clip_ids), len(benchmark.prompts)
        if self.options.top > min(clips, texts):
            raise ValueError(
                f"the top {self.options.top} are to be re-ranked, but benchmark {benchmark.name} "
                f"has {clips:,} clips and {texts:,} texts; at most {min(clips, texts):,}"
            )

    def predict(self, benchmark: Benchmark, clips: Tensor, texts: Tensor) -> Tensor:
        """The dual encoder's."""
        return self.first.predict(benchmark, clips, texts)

    @torch.no_grad()
    def refine(self, prediction: Tensor, place: Tensor) -> tuple[Tensor, SecondStage | None]:
        """Look again at the candidates, on all ranks together.

        Args:
            prediction: (V, S) of `predict`; rows of NaN are clips that are missing.
            place: (V,) the `clip_index` of each row, -1 where there is none.
        """
        if not self.options.top:
            return prediction, None
        by_clip, by_text = candidates(prediction, self.options.top)
        chosen = by_clip | by_text
        words, known = self._all_words(prediction.shape[1])
        began = time.monotonic()
        flat, values = [], []
        for row, clip in enumerate(place.tolist()):
            if clip not in self._places:
                continue
            texts = chosen[row].nonzero().squeeze(1)
            flat.append(texts + row * prediction.shape[1])
            places = self._places[clip].to(self.device)[None]
            for part in texts.to(self.device).split(_AT_A_TIME):
                logits = self.reranker(places, words[part], known[part], torch.zeros_like(part))
                values.append(logits.float().sigmoid())
        empty = torch.empty(0, device=self.device)
        own = torch.cat([empty.long(), *(part.to(self.device) for part in flat)])
        scored = gather_no_gradient(torch.cat([empty, *values])).cpu()
        seconds = time.monotonic() - began
        scores = torch.zeros_like(prediction)
        scores.view(-1)[gather_no_gradient(own).cpu()] = scored
        gain = self.options.blend * scores
        stage = SecondStage(
            scores,
            prediction + gain * by_clip,
            prediction + gain * by_text,
            str(self.options),
            len(scored),
            seconds,
        )
        return prediction + gain, stage

    def _all_words(self, total: int) -> tuple[Tensor, Tensor]:
        """(S, L, W) and (S, L) of all ranks, L being the longest sentence's."""
        device = self.device
        longest = max([1, *(int(known.sum(1).max()) for *_, known in self._words if len(known))])
        kind = self.reranker.query.dtype if not self._words else self._words[0][1].dtype
        index = torch.empty(0, dtype=torch.int64, device=device)
        words = torch.empty(0, longest, self.reranker.config.width, dtype=kind, device=device)
        known = torch.empty(0, longest, dtype=torch.int64, device=device)
        for one, row, mask in self._words:
            index = torch.cat([index, one])
            words = torch.cat([words, row[:, :longest]])
            known = torch.cat([known, mask[:, :longest].long()])
        index, words, known = (
            gather_no_gradient(part, padding=0) for part in (index, words, known)
        )
        table = words.new_zeros(total, *words.shape[1:])
        mask = torch.zeros(total, known.shape[1], dtype=torch.bool, device=device)
        table[index], mask[index] = words, known.bool()
        return table, mask


def candidates(similarity: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Two (V, S) bool: the `top` nearest of each row, and of each column; never a NaN."""
    known = ~similarity.isnan()
    filled = similarity.masked_fill(~known, -torch.inf)

    def nearest(side: int) -> Tensor:
        places = filled.topk(min(top, filled.shape[side]), dim=side).indices
        return torch.zeros_like(known).scatter_(side, places, True) & known

    return nearest(1), nearest(0)
