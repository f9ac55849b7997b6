"""DeepSpeed ZeRO on GPUs and, for development and CI, on CPUs; and plain files for the others."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, StrategyRegistry

from lightning_modules.checkpoints.plain_data import load_plain, plain_data_only
from lightning_modules.training.run.agreement import Ranks, run_ranks
from lightning_modules.training.run.checkpoint_store import (
    FOLDER_KEY,
    STATE,
    UNIVERSAL,
    Manifest,
    file_record,
)
from lightning_modules.training.run.private import (
    load_universal,
    loads_universal,
    write_no_recovery_script,
)
from lightning_modules.training.run.resume import resolve_checkpoint, verify

log = logging.getLogger(__name__)
_TAG = "checkpoint"


class PlainCheckpointIO(TorchCheckpointIO):
    """One file, streamed to disk (Lightning's own builds it in memory first), verified on load.

    Paths are checkpoint folders of `CheckpointFolder`, or on loading the folder of them all.
    """

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        """Write `path` as one file."""
        torch.save(checkpoint, path)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> Any:
        """Load a checkpoint of the store, or any other Lightning file as it is."""
        if Path(path).is_file():
            return load_plain(Path(path))
        ranks = run_ranks()
        folder, manifest = resolve_checkpoint(path, ranks)
        if manifest.strategy != "plain":
            raise ValueError(
                f"{folder} was written by {manifest.strategy}; resume it with that strategy, or "
                "start from its weights: `eva02-at convert`, then model.init_checkpoint"
            )
        log.info("resuming from %s", folder)
        with ranks.together(f"reading {folder}"):
            state = load_plain(folder / STATE)
        return {**state, FOLDER_KEY: str(folder)}


def bucket_elements(parameters: int) -> int:
    """Elements of ZeRO's buckets: an eighth of the model, at most 50 million.

    A bucket is reduced when it is full, while the backward pass goes on. DeepSpeed's 500 and
    Lightning's 200 million hold a whole B model: nothing is reduced before the pass is over. It is
    an even number, as DeepSpeed demands.
    """
    return 2 * min(parameters // 16 + 1, 25_000_000)


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed ZeRO as Lightning runs it, on CUDA or (gloo) CPU, with checkpoints that are safe.

    What it adds: CPU ranks; batches without a sampler; a write error does not leave the other
    ranks waiting; a checkpoint is verified before it loads, and converted when the number of ranks
    has changed.

    Args:
        stage: ZeRO stage, 1 to 3.
        communication_data_type: Type in which gradients are summed over ranks: "fp32" as DDP does,
            or "bf16", half the bytes for a rounding at every hop.
        kwargs: As `DeepSpeedStrategy`; where they name no buckets, those follow from the model.
    """

    def __init__(
        self,
        stage: int = 2,
        communication_data_type: Literal["fp32", "bf16", "fp16"] = "fp32",
        **kwargs: Any,
    ) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when deepspeed is imported
        kwargs.setdefault("logging_batch_size_per_gpu", 1)  # only DeepSpeed's own logs use it
        super().__init__(stage=stage, **kwargs)
        self.stage = stage
        self._own_buckets = {"reduce_bucket_size", "allgather_bucket_size"} - kwargs.keys()
        self._zero_config.setdefault("communication_data_type", communication_data_type)
        # torch's fused AdamW runs on CPU tensors too: offload needs no compiled DeepSpeedCPUAdam
        self._zero_config.setdefault("zero_force_ds_cpu_optimizer", False)

    @property
    def _zero_config(self) -> dict[str, Any]:
        return cast(dict[str, Any], self.config)

    @property
    def parallel_devices(self) -> list[torch.device] | None:
        """The devices; CPU ones get the index that DeepSpeed insists on."""
        devices = self._parallel_devices
        if devices is None or not isinstance(self.accelerator, CPUAccelerator):
            return devices
        return [torch.device("cpu", index) for index in range(len(devices))]

    @parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        self._parallel_devices = devices

    def setup_environment(self) -> None:
        """Start the ranks; Lightning's own version refuses everything but CUDA."""
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        # an operator that speeds up one CPU node, and needs a C++ compiler and a minute to build
        backend = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None  # type: ignore[attr-defined]
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    def setup(self, trainer: Trainer) -> None:
        """Size the buckets by the model, then start the engine."""
        assert self.lightning_module is not None
        parameters = [p for p in self.lightning_module.parameters() if p.requires_grad]
        size = bucket_elements(sum(getattr(p, "ds_numel", p.numel()) for p in parameters))
        self._zero_config["zero_optimization"] |= dict.fromkeys(self._own_buckets, size)
        super().setup(trainer)

    @property
    def skipped_steps(self) -> int:
        """Steps that were skipped because a gradient was not finite, on any rank."""
        return int(self.deepspeed_engine.skipped_steps)

    def collect(self, checkpoint: dict[str, Any], folder: Path) -> list[tuple[Path, Any]]:
        """What DeepSpeed would write under `folder`: this rank's files and their contents.

        The contents are the engine's own tensors: copy them before the next step. Collective.
        """
        engine = self.deepspeed_engine
        collector = _Collector(engine.checkpoint_engine)
        engine.checkpoint_engine = collector
        write_no_recovery_script(engine)
        client = {
            k: v for k, v in checkpoint.items() if k not in ("state_dict", "optimizer_states")
        }
        try:
            engine.save_checkpoint(
                str(folder),
                client_state=client,
                tag=_TAG,
                save_latest=False,
                exclude_frozen_parameters=self.exclude_frozen_parameters,
            )
        finally:
            engine.checkpoint_engine = collector.inner
        return collector.files

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Write the ranks' files under the folder `filepath`.

        Raises:
            OSError: Some rank could not write.
        """
        files = self.collect(checkpoint, Path(filepath))
        with run_ranks().together(f"writing {filepath}"):
            for path, state in files:
                path.parent.mkdir(parents=True, exist_ok=True)
                torch.save(state, path)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Load the newest complete checkpoint of a folder, or one checkpoint, after verifying it.

        Written by another number of ranks, it goes through DeepSpeed's universal format, which
        is made once, beside it.

        Raises:
            ValueError: None is complete, or another strategy wrote it.
        """
        assert self.lightning_module is not None
        ranks = run_ranks()
        folder, manifest = resolve_checkpoint(checkpoint_path, ranks)
        if manifest.strategy != f"zero{self.stage}":
            raise ValueError(
                f"{folder} was written by {manifest.strategy} and this run uses zero{self.stage}; "
                "resume with the strategy that wrote it, or start from its weights: "
                "`eva02-at convert`, then model.init_checkpoint"
            )
        source = folder / STATE
        groups = [dict(group) for group in self.deepspeed_engine.optimizer.param_groups]
        if manifest.world_size != self.world_size:
            source = self._universal(folder, manifest, ranks)
        log.info("resuming from %s", source)
        with plain_data_only(deepspeed=True):
            _, client_state = self.deepspeed_engine.load_checkpoint(
                str(source),
                tag=_TAG,
                load_lr_scheduler_states=False,
                load_module_strict=self.lightning_module.strict_loading,
            )
        if loads_universal(self.deepspeed_engine):
            load_universal(self.deepspeed_engine, False)  # for the next save
            if self.stage == 3:
                _part_universal_groups(self.deepspeed_engine.optimizer.optimizer, groups)
        return {**client_state, FOLDER_KEY: str(folder)}

    def _universal(self, folder: Path, manifest: Manifest, ranks: Ranks) -> Path:
        """Convert a checkpoint for another number of ranks, once, and switch loading to it."""
        target = folder / UNIVERSAL
        complaint = verify(target, ranks)
        with ranks.together(f"converting {folder} for {self.world_size} ranks"):
            if ranks.rank == 0 and complaint is not None:
                log.info("converting %s from %d ranks", folder, manifest.world_size)
                with plain_data_only(deepspeed=True):
                    _convert_to_universal(folder / STATE / _TAG, target, manifest)
        load_universal(self.deepspeed_engine, True)
        return target


class _Collector:
    """Stands in for DeepSpeed's checkpoint engine: touches no disk, keeps what it would write.

    An exception inside `save_checkpoint` would leave the other ranks in its barriers for ever.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.files: list[tuple[Path, Any]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Whoever writes the files makes their folders."""

    def save(self, state_dict: Mapping[str, Any], path: str) -> None:
        self.files.append((Path(path), state_dict))


def _part_universal_groups(optimizer: torch.optim.Optimizer, own: list[dict[str, Any]]) -> None:
    """Undo what DeepSpeed 0.19.8 does to ZeRO 3's groups on a universal load.

    It gives every group the first one's weight decay and learning rate, and every slice one and
    the same tensor of the step count, which each of them then increments.

    Args:
        optimizer: The inner optimiser, after the load.
        own: The groups' settings as they were before it.
    """
    first = optimizer.param_groups[0]
    progress = first["lr"] / first.get("initial_lr", first["lr"])
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update({key: value for key, value in settings.items() if key != "params"})
        group["lr"] = group.get("initial_lr", group["lr"]) * progress
    for state in optimizer.state.values():
        state["step"] = state["step"].clone()


def _convert_to_universal(source: Path, target: Path, manifest: Manifest) -> None:
    """Write DeepSpeed's universal format to `target`, with a manifest of its own.

    It appears only when it is complete.
    """
    from deepspeed.checkpoint import ds_to_universal

    temporary = target.with_name(f".{target.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    ds_to_universal.main(
        Namespace(
            input_folder=str(source),
            output_folder=str(temporary / _TAG),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    records = [file_record(temporary, path) for path in files]
    replace(manifest, files=records).write(temporary)
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def kind_of(strategy: object) -> str:
    """How a strategy's checkpoints are called in their manifests."""
    return f"zero{strategy.stage}" if isinstance(strategy, ZeroStrategy) else "plain"


def is_zero(strategy: object) -> bool:
    """True where optimiser and gradients are sharded by DeepSpeed."""
    return isinstance(strategy, ZeroStrategy)


for _name, _stage in (("deepspeed_cpu", 2), ("zero1", 1), ("zero2", 2), ("zero3", 3)):
    StrategyRegistry.register(_name, ZeroStrategy, description=f"ZeRO {_stage}", stage=_stage)
