"""Two-stage retrieval: training of a re-ranker on a dual encoder that stays as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.batch import ClipBatch
from datamodules.manifest import ClipRecord
from datamodules.module import RetrievalSplit
from datamodules.relevance import relevance_matrix
from lightning_modules.base import TrainedModule
from lightning_modules.checkpoints.conversion import load_model
from lightning_modules.checkpoints.rerank import check_architecture, check_same_encoder
from lightning_modules.evaluation.interface import Benchmark
from lightning_modules.evaluation.predictors import DualEncoderPredictor, Predictor
from lightning_modules.evaluation.rerank import RerankOptions, RerankPredictor
from lightning_modules.evaluation.splits import retrieval_benchmark
from lightning_modules.losses import gather_ids, gather_no_gradient
from lightning_modules.losses.gather import GlobalBatch
from lightning_modules.losses.matching import matching_loss, mine_pairs
from lightning_modules.models import DualEncoder, ModelConfig
from lightning_modules.models.rerank import RerankConfig, ReRanker, fingerprint, words_of
from lightning_modules.training.optim.optimizers import OptimizerConfig


class RerankModule(TrainedModule):
    """Train an image-text-matching head that re-ranks what a dual encoder finds.

    The dual encoder is no part of the module: it is read at each start and never changes, and
    checkpoints hold the head with the fingerprint of the encoder that it belongs to.

    Args:
        model: The dual encoder, as its own recipe has it.
        reranker: The head.
        dual_checkpoint: The trained dual encoder, as `evaluate --checkpoint` takes it.
        optimizer: Optimiser and schedule, of the head.
        mining_temperature: Of the draw of hard negatives; towards 0 the hardest is taken.
        negatives_below: Relevance from which on an item of the batch is no negative.
        top: K of validation and test: candidates of each query that are looked at again.
        blend: What a re-ranker's score counts beside the cosine, there.

    Raises:
        ValueError: A value is out of its range.
    """

    model: ReRanker

    def __init__(
        self,
        model: ModelConfig,
        reranker: RerankConfig,
        dual_checkpoint: str,
        optimizer: OptimizerConfig,
        mining_temperature: float = 0.1,
        negatives_below: float = 0.9,
        top: int = 50,
        blend: float = 1.0,
    ) -> None:
        super().__init__(optimizer, None)
        if mining_temperature <= 0 or not 0 < negatives_below <= 1:
            raise ValueError(
                f"mining_temperature is {mining_temperature} and negatives_below "
                f"{negatives_below}; above 0, and in (0, 1]"
            )
        self.dual_checkpoint = dual_checkpoint
        self.mining_temperature, self.negatives_below = mining_temperature, negatives_below
        self.options = RerankOptions(top, blend)
        self.model = ReRanker(reranker, model.resolve())
        self._dual: tuple[DualEncoder, ...] = ()  # not a submodule: neither trained nor saved

    def setup(self, stage: str) -> None:
        """Read the dual encoder; a head that was trained, or goes on, must be its own.

        Raises:
            FileNotFoundError: It is not there.
            ValueError: It is not the one of the recipe.
        """
        if self._dual:
            return
        loaded = load_model(self.dual_checkpoint)
        check_architecture(self.model.dual, loaded.config, str(loaded.source.path))
        loaded.model.requires_grad_(False)
        self._dual = (loaded.model,)
        rank_zero_info(f"dual encoder of {loaded.source.path}: {loaded.report.summary()}")

    def on_fit_start(self) -> None:
        """Look at the encoder and the data before hours of training.

        Raises:
            ValueError: The head is another encoder's, or its weights are spread by ZeRO 3.
        """
        if getattr(self.trainer.strategy, "zero_stage_3", False):
            raise ValueError(
                "ZeRO 3 gathers weights at each call, on all ranks together, and ranks look at "
                "different numbers of pairs; a re-ranker's head is small: train it with ddp, zero1 "
                "or zero2 (configs/strategy)"
            )
        self._adopt()
        super().on_fit_start()

    def _adopt(self) -> None:
        """Take the encoder's fingerprint where the head is new."""
        own = fingerprint(self.dual)
        if not self.model.fingerprint.any():
            self.model.fingerprint.copy_(own)
        check_same_encoder(self.model, own, self.dual_checkpoint)

    def on_validation_start(self) -> None:
        """Refuse a head that belongs to another encoder."""
        self._adopt()
        super().on_validation_start()

    def on_test_start(self) -> None:
        """Refuse a head that belongs to another encoder."""
        self._adopt()
        super().on_test_start()

    @property
    def dual(self) -> DualEncoder:
        """The dual encoder, on this module's device."""
        (dual,) = self._dual
        return dual.to(self.device)

    def benchmark(self, split: RetrievalSplit, records: Sequence[ClipRecord]) -> Benchmark:
        """Multi-instance retrieval, in both directions."""
        return retrieval_benchmark(split, records)

    def predictor(self) -> Predictor:
        """The dual encoder, its first candidates looked at again."""
        return RerankPredictor(DualEncoderPredictor(self.dual), self.model, self.options)

    def training_step(self, batch: ClipBatch, batch_idx: int) -> Tensor:
        """Return the matching loss over the global batch.

        Each rank looks at the pairs of its own clips, so that no patches travel; the texts of the
        global batch, which are few tokens, are encoded on every rank.
        """
        dual = self.dual
        ids = gather_ids(
            (
                batch.clip_index[:, None],
                batch.text_index[:, None],
                batch.verb_classes,
                batch.noun_classes,
                batch.text_verb_classes,
                batch.text_noun_classes,
                batch.tokens,
            ),
            even=batch.even,
        )
        with torch.no_grad():
            video, patches = dual.encode_video_with_patches(batch.video)
            clip_ids, text_ids, verbs, nouns, text_verbs, text_nouns, tokens = ids()
            tokens = tokens.clamp_min(0)  # ranks' longest sentences differ
            texts, words = dual.encode_text_with_words(tokens)
            clips = gather_no_gradient(video)
            relevance = relevance_matrix(verbs, nouns, text_verbs, text_nouns).cpu()
            pairs = mine_pairs(
                clips.cpu() @ texts.cpu().T,
                relevance,
                _seed_of(clip_ids, text_ids),
                temperature=self.mining_temperature,
                below=self.negatives_below,
            )
        share = GlobalBatch.of(video, even=batch.even)
        own = pairs.of_clips(share.first, len(video))
        chosen = own.texts.to(self.device)
        logits = self.model(
            self.model.places(patches),
            self.model.words(words[chosen]),
            words_of(tokens)[chosen],
            (own.clips - share.first).to(self.device),
        )
        targets = relevance[own.clips, own.texts].to(self.device)
        loss = matching_loss(logits, targets, len(pairs), share)
        self.log("train/loss", loss.detach(), batch_size=len(batch))
        return loss


def _seed_of(*ids: Tensor) -> int:
    """63 bits of who is in the global batch: the same on any number of ranks, and after a stop."""
    rows = torch.cat(ids, dim=1).cpu().contiguous().numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(rows, digest_size=8).digest(), "big") >> 1
