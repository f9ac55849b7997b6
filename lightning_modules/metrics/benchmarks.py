"""The other benchmarks' metrics over ranks and batches; each sample counts once, by its id."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_modules.metrics.functional.average_precision import charades_map
from lightning_modules.metrics.functional.choice import choice_correct, egomcq_accuracy
from lightning_modules.metrics.functional.recall import recall_summary, retrieval_ranks
from lightning_modules.metrics.functional.recognition import action_hits
from lightning_modules.metrics.sample_store import SampleStore, first_of_each, kept


class EgoMCQAccuracy(SampleStore):
    """Accuracy of EgoMCQ in percent, `inter` (type 1) and `intra` (type 2).

    Example:
        >>> import torch
        >>> from lightning_modules.metrics import EgoMCQAccuracy
        >>> metric = EgoMCQAccuracy()
        >>> similarity = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.7, 0.1]])
        >>> answer, types = torch.tensor([1, 1, 0]), torch.tensor([1, 2, 2])
        >>> metric.update(similarity, answer, types, index=torch.arange(3))
        >>> metric.compute()
        {'inter': 100.0, 'num_inter': 1, 'intra': 50.0, 'num_intra': 2}
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_rows("index", torch.int64)
        self.add_rows("types", torch.int64)
        self.add_rows("correct", torch.uint8)

    def update(
        self,
        similarity: Tensor,
        answer: Tensor,
        types: Tensor,
        index: Tensor,
        mask: Tensor | None = None,
    ) -> None:
        """Add a batch of questions.

        Args:
            similarity: (B, 5) similarity of each query text to its own five clips.
            answer: (B,) the right choice, 0-based.
            types: (B,) 1 = inter-video, 2 = intra-video.
            index: (B,) the questions' identities.
            mask: (B,) bool, False for rows that only pad the batch.

        Raises:
            ValueError: Shapes do not match, a similarity is NaN, or an answer is no choice.
        """
        similarity, answer, types, index = kept(mask, similarity, answer, types, index)
        self.append("correct", choice_correct(similarity, answer))
        self.append("types", types)
        self.append("index", index)

    def compute(self) -> dict[str, float]:
        """Return `inter` and `intra` in percent and their numbers of questions."""
        _, places = first_of_each(self.rows("index"))
        result = egomcq_accuracy(self.rows("correct")[places].bool(), self.rows("types")[places])
        return {
            name: value if name.startswith("num") else 100 * value for name, value in result.items()
        }


