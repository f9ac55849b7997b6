"""A re-ranker in search: the first hits of a query are decoded and looked at again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from datamodules.video.windows import Window, read_windows
from lightning_modules.inference.embedding import Embedder
from lightning_modules.inference.search_index import Hit
from lightning_modules.models.rerank import ReRanker, words_of


@dataclass(frozen=True)
class SecondLook:
    """What looks again.

    Attributes:
        embedder: The dual encoder's, as the index was made with.
        reranker: Its re-ranker, on the same device.
        top: Hits of a query that are looked at.
        blend: What a second look counts beside the cosine.
    """

    embedder: Embedder
    reranker: ReRanker
    top: int
    blend: float

    @torch.inference_mode()
    def again(self, query: str, hits: Sequence[Hit]) -> list[Hit]:
        """Reorder a query's first hits by cosine + blend * p.

        The others follow as they came, and so does among the first what cannot be decoded: p is 0
        for it. How far a hit stands out (`z`) stays that of its cosine.

        Args:
            query: The sentence, in its template.
            hits: Best first.
        """
        first = list(hits[: self.top])
        device = self.embedder.options.device
        tokens = self.embedder.tokenizer([query]).to(device)
        tokens = tokens[:, : int(words_of(tokens).sum())]
        _, words = self.embedder.model.encode_text_with_words(tokens)
        known = self.reranker.words(words), words_of(tokens)
        told: dict[Window, float] = {}
        options = self.embedder.options
        for read, clips, _ in read_windows(
            sorted((hit.window for hit in first), key=lambda w: (str(w.video), w.start_s)),
            self.embedder.num_frames,
            self.embedder.image_size,
            options.num_workers,
            options.batch_size,
            options.limits,
        ):
            if not read:
                continue
            _, patches = self.embedder.model.encode_video_with_patches(clips.to(device))
            pairs = (part.expand(len(read), *part.shape[1:]) for part in known)
            order = torch.arange(len(read), device=device)
            logits = self.reranker(self.reranker.places(patches), *pairs, order)
            told |= dict(zip(read, logits.float().sigmoid().tolist(), strict=True))
        looked = [replace(h, score=h.score + self.blend * told.get(h.window, 0.0)) for h in first]
        looked.sort(key=lambda hit: -hit.score)  # stable
        return [*looked, *hits[self.top :]]
