"""Every private attribute of a library that `lightning_modules` touches, each with its reason.

Private names change without notice: `CHECKED` says with which versions each was looked at, and its
test fails with any other. Read this file again then, and try what each function is for.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

CHECKED = {"lightning": "2.6.6", "deepspeed": "0.19.8", "torch": "2.13.0", "jsonargparse": "4.53.0"}


# -- Lightning: when a checkpoint may be taken, and what is in it --------------------------------
# Lightning restores a checkpoint taken at the end of a batch by going on with the next batch; what
# it makes of one taken anywhere else depends on where (`run/loop_state.py` says how that is met).
# Upstream: saving within an epoch was asked for in Lightning-AI/pytorch-lightning#2530 and closed
# unresolved.


def attached_trainer(module: LightningModule) -> Trainer | None:
    """The module's trainer; the public property raises where there is none."""
    return module._trainer


def gradients_pending(trainer: Trainer) -> bool:
    """True between the micro-batches of one optimiser step: no checkpoint can hold that state."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def epoch_done(trainer: Trainer) -> bool:
    """At the end of a training batch: whether it is the epoch's last."""
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()


def validation_due(trainer: Trainer) -> bool:
    """At the end of a training batch: whether the schedule has a validation here.

    One that runs only because the run is about to end (`should_stop`) belongs to that end: a run
    that goes on has none there.
    """
    loop = trainer.fit_loop
    fetcher = loop._data_fetcher
    if fetcher is None:
        return False
    ending, trainer.should_stop = trainer.should_stop, False
    try:
        return loop.epoch_loop._should_check_val_fx(fetcher)
    finally:
        trainer.should_stop = ending


def dump_checkpoint(trainer: Trainer) -> dict[str, Any]:
    """The whole state of a run; `Trainer.save_checkpoint` would write it, to a place of its own."""
    return trainer._checkpoint_connector.dump_checkpoint(weights_only=False)


def log_last_step(trainer: Trainer) -> None:
    """What follows a batch's hooks in Lightning's loop and is not reached by a run that stops."""
    trainer._logger_connector.on_batch_end()
    trainer._logger_connector.update_train_step_metrics()


# -- Lightning: signals and children --------------------------------------------------------------


def silence_lightning_signals(trainer: Trainer) -> None:
    """Keep Lightning from handling signals: no handlers, and no broadcast of them every batch.

    Its handlers save from inside the handler, each rank by itself, which dead-locks in the
    collectives of a sharded checkpoint. There is no switch
    (Lightning-AI/pytorch-lightning#16501 made them unconditional).
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


def let_children_exit_nonzero() -> None:
    """Keep Lightning's launcher from killing this process because another rank has left with 85."""
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]


# -- DeepSpeed ------------------------------------------------------------------------------------


def write_no_recovery_script(engine: Any) -> None:
    """Keep DeepSpeed from copying its `zero_to_fp32.py` beside each state: code in a checkpoint."""
    engine._copy_recovery_script = lambda save_path: None


def loads_universal(engine: Any) -> bool:
    """Whether the engine's next load expects the universal format."""
    return engine._config.load_universal_checkpoint


def load_universal(engine: Any, on: bool) -> None:
    """Choose the format of the next load; the public option is read once, from the config.

    Which format a checkpoint needs is known only when it is found (the number of ranks that wrote
    it), long after the engine has its config: deepspeedai/DeepSpeed#6470 meets the same.
    """
    engine._config.load_universal_checkpoint = on


# -- PyTorch and jsonargparse ---------------------------------------------------------------------


def default_store() -> Any:
    """The process group's key-value store: the watchdog's way to the other ranks.

    A store of its own would need a second address and port for every run.
    """
    return dist.distributed_c10d._get_default_store()


def lerp_(averages: Sequence[Tensor], values: Sequence[Tensor], weight: float) -> None:
    """Move all averages towards the values in a few kernels instead of one for each tensor."""
    torch._foreach_lerp_(list(averages), list(values), weight)


def norms(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Norms of many tensors in a few kernels."""
    return list(torch._foreach_norm(list(tensors)))


def fake_tensors() -> AbstractContextManager[Any]:
    """Tensors with shapes and storages but no memory, made within: the planner's way to count."""
    from torch._subclasses.fake_tensor import FakeTensorMode  # takes a while to import

    return FakeTensorMode()


def storage_identity(tensor: Tensor) -> int:
    """Tells storages apart; a fake one has no address, and its Python object is made anew."""
    return tensor.untyped_storage()._cdata


def option_names(parser: Any) -> set[str]:
    """Every option's dotted name and its last part, to suggest the nearest to a mistyped one."""
    return {
        name for action in parser._actions for name in (action.dest, action.dest.rsplit(".", 1)[-1])
    }
