"""Validation and test of a LightningModule, through the evaluation engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning import LightningModule
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.batch import ClipBatch, TextBatch
from datamodules.manifest import ClipRecord
from datamodules.module import RetrievalSplit
from lightning_modules.evaluation.engine import Engine, Evaluation
from lightning_modules.evaluation.interface import Benchmark
from lightning_modules.evaluation.missing import TooMuchMissing
from lightning_modules.evaluation.predictors import Predictor

MISSING = "num_missing_clips"


class EvaluatedModule(LightningModule):
    """Measures itself on the DataModule's split, as `eva02-at evaluate` measures a checkpoint.

    Subclasses give `benchmark` and `predictor`.

    Attributes:
        evaluations: The last evaluation of each stage, `val` and `test`. Loggers get its figures in
            percent under `val/` or `test/` (in fp32) and of its counts what is missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.evaluations: dict[str, Evaluation] = {}
        self._benchmarks: dict[str, tuple[Benchmark, list[ClipRecord]]] = {}
        self._engine: Engine | None = None

    def benchmark(self, split: RetrievalSplit, records: Sequence[ClipRecord]) -> Benchmark:
        """What to measure on a split with these clips."""
        raise NotImplementedError

    def predictor(self) -> Predictor:
        """The model as the engine wants it."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        """Look at the validation's data before hours of training."""
        if self.trainer.limit_val_batches:
            self._open("val")

    def on_validation_start(self) -> None:
        """Begin a measurement."""
        self._engine = self._open("val")

    def on_test_start(self) -> None:
        """Begin a measurement."""
        self._engine = self._open("test")

    def validation_step(
        self, batch: ClipBatch | TextBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take one batch of clips or of sentences."""
        self._take(batch)

    def test_step(
        self, batch: ClipBatch | TextBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take one batch of clips or of sentences."""
        self._take(batch)

    def on_validation_epoch_end(self) -> None:
        """Measure what was taken, and log it."""
        self._conclude("val", self.trainer.limit_val_batches)

    def on_test_epoch_end(self) -> None:
        """Measure what was taken, and log it."""
        self._conclude("test", self.trainer.limit_test_batches)

    def _open(self, stage: str) -> Engine | None:
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        # a user's own datamodule need not have it
        split = data.eval_split(stage) if hasattr(data, "eval_split") else None
        if split is None:
            return None
        if stage not in self._benchmarks:
            records = split.records(data.allow_pipe)
            self._benchmarks[stage] = self.benchmark(split, records), records
        benchmark, records = self._benchmarks[stage]
        return Engine(benchmark, records, self.predictor(), max_missing=data.max_missing)

    def _take(self, batch: ClipBatch | TextBatch) -> None:
        if self._engine is None:
            data = type(self.trainer.datamodule).__name__  # type: ignore[attr-defined]
            raise ValueError(
                f"{data} gives batches to evaluate but no `eval_split`, which says what they are "
                "of (datamodules/module.py has one); leave its loaders away, or write one"
            )
        self._engine.take(batch)

    def _conclude(self, stage: str, limit_batches: float) -> None:
        engine, self._engine = self._engine, None
        if engine is None or self.trainer.sanity_checking:
            return
        if not isinstance(limit_batches, float) or limit_batches < 1:  # an int is a number of them
            rank_zero_warn(f"no figures of {stage}: limit_{stage}_batches leaves some clips out")
            return
        try:
            done = engine.finish()
        except TooMuchMissing as error:
            if self.trainer.state.fn != "fit":
                raise
            rank_zero_warn(f"no figures of {stage}: {error}")  # training itself is not at fault
            return
        self.evaluations[stage] = done
        for name, value in done.measured.flat.items():
            if isinstance(value, float) or name == MISSING:
                self.log(f"{stage}/{name}", float(value), rank_zero_only=False)
