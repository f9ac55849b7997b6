"""Action recognition (EK-100 CLS): fine-tuning with a head of its own, and its evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.annotations.epic import read_actions
from datamodules.batch import ClipBatch, TextBatch
from datamodules.manifest import ClipRecord
from datamodules.module import RetrievalSplit
from lightning_modules.base import TrainedModule, load_initial_weights
from lightning_modules.evaluation.interface import Benchmark
from lightning_modules.evaluation.predictors import ClassifierPredictor, Predictor
from lightning_modules.evaluation.splits import recognition_benchmark
from lightning_modules.models import DualEncoder, ModelConfig, VideoClassifier
from lightning_modules.training.optim.optimizers import OptimizerConfig


class RecognitionModule(TrainedModule):
    """Fine-tune the video tower to name verb, noun and action.

    One head gives the logits of all actions (`read_actions`: 3,806 in EK-100); verbs and nouns come
    from marginalising their softmax. Evaluation logs top-1 and top-5 in percent under `val/` or
    `test/`.

    Args:
        model: The dual encoder to start from; its text tower is not kept.
        annotations: Folder of `EPIC_100_train.csv` and `EPIC_100_validation.csv`.
        optimizer: Optimiser and schedule.
        init_checkpoint: As in `DualEncoderModule`.
        label_smoothing: Of the cross entropy.
    """

    model: VideoClassifier

    def __init__(
        self,
        model: ModelConfig,
        annotations: str,
        optimizer: OptimizerConfig,
        init_checkpoint: str | None = None,
        label_smoothing: float = 0.1,
    ) -> None:
        super().__init__(optimizer, init_checkpoint)
        self.annotations = annotations
        actions = read_actions(annotations)
        # values that are needed now, also where `plan` builds the model without storage
        verbs = torch.tensor([action.verb_class for action in actions], device="cpu")
        nouns = torch.tensor([action.noun_class for action in actions], device="cpu")
        shape = (int(verbs.max()) + 1, int(nouns.max()) + 1)
        table = torch.full(shape, -1, device="cpu")
        table[verbs, nouns] = torch.arange(len(actions), device="cpu")
        self.verb_of_action: Tensor
        self.noun_of_action: Tensor
        self.action_table: Tensor
        self.register_buffer("verb_of_action", verbs, persistent=False)
        self.register_buffer("noun_of_action", nouns, persistent=False)
        self.register_buffer("action_table", table, persistent=False)
        self._host_table = table
        self.model = VideoClassifier(model.resolve(), len(actions))
        self.label_smoothing = label_smoothing

    def benchmark(self, split: RetrievalSplit, records: Sequence[ClipRecord]) -> Benchmark:
        """EK-100 recognition with the head's own logits."""
        return recognition_benchmark(split, records, self.annotations)

    def predictor(self) -> Predictor:
        """The head's logits."""
        return ClassifierPredictor(self.model)

    def load(self, path: str) -> None:
        """Load a dual encoder and take its video tower."""
        pretrained = DualEncoder(self.model.config)
        load_initial_weights(path, pretrained)
        self.model.start_from(pretrained.visual)

    def forward(self, batch: ClipBatch) -> Tensor:
        """(B, actions) logits."""
        return self.model(batch.video)

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        """Return the cross entropy of the clips' actions."""
        loss = F.cross_entropy(
            self(batch), self._actions(batch), label_smoothing=self.label_smoothing
        )
        self.log("train/loss", loss.detach(), batch_size=len(batch))
        return loss

    def predict_step(
        self, batch: ClipBatch | TextBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor] | None:
        """Return the batch's logits and identities, padding rows left out."""
        if isinstance(batch, TextBatch):
            return None
        return {"logits": self(batch)[batch.mask], "index": batch.clip_index[batch.mask]}

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Refuse clips of unknown actions to train on, while the batch is on the host.

        Raises:
            ValueError: A clip has none of the annotations' actions.
        """
        if self.trainer.training and isinstance(batch, ClipBatch):
            self._actions(batch, self._host_table)
        return batch

    def _actions(self, batch: ClipBatch, table: Tensor | None = None) -> Tensor:
        """(B,) the clips' actions; looked at on the host only, which would wait for the device.

        Raises:
            ValueError: A clip has none of the annotations' actions.
        """
        table = self.action_table if table is None else table
        verbs, nouns = batch.verb_classes[:, 0], batch.noun_classes[:, 0]  # the main noun is first
        if verbs.is_cuda:
            return table[verbs, nouns]  # padding's -1 counts from the end, and is masked
        rows, columns = table.shape
        known = (verbs >= 0) & (verbs < rows) & (nouns >= 0) & (nouns < columns)
        actions = torch.where(known, table[verbs % rows, nouns % columns], -1)
        if (actions[batch.mask] < 0).any():
            first = int((batch.mask & (actions < 0)).nonzero()[0])
            raise ValueError(
                f"clip {batch.keys[first]!r} has verb {int(verbs[first])} and noun "
                f"{int(nouns[first])}, which is no action of the annotations; build the shards "
                "from the EPIC_100_train.csv and EPIC_100_validation.csv that `annotations` holds"
            )
        return actions
