"""What a run is optimised with, kept in its checkpoints, and what becomes of another recipe's.

The optimiser's state brings its learning rates back from a checkpoint and a schedule brings its
peak; so a recipe that says otherwise would be ignored, in part, and in silence.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_modules.training.optim.optimizers import batches_per_epoch
from lightning_modules.training.run.agreement import run_ranks
from lightning_modules.training.run.checkpoint_store import FOLDER_KEY, RECIPE

log = logging.getLogger(__name__)
SETTINGS_KEY = "eva02_at_settings"
OnChange = Literal["extend", "keep", "apply", "refuse"]
_GROUP = ("lr", "weight_decay", "betas", "eps")


class SameSettings(Callback):
    """Go on with the optimiser settings of the checkpoint, or say what is different and decide.

    Args:
        on_change: What to do where the recipe's are other ones: `extend` accepts a longer or
            shorter run alone, whose schedule is stretched to the new end; `keep` goes on with the
            checkpoint's; `apply` takes the recipe's; `refuse` accepts no difference. Whatever
            differs is named.
    """

    def __init__(self, on_change: OnChange = "extend") -> None:
        self.on_change = on_change
        self._given: dict[str, Any] | None = None  # the recipe's
        self._stored: dict[str, Any] | None = None  # the checkpoint's, where one was loaded
        self._folder = Path()  # of that checkpoint

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimiser is made and not restored: its settings are the recipe's."""
        self._given = read_settings(trainer)
        self._judge()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remember the checkpoint's; whether it loads before `on_fit_start` is the strategy's."""
        if trainer.state.fn == "fit":
            self._stored = checkpoint.get(SETTINGS_KEY)
            self._folder = Path(checkpoint.get(FOLDER_KEY, ""))
            self._judge()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the settings in use."""
        checkpoint[SETTINGS_KEY] = read_settings(trainer)

    def _judge(self) -> None:
        if self._given is None or self._stored is None:
            return
        changed = differences(self._stored, self._given)
        if not changed:
            self._stored = None  # nothing to settle
        elif (told := judge(changed, self.on_change)) and run_ranks().rank == 0:
            log.warning("%s", told)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the restored optimiser and schedule what was decided."""
        if self._given is None or self._stored is None:
            return
        keep = self.on_change == "keep"
        before, after = set_settings(trainer, self._stored if keep else self._given)
        if run_ranks().rank == 0:
            log.warning("learning rate of the next step: %g -> %g", before, after)
        holder: Any = trainer.checkpoint_callback
        path = self._folder / RECIPE
        if keep and getattr(holder, "recipe", None) is not None and path.is_file():
            holder.recipe = with_optimizer_of(holder.recipe, path.read_text())


def read_settings(trainer: Trainer) -> dict[str, Any] | None:
    """What the trainer's optimiser and schedule are set to, as plain data; None without one."""
    if not trainer.optimizers:
        return None
    outer: Any = trainer.optimizers[0]
    groups = outer.param_groups
    settings: dict[str, Any] = {
        "module": type(trainer.lightning_module).__name__,
        "optimizer": type(getattr(outer, "optimizer", outer)).__name__,
        "groups": len(groups),
        "lr": [group.get("initial_lr", group["lr"]) for group in groups],
    }
    for name in _GROUP[1:]:
        values = [group.get(name) for group in groups]
        settings[name] = [list(v) if isinstance(v, tuple) else v for v in values]
    factor = _factor(trainer)
    if factor is not None:
        settings |= asdict(factor)
        if settings["schedule"] == "constant":
            del settings["total_steps"], settings["end_factor"]  # which it has no use for
    batches = batches_per_epoch(trainer)
    if batches is not None and not getattr(
        getattr(trainer, "datamodule", None), "accept_changed_data", False
    ):
        settings["steps_per_epoch"] = -(-batches // trainer.accumulate_grad_batches)
    return settings


def differences(stored: dict[str, Any], given: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The settings that a checkpoint and a recipe do not agree on: name -> (stored, given)."""
    names = [name for name in stored if name in given and stored[name] != given[name]]
    return {name: (stored[name], given[name]) for name in names}


def judge(changed: dict[str, tuple[Any, Any]], option: OnChange) -> str:
    """Say what is different and what is made of it.

    Args:
        changed: From `differences`; something is.
        option: `extend` takes a longer or shorter run, whose schedule is stretched, and refuses
            the rest; `keep` goes on with the checkpoint's settings; `apply` takes the recipe's;
            `refuse` accepts no difference.

    Raises:
        ValueError: It is refused.
    """
    told = ", ".join(f"{name} {_told(old)} -> {_told(new)}" for name, (old, new) in changed.items())
    if "module" in changed:
        raise ValueError(
            f"the checkpoint is another training's ({told}), and only its weights can be taken: "
            "name it with model.init_checkpoint, not with ckpt_path"
        )
    if "optimizer" in changed or "groups" in changed:
        raise ValueError(
            f"the checkpoint's optimiser is another one ({told}), whose state does not fit; "
            "restore the recipe, or start from the run's weights with model.init_checkpoint"
        )
    if option == "refuse" or (option == "extend" and set(changed) != {"total_steps"}):
        raise ValueError(
            f"the checkpoint was trained with other settings ({told}); restore them, or choose: "
            "--settings.on_change=keep goes on with the checkpoint's, =apply takes the recipe's"
        )
    made = {
        "keep": "the checkpoint's are kept",
        "apply": "the recipe's are taken",
        "extend": "the schedule is stretched to the new end",
    }[option]
    return f"the checkpoint was trained with other settings ({told}); {made}"


def set_settings(trainer: Trainer, settings: dict[str, Any]) -> tuple[float, float]:
    """Put settings into the optimiser and the schedule; returns the peak rate before and after."""
    outer: Any = trainer.optimizers[0]
    before = max(group["lr"] for group in outer.param_groups)
    for number, group in enumerate(outer.param_groups):
        values = {name: settings[name][number] for name in _GROUP}
        betas = values["betas"]
        group.update(
            {**values, "betas": tuple(betas)} if betas is not None else _without(values, "betas")
        )
        group["initial_lr"] = values["lr"]
    factor = _factor(trainer)
    if factor is not None:
        for name in asdict(factor):
            setattr(factor, name, settings.get(name, getattr(factor, name)))
        scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
        scheduler.lr_lambdas = [factor] * len(outer.param_groups)
        scheduler.base_lrs = list(settings["lr"])
        for group in outer.param_groups:
            group["lr"] = group["initial_lr"] * factor(scheduler.last_epoch)
    return before, max(group["lr"] for group in outer.param_groups)


def with_optimizer_of(recipe: str, kept: str) -> str:
    """A recipe's YAML with another one's optimiser section, which is the one in use."""
    mine, other = yaml.safe_load(recipe), yaml.safe_load(kept)
    try:
        mine["model"]["init_args"]["optimizer"] = other["model"]["init_args"]["optimizer"]
    except (KeyError, TypeError):
        return recipe  # a module of its own kind
    return yaml.safe_dump(mine, sort_keys=False)


def _factor(trainer: Trainer) -> Any:
    """The schedule's numbers; None where the module brings another kind of schedule."""
    configs = trainer.lr_scheduler_configs
    lambdas = getattr(configs[0].scheduler, "lr_lambdas", None) if configs else None
    return lambdas[0] if lambdas and is_dataclass(lambdas[0]) else None


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _told(value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    distinct = sorted({str(tuple(v) if isinstance(v, list) else v) for v in value})
    return "/".join(distinct)
