"""What pretraining and retrieval share: the dual encoder, its optimiser, and evaluation."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType, rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.batch import ClipBatch, TextBatch
from datamodules.manifest import ClipRecord
from datamodules.module import RetrievalSplit
from lightning_modules.checkpoints import load_clip_checkpoint
from lightning_modules.checkpoints.source import find_checkpoint
from lightning_modules.evaluated import EvaluatedModule
from lightning_modules.evaluation.interface import Benchmark
from lightning_modules.evaluation.predictors import DualEncoderPredictor, Predictor
from lightning_modules.evaluation.splits import retrieval_benchmark
from lightning_modules.models import DualEncoder, ModelConfig
from lightning_modules.side_stream import SideStream
from lightning_modules.training.optim.gradcache import Encode, encode_in_micro_batches
from lightning_modules.training.optim.optimizers import OptimizerConfig, configure_optimizers
from lightning_modules.training.run.private import attached_trainer


def load_initial_weights(path: str, model: DualEncoder) -> None:
    """Load a checkpoint that `find_checkpoint` finds, and say what was used of it."""
    source = find_checkpoint(path)
    report = load_clip_checkpoint(source.read(), model)
    rank_zero_info(f"initial weights of {source.path}: {report.summary()}")


class TrainedModule(EvaluatedModule):
    """A model in training: its initial weights and its optimiser.

    Subclasses set `model` and give `load`, and what `EvaluatedModule` wants.

    Args:
        optimizer: Optimiser and schedule.
        init_checkpoint: Weights to start from, used only where the run does not resume from a
            checkpoint of its own.
    """

    model: nn.Module

    def __init__(self, optimizer: OptimizerConfig, init_checkpoint: str | None) -> None:
        super().__init__()
        self.optimizer_config = optimizer
        self.init_checkpoint = init_checkpoint
        self._side_stream = SideStream()

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Lightning's own way, on a stream beside the computation's."""
        move = super().transfer_batch_to_device
        return self._side_stream.copy(device, lambda: move(batch, device, dataloader_idx))

    def load(self, path: str) -> None:
        """Load initial weights."""
        raise NotImplementedError

    def configure_model(self) -> None:
        """Load the initial weights, once, unless the run resumes."""
        path, self.init_checkpoint = self.init_checkpoint, None
        trainer = attached_trainer(self)
        if path is None or (trainer is not None and trainer.ckpt_path is not None):
            return
        self.load(path)

    def configure_optimizers(self) -> Any:
        """Build the optimiser and its per-step schedule over the whole run."""
        return configure_optimizers(self, self.model, self.optimizer_config)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the Trainer says, a fused optimiser's gradients too.

        Lightning refuses those under autocast of any type; but only fp16's are scaled, and not yet
        unscaled where a fused optimiser does that itself.
        """
        plugin = self.trainer.precision_plugin
        if not isinstance(plugin, MixedPrecision) or plugin.scaler is not None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        algorithm = GradClipAlgorithmType((gradient_clip_algorithm or "norm").lower())
        Precision.clip_gradients(plugin, optimizer, gradient_clip_val or 0.0, algorithm)


class DualEncoderModule(TrainedModule):
    """A dual encoder in training: forward, optimiser and multi-instance retrieval evaluation.

    Subclasses give `training_step`. Evaluation expects two loaders, clips (`ClipBatch`) and
    sentences (`TextBatch`), and logs mAP and nDCG in percent under `val/` or `test/`.

    Args:
        model: The model to build.
        loss: The training loss.
        optimizer: Optimiser and schedule.
        init_checkpoint: Weights to start from: a published file, a checkpoint of this project, or
            the folder of a run's checkpoints, of which the newest complete one is taken. Used only
            where the run does not resume from a checkpoint of its own.
        micro_batch: Pairs of a rank's batch whose activations are held at a time (GradCache): the
            contrastive batch stays whole, memory shrinks, and the encoders run twice forward.
            None holds them all.

    Raises:
        ValueError: `micro_batch` is not positive.
    """

    model: DualEncoder

    def __init__(
        self,
        model: ModelConfig,
        loss: nn.Module,
        optimizer: OptimizerConfig,
        init_checkpoint: str | None = None,
        micro_batch: int | None = None,
    ) -> None:
        super().__init__(optimizer, init_checkpoint)
        if micro_batch is not None and micro_batch < 1:
            raise ValueError(f"micro_batch is {micro_batch}; at least 1, or null for no splitting")
        self.micro_batch = micro_batch
        self.model = DualEncoder(model.resolve())
        self.loss = loss

    def configure_optimizers(self) -> Any:
        """As any model's, with what the loss itself learns."""
        scalars = list(self.loss.parameters())
        return configure_optimizers(self, self.model, self.optimizer_config, scalars)

    def loss_takes(self) -> Sequence[str] | None:
        """What `training_step` gives the loss by position, if that is to be checked."""
        return None

    def benchmark(self, split: RetrievalSplit, records: Sequence[ClipRecord]) -> Benchmark:
        """Multi-instance retrieval, in both directions."""
        return retrieval_benchmark(split, records)

    def predictor(self) -> Predictor:
        """Embeddings of both."""
        return DualEncoderPredictor(self.model)

    def load(self, path: str) -> None:
        """Load the whole dual encoder."""
        load_initial_weights(path, self.model)

    def forward(self, batch: ClipBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Embed a batch: (B, E) video and (B, E) text, L2-normalised, and the logit scale."""
        return self.embed(self.model, batch, batch.tokens)

    def embed(
        self, encode: Encode, batch: ClipBatch, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embed a batch's clips and these tokens, as `encode_in_micro_batches` does.

        Raises:
            ValueError: Ranks may have different numbers of micro-batches where each is a
                collective.
        """
        if self.micro_batch and not batch.even and hasattr(self.model.logit_scale, "ds_tensor"):
            raise ValueError(
                "under ZeRO 3 every micro-batch gathers weights on all ranks together, and with "
                "data.hard_negatives.reversed_share ranks have different numbers of pairs: set "
                "model.micro_batch to null, or use ZeRO 2"
            )
        return encode_in_micro_batches(encode, batch.video, tokens, self.micro_batch)

    def call_loss(self, *tensors: Tensor, **offered: Any) -> Tensor:
        """The loss of a batch: of what is offered by name it gets what its `forward` names.

        A user's own need not know of what others want.
        """
        parameters = inspect.signature(self.loss.forward).parameters
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        named = {k: v for k, v in offered.items() if takes_all or k in parameters}
        return self.loss(*tensors, **named)

    def log_loss(self, loss: Tensor, logit_scale: Tensor, batch_size: int) -> Tensor:
        """Log a training step; returns the loss to minimise.

        The temperature is a parameter of every model but of few losses. Adding it with weight
        zero gives it a gradient of zero, so that neither DDP nor ZeRO meets an unused parameter;
        freezing it instead breaks the resume of ZeRO 3 (its strict state dict).
        """
        self.log("train/loss", loss.detach(), batch_size=batch_size)
        return loss + 0.0 * logit_scale.float().sum()

    def predict_step(
        self, batch: ClipBatch | TextBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Return the batch's embeddings and identities, padding rows left out."""
        if isinstance(batch, ClipBatch):
            embeddings, index = self.model.encode_video(batch.video), batch.clip_index
        else:
            embeddings, index = self.model.encode_text(batch.tokens), batch.text_index
        return {"embeddings": embeddings[batch.mask].float(), "index": index[batch.mask]}
