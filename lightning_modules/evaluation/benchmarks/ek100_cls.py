"""EK-100 action recognition, zero-shot or with a head of its own."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.annotations.epic import read_actions, read_retrieval_clips, recognition_file
from lightning_modules.evaluation.interface import Benchmark, BenchmarkData, Measured
from lightning_modules.metrics.functional.recognition import action_hits


class EK100Recognition(Benchmark):
    """Verb, noun and action of a clip; top-1 and top-5.

    A class's prompts are all unique narrations of its clips in the training and the validation file
    (`read_actions`). Zero-shot, the prediction is the cosine similarity to the mean of a class's
    normalised prompt embeddings, times the model's logit scale; of a fine-tuned head it is the
    logits. Verbs and nouns come by marginalising its softmax.

    Args:
        data: Its annotations are the folder of `EPIC_100_train.csv` and
            `EPIC_100_validation.csv`; split `validation` by default, or `train`.
    """

    name = "ek100_cls"
    needs_scale = True
    columns: ClassVar = {
        "verb": "verb_top1",
        "noun": "noun_top1",
        "action": "action_top1",
        "action top-5": "action_top5",
    }

    def __init__(self, data: BenchmarkData) -> None:
        folder = data.annotation_path(self.name, "the folder of EPIC_100_{train,validation}.csv")
        split = data.split or "validation"
        if split not in ("train", "validation"):
            raise ValueError(f"split {split!r} of {self.name}; it must be train or validation")
        clips = read_retrieval_clips(recognition_file(folder, split))
        actions = read_actions(folder)
        self.num_classes = len(actions)
        self.verb_of_action = torch.tensor([action.verb_class for action in actions])
        self.noun_of_action = torch.tensor([action.noun_class for action in actions])
        self.clip_ids = [clip.narration_id for clip in clips]
        number = {(a.verb_class, a.noun_class): place for place, a in enumerate(actions)}
        self.target = torch.tensor([number[clip.verb_class, clip.noun_class] for clip in clips])
        self.prompts = [data.template.format(text) for a in actions for text in a.narrations]
        counts = torch.tensor([len(action.narrations) for action in actions])
        self.action_of_prompt = torch.arange(len(actions)).repeat_interleave(counts)

    def predict(self, video: Tensor, text: Tensor, logit_scale: float) -> Tensor:
        """(clips, actions) logits."""
        sums = text.new_zeros(len(self.verb_of_action), text.shape[1])
        classes = F.normalize(sums.index_add_(0, self.action_of_prompt, text), dim=1)
        return logit_scale * video @ classes.T

    def measure(self, prediction: Tensor, present: Tensor) -> Measured:
        """`{action,verb,noun}_top{1,5}`, `num_clips` and `num_missing_clips`."""
        hits = action_hits(
            prediction[present], self.target[present], self.verb_of_action, self.noun_of_action
        )
        metrics = {name: 100 * hit.double().mean().item() for name, hit in hits.items()}
        counts = {
            "num_clips": int(present.sum()),
            "num_missing_clips": int((~present).sum()),
            "num_actions": len(self.verb_of_action),
        }
        return Measured(
            metrics | counts, {name: hit.double().tolist() for name, hit in hits.items()}
        )
