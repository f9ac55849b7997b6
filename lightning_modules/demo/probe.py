"""What the demo's model has learnt: accuracies of verbs and nouns, and frames for its report."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.module import StreamDataModule
from datamodules.relevance import relevance_matrix
from datamodules.stream.clips import Narration
from datamodules.tokenizer import Tokenizer
from lightning_modules.checkpoints.conversion import load_model
from lightning_modules.demo.world.vocabulary import COLOURS, NOUNS, VERBS, imperative, is_test_only


class Probe:
    """A trained model on the demo world's test split.

    Args:
        run_dir: The run that was tested; its `test.yaml` describes the model.
        checkpoint: Its checkpoint.
        data: The retrieval DataModule.
    """

    def __init__(self, run_dir: Path, checkpoint: Path, data: StreamDataModule) -> None:
        self.loaded = load_model(checkpoint, config=run_dir / "test.yaml")
        clips, _ = data.test_dataloader()
        batches = list(clips)
        keep = [batch.mask for batch in batches]

        def whole(name: str) -> Tensor:
            parts = [getattr(b, name)[m] for b, m in zip(batches, keep, strict=True)]
            width = max(part.shape[1] for part in parts) if parts[0].ndim == 2 else 0
            if not width:
                return torch.cat(parts)
            padded = [torch.nn.functional.pad(p, (0, width - p.shape[1]), value=-1) for p in parts]
            return torch.cat(padded)

        order = whole("clip_index").argsort()
        self.video = whole("video")[order]  # (V, 3, T, H, W) uint8
        self.verbs = whole("verb_classes")[order]  # (V, 1)
        self.nouns = whole("noun_classes")[order]  # (V, 2), padded with -1
        split = data.test_split or data.val_split
        assert split is not None
        self.sentences: list[Narration] = split.sentences()
        self.tokenizer = Tokenizer()

    @property
    def chance(self) -> dict[str, float]:
        """Accuracies of a guess, in percent."""
        held = (self.nouns >= 0).sum(1).float().mean().item()
        return {"verb": 100 / len(VERBS), "noun": round(100 * held / len(NOUNS), 2)}

    @property
    def narrations(self) -> list[str]:
        """What each clip shows, in words."""
        return [imperative(int(v), n) for v, n in zip(self.verbs[:, 0], self._nouns, strict=True)]

    @cached_property
    def _nouns(self) -> list[list[int]]:
        return [[int(noun) for noun in row if noun >= 0] for row in self.nouns]

    def relevance(self) -> np.ndarray:
        """(V, S) relevance of the test clips to the test sentences."""
        verbs = [sentence.verb_classes[0] for sentence in self.sentences]
        nouns = [list(sentence.noun_classes) for sentence in self.sentences]
        return relevance_matrix(self.verbs, self.nouns, torch.tensor(verbs), nouns).numpy()

    def similarity(self) -> np.ndarray:
        """(V, S) cosine similarities of the test clips to the test sentences."""
        texts = [sentence.text for sentence in self.sentences]
        return (self._embed_clips(self.video) @ self._embed_texts(texts).T).numpy()

    def accuracies(self, *, shuffled: bool = False, seed: int = 0) -> dict[str, Any]:
        """Accuracies in percent of naming the verb, and a noun, of each test clip.

        A clip is compared with a prompt for every verb and noun (`open red box`). The verb with the
        highest mean over nouns, and the noun with the highest mean over verbs, are the answers; a
        noun counts if it is one of the clip's; its colour and its object count by themselves too.

        Args:
            shuffled: Put each clip's frames in a random order that is not the true one.
            seed: Of that order.
        """
        video = _shuffle_frames(self.video, seed) if shuffled else self.video
        prompts = [imperative(v, [n]) for v in range(len(VERBS)) for n in range(len(NOUNS))]
        scores = self._embed_clips(video) @ self._embed_texts(prompts).T
        table = scores.view(-1, len(VERBS), len(NOUNS))
        verb = table.mean(2).argmax(1) == self.verbs[:, 0]
        named = table.mean(1).argmax(1)[:, None]
        held, colours = self.nouns >= 0, len(COLOURS)
        noun = (named == self.nouns).any(1)
        unseen = torch.tensor(
            [
                any(is_test_only(int(v), n) for n in row)
                for v, row in zip(self.verbs[:, 0], self._nouns, strict=True)
            ]
        )
        return {
            "verb": _percent(verb),
            "noun": _percent(noun),
            "colour": _percent(((named % colours == self.nouns % colours) & held).any(1)),
            "object": _percent(((named // colours == self.nouns // colours) & held).any(1)),
            "num_unseen": int(unseen.sum()),
            "unseen_verb": _percent(verb[unseen]),
            "unseen_noun": _percent(noun[unseen]),
        }

    def frames(self, rows: list[int]) -> dict[int, np.ndarray]:
        """(T, H, W, 3) uint8 frames of some clips, as the model sees them."""
        return {row: self.video[row].permute(1, 2, 3, 0).numpy() for row in rows}

    def model_facts(self) -> dict[str, Any]:
        """Size of the model."""
        vision = self.loaded.config.vision
        return {
            "preset": "eva02_at_tiny",
            "parameters": sum(p.numel() for p in self.loaded.model.parameters()),
            "video_parameters": sum(p.numel() for p in self.loaded.model.visual.parameters()),
            "num_frames": vision.num_frames,
            "image_size": vision.image_size,
            "temporal": vision.temporal,
        }

    @torch.inference_mode()
    def _embed_clips(self, video: Tensor) -> Tensor:
        return torch.cat([self.loaded.model.encode_video(part) for part in video.split(48)])

    @torch.inference_mode()
    def _embed_texts(self, texts: list[str]) -> Tensor:
        return torch.cat(
            [self.loaded.model.encode_text(part) for part in self.tokenizer(texts).split(64)]
        )


def _shuffle_frames(video: Tensor, seed: int) -> Tensor:
    """Each clip's frames in a random order other than the true one: (V, 3, T, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    num_frames = video.shape[2]
    identity = torch.arange(num_frames)
    shuffled = video.clone()
    for clip in shuffled:
        order = identity
        while num_frames > 1 and torch.equal(order, identity):
            order = torch.randperm(num_frames, generator=generator)
        clip.copy_(clip[:, order].clone())
    return shuffled


def _percent(hits: Tensor) -> float | None:
    return round(100 * hits.float().mean().item(), 1) if len(hits) else None