class CharadesMAP(SampleStore):
    """Charades' mean average precision over classes, in percent: `functional.charades_map`.

    Example:
        >>> import torch
        >>> from lightning_modules.metrics import CharadesMAP
        >>> metric = CharadesMAP()
        >>> scores = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.3, 0.9, 0.0]])
        >>> targets = torch.tensor([[1, 0, 0], [0, 1, 0], [1, 0, 0]])
        >>> metric.update(scores, targets, index=torch.arange(3))
        >>> metric.compute()
        {'map': 75.0, 'num_videos': 3, 'num_unlabelled': 0, 'num_excluded_classes': 1}
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_rows("index", torch.int64)
        self.add_rows("scores", torch.float32, ndim=2)
        self.add_rows("targets", torch.uint8, ndim=2)

    def update(
        self, scores: Tensor, targets: Tensor, index: Tensor, mask: Tensor | None = None
    ) -> None:
        """Add a batch of videos.

        Args:
            scores: (B, C) cosine similarities or logits.
            targets: (B, C) multi-hot, 0 or 1.
            index: (B,) the videos' identities.
            mask: (B,) bool, False for rows that only pad the batch.
        """
        scores, targets, index = kept(mask, scores, targets, index)
        self.append("scores", scores)
        self.append("targets", targets)
        self.append("index", index)

    def compute(self) -> dict[str, float]:
        """Return `map` in percent and what was left out of it.

        Raises:
            ValueError: Shapes differ, a score is NaN, or a target is neither 0 nor 1.
        """
        _, places = first_of_each(self.rows("index"))
        result = charades_map(self.rows("scores")[places], self.rows("targets")[places])
        return {
            "map": 100 * result.map,
            "num_videos": len(places),
            "num_unlabelled": result.num_unlabelled,
            "num_excluded_classes": result.num_excluded_classes,
        }


class ActionAccuracy(SampleStore):
    """EK-100 action recognition: top-1 and top-5 of action, verb and noun, in percent.

    Verbs and nouns by marginalising the action probabilities: `functional.action_hits`.

    Args:
        verb_of_action: (actions,) verb class of each action of the vocabulary.
        noun_of_action: (actions,) noun class of each action.
        kwargs: Further options of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> from lightning_modules.metrics import ActionAccuracy
        >>> metric = ActionAccuracy(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]))
        >>> logits = torch.tensor([[1.0, 0.9, 1.1]])  # action 2 by a hair, verb 0 by far
        >>> metric.update(logits, action=torch.tensor([0]), index=torch.tensor([7]))
        >>> result = metric.compute()
        >>> result["action_top1"], result["verb_top1"], result["noun_top1"]
        (0.0, 100.0, 0.0)
    """

    verb_of_action: Tensor
    noun_of_action: Tensor
    HITS = tuple(f"{name}_top{k}" for name in ("action", "verb", "noun") for k in (1, 5))

    def __init__(self, verb_of_action: Tensor, noun_of_action: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.register_buffer("verb_of_action", verb_of_action, persistent=False)
        self.register_buffer("noun_of_action", noun_of_action, persistent=False)
        self.add_rows("index", torch.int64)
        self.add_rows("hits", torch.uint8, ndim=2)

    def update(
        self, logits: Tensor, action: Tensor, index: Tensor, mask: Tensor | None = None
    ) -> None:
        """Add a batch of clips.

        Args:
            logits: (B, actions), scaled as the softmax wants them.
            action: (B,) the right action.
            index: (B,) the clips' identities.
            mask: (B,) bool, False for rows that only pad the batch.

        Raises:
            ValueError: Shapes do not match, or a logit is NaN.
        """
        logits, action, index = kept(mask, logits, action, index)
        hits = action_hits(logits, action, self.verb_of_action, self.noun_of_action)
        self.append("hits", torch.stack([hits[name] for name in self.HITS], dim=1))
        self.append("index", index)

    def compute(self) -> dict[str, float]:
        """Return the six accuracies in percent and `num_clips`."""
        _, places = first_of_each(self.rows("index"))
        means = self.rows("hits")[places].double().mean(dim=0).mul(100).tolist()
        return {**dict(zip(self.HITS, means, strict=True)), "num_clips": len(places)}


class TextVideoRecall(SampleStore):
    """Plain text-video retrieval: R@1, R@5, R@10 in percent and median rank, both directions.

    A text belongs to one video; a video may have several texts, of which the best placed counts.

    Example:
        >>> import torch
        >>> from lightning_modules.metrics import TextVideoRecall
        >>> metric = TextVideoRecall()
        >>> metric.update(torch.eye(2), index=torch.tensor([4, 5]))
        >>> metric.update(torch.eye(2), index=torch.tensor([0, 1]), video=torch.tensor([4, 4]))
        >>> result = metric.compute()
        >>> result["t2v_r1"], result["t2v_mdr"], result["num_videos_without_text"]
        (50.0, 1.5, 1)
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for modality in ("video", "text"):
            self.add_rows(f"{modality}_embeddings", torch.float32, ndim=2)
            self.add_rows(f"{modality}_index", torch.int64)
        self.add_rows("text_video", torch.int64)

    def update(
        self,
        embeddings: Tensor,
        index: Tensor,
        video: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Add a batch of videos, or of texts where `video` says which videos they belong to.

        Args:
            embeddings: (B, E), L2-normalised.
            index: (B,) the videos' or the texts' identities.
            video: (B,) for texts: the identities of their videos.
            mask: (B,) bool, False for rows that only pad the batch.
        """
        embeddings, index = kept(mask, embeddings, index)
        modality = "video" if video is None else "text"
        self.append(f"{modality}_embeddings", embeddings)
        self.append(f"{modality}_index", index)
        if video is not None:
            self.append("text_video", *kept(mask, video))

    def compute(self) -> dict[str, float]:
        """Return `v2t_r1`, ..., `t2v_mdr`, and how many there were or were left out.

        Raises:
            ValueError: No text belongs to any video, or an embedding is NaN.
        """
        video_ids, video_places = first_of_each(self.rows("video_index"))
        _, text_places = first_of_each(self.rows("text_index"))
        video = self.rows("video_embeddings")[video_places]
        text = self.rows("text_embeddings")[text_places]
        partner_id = self.rows("text_video")[text_places]
        found = torch.isin(partner_id, video_ids)
        partner = torch.searchsorted(video_ids, partner_id)
        text, partner = text[found], partner[found]
        if len(text) == 0:
            raise ValueError(f"none of the texts belongs to one of the {len(video)} videos")
        summaries = {
            "t2v": recall_summary(retrieval_ranks(text, video, partner)),
            "v2t": recall_summary(_video_ranks(video, text, partner)),
        }
        return {
            f"{direction}_{name}": value if name == "mdr" else 100 * value
            for direction, summary in summaries.items()
            for name, value in summary.items()
        } | {
            "num_texts": len(text),
            "num_videos": len(video),
            "num_texts_without_video": int((~found).sum()),
            "num_videos_without_text": len(video) - len(partner.unique()),
        }


def _video_ranks(video: Tensor, text: Tensor, partner: Tensor) -> Tensor:
    """Rank of the best placed text of each video that has one."""
    order = partner.argsort(stable=True)
    counts = partner.bincount(minlength=len(video))
    row = partner[order]
    place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
    texts_of = row.new_full((len(video), int(counts.max())), -1)
    texts_of[row, place] = order
    return retrieval_ranks(video[counts > 0], text, texts_of[counts > 0])
