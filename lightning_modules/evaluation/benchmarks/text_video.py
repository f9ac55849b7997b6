"""Plain text-video retrieval on anybody's clips and texts."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lightning_modules.evaluation.interface import Benchmark, BenchmarkData, Measured
from lightning_modules.evaluation.similarity import dual_softmax
from lightning_modules.metrics.functional.recall import best_ranks, recall_summary


class TextVideoRetrieval(Benchmark):
    """R@1, R@5, R@10 and median rank, texts to videos and videos to texts.

    The shards say it all: each clip's texts are its own (a table of videos and texts becomes
    shards with `eva02-at shards build --format csv`). Rows of the same span of the same video are
    one video with several texts, of which the best placed counts.

    Args:
        data: Records with at least one text each; what the build rejected is a video missing.
    """

    name = "text_video"
    compares_all: ClassVar[bool] = True
    columns: ClassVar = {
        "T-V R@1": "t2v.r1",
        "T-V R@5": "t2v.r5",
        "T-V R@10": "t2v.r10",
        "T-V MdR": "t2v.mdr",
        "V-T R@1": "v2t.r1",
        "V-T R@5": "v2t.r5",
        "V-T R@10": "v2t.r10",
        "V-T MdR": "v2t.mdr",
    }

    def __init__(self, data: BenchmarkData) -> None:
        self.dual_softmax = data.dual_softmax
        first: dict[tuple[str, float, float], int] = {}
        clip_ids: list[str] = []
        prompts: list[str] = []
        owners: list[int] = []
        for record in data.records:
            span = (record.video_id, record.start_s, record.end_s)
            if span not in first:
                first[span] = len(clip_ids)
                clip_ids.append(record.clip_id)
            prompts += [data.template.format(text) for text in record.texts]
            owners += [first[span]] * len(record.texts)
        self.clip_ids, self.prompts = [*clip_ids, *data.rejected], prompts
        self.video_of_text = torch.tensor(owners)

    def predict(self, video: Tensor, text: Tensor, logit_scale: float) -> Tensor:
        """(videos, texts) cosine similarities."""
        return video @ text.T

    def measure(self, prediction: Tensor, present: Tensor) -> Measured:
        """`t2v` and `v2t`, each with `r1`, `r5`, `r10` and `mdr`, and what was left out."""
        return self.measure_directions(prediction, prediction, present)

    def measure_directions(self, by_clip: Tensor, by_text: Tensor, present: Tensor) -> Measured:
        """The same, `v2t` by the first matrix and `t2v` by the second."""
        kept_texts = present[self.video_of_text]
        v2t, t2v = (matrix[present][:, kept_texts] for matrix in (by_clip, by_text))
        if self.dual_softmax is not None:
            v2t, t2v = (dual_softmax(matrix, self.dual_softmax) for matrix in (v2t, t2v))
        number = present.cumsum(0) - 1  # of a video among those present
        partner = number[self.video_of_text[kept_texts]]
        belongs = partner == torch.arange(len(v2t))[:, None]
        ranks = {"t2v": best_ranks(t2v.T, belongs.T), "v2t": best_ranks(v2t, belongs)}
        metrics: dict[str, object] = {}
        for direction, found in ranks.items():
            summary = recall_summary(found)
            metrics[direction] = {k: v if k == "mdr" else 100 * v for k, v in summary.items()}
        return Measured(
            metrics
            | {
                "num_texts": len(partner),
                "num_videos": len(v2t),
                "num_missing_clips": int((~present).sum()),
            },
            {
                direction: {f"r{k}": (found <= k).double().tolist() for k in (1, 5, 10)}
                for direction, found in ranks.items()
            },
        )
