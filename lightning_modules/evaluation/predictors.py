"""What one kind of model makes of clips and texts, and how a benchmark's prediction follows.

The engine knows models by this interface alone. A re-ranker (`evaluation/rerank.py`) is a
predictor around another one: it keeps tokens while batches pass, and then looks again at the pairs
that come first.

Shape legend: B clips of a batch, T frames, W values that a clip (or text) becomes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.evaluation.interface import Benchmark
from lightning_modules.models import DualEncoder, VideoClassifier
from lightning_modules.models.dual_encoder import MAX_LOG_SCALE


@dataclass(frozen=True)
class SecondStage:
    """What a second look at some pairs was.

    Attributes:
        scores: (clips, texts) in (0, 1); 0 where nobody looked.
        by_clip: What clips rank the texts by: of their own candidates alone.
        by_text: What texts rank the clips by, rows and columns as there.
        how: In words.
        num_pairs: Pairs looked at, over all ranks.
        seconds: What that took.
    """

    scores: Tensor
    by_clip: Tensor
    by_text: Tensor
    how: str
    num_pairs: int
    seconds: float

    def __str__(self) -> str:
        speed = self.num_pairs / max(self.seconds, 1e-9)
        return f"{self.how}: {self.num_pairs:,} pairs in {self.seconds:.1f} s, {speed:,.0f} pairs/s"


class Predictor(ABC):
    """A model behind the engine's interface.

    Attributes:
        width: W.
        has_texts: Whether it takes texts at all.
    """

    width: int
    has_texts: bool

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where its parameters are."""

    @abstractmethod
    def encode_clips(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) uint8 to (B, W), float32 at least."""

    @abstractmethod
    def encode_texts(self, tokens: Tensor) -> Tensor:
        """(B, L) token ids to (B, W), float32 at least."""

    def keep_clips(self, index: Tensor, mask: Tensor) -> None:  # noqa: B027
        """Keep, on this rank, what `refine` wants of the clips just encoded.

        Args:
            index: (B,) their `clip_index`.
            mask: (B,) bool, False for rows that are padding.
        """

    def keep_texts(self, index: Tensor, mask: Tensor) -> None:  # noqa: B027
        """The same of the texts just encoded and their `text_index`."""

    def refine(self, prediction: Tensor, place: Tensor) -> tuple[Tensor, SecondStage | None]:
        """Look again at a prediction, on all ranks together.

        Args:
            prediction: Of `predict`.
            place: The `clip_index` of each of the benchmark's clips, -1 for one that is missing.
        """
        return prediction, None

    @abstractmethod
    def mean(self, views: Sequence[Tensor]) -> Tensor:
        """What several views of the same clips, each (B, W), amount to."""

    @abstractmethod
    def check(self, benchmark: Benchmark) -> None:
        """Refuse a benchmark that this model cannot be measured by.

        Raises:
            ValueError: It is one.
        """

    @abstractmethod
    def predict(self, benchmark: Benchmark, clips: Tensor, texts: Tensor) -> Tensor:
        """Turn the benchmark's clips (NaN where missing) and texts into its prediction."""


class DualEncoderPredictor(Predictor):
    """Embeddings of clips and texts, which every benchmark compares in its own way."""

    has_texts = True

    def __init__(self, model: DualEncoder) -> None:
        self.model = model
        self.width = model.config.embed_dim

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return self.model.logit_scale.device

    def encode_clips(self, video: Tensor) -> Tensor:
        """L2-normalised embeddings."""
        return self.model.encode_video(video)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """L2-normalised embeddings."""
        return self.model.encode_text(tokens)

    def mean(self, views: Sequence[Tensor]) -> Tensor:
        """The mean embedding, normalised."""
        return F.normalize(torch.stack(list(views)).mean(dim=0), dim=-1)

    def check(self, benchmark: Benchmark) -> None:
        """Any benchmark will do."""

    def predict(self, benchmark: Benchmark, clips: Tensor, texts: Tensor) -> Tensor:
        """As the benchmark says."""
        scale = 1.0
        if benchmark.needs_scale:
            scale = self.model.logit_scale.detach().float().clamp(0, MAX_LOG_SCALE).exp().item()
        return benchmark.predict(clips, texts, scale)


class ClassifierPredictor(Predictor):
    """Logits of classes from a head of the model's own, for a benchmark with just these classes."""

    has_texts = False

    def __init__(self, model: VideoClassifier) -> None:
        self.model = model
        self.width = model.num_classes

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.model.parameters()).device

    def encode_clips(self, video: Tensor) -> Tensor:
        """Logits."""
        return self.model(video)

    def encode_texts(self, tokens: Tensor) -> Tensor:
        """There is no text tower."""
        raise NotImplementedError

    def mean(self, views: Sequence[Tensor]) -> Tensor:
        """The logarithm of the mean probability."""
        return torch.stack([view.log_softmax(dim=-1) for view in views]).logsumexp(dim=0)

    def check(self, benchmark: Benchmark) -> None:
        """The benchmark's classes must be as many as the head's.

        Raises:
            ValueError: They are not, or it has none.
        """
        if benchmark.num_classes != self.width:
            has = "no classes" if benchmark.num_classes is None else f"{benchmark.num_classes}"
            raise ValueError(
                f"the checkpoint names one of {self.width} classes and has no text tower, while "
                f"benchmark {benchmark.name} has {has}; measure it by ek100_cls, with the "
                "annotations that it was trained on"
            )

    def predict(self, benchmark: Benchmark, clips: Tensor, texts: Tensor) -> Tensor:
        """The logits themselves."""
        return clips


def predictor_of(model: DualEncoder | VideoClassifier) -> Predictor:
    """The predictor of a model, by its kind."""
    if isinstance(model, VideoClassifier):
        return ClassifierPredictor(model)
    return DualEncoderPredictor(model)
