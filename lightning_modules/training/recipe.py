"""A recipe: YAML files and words, parsed by LightningCLI into trainer, module and data.

The parser mode is jsonargparse's `omegaconf+`: several `--config` files compose first, then
`${interpolation}` is resolved over the whole, so that an override in a later file or on the
command line reaches every use. With Lightning's own subcommands that mode cannot resolve an
interpolation typed on the command line, hence one parser and the verb taken off in front of it.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import logging
import re
import sys
import typing
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning.pytorch.cli as lightning_cli
import yaml
from jsonargparse import ActionConfigFile
from lightning import LightningDataModule, LightningModule

from lightning_modules.packaged import with_recipe_paths
from lightning_modules.training.kept import one_wandb_run, with_references
from lightning_modules.training.messages import shorten
from lightning_modules.training.monitor.csv_log import AppendingCSVLogger
from lightning_modules.training.monitor.health import FiniteGuard
from lightning_modules.training.monitor.progress import RunProgress
from lightning_modules.training.monitor.tensorboard_log import TolerantTensorBoardLogger
from lightning_modules.training.monitor.throughput import ThroughputMonitor
from lightning_modules.training.run.checkpointing import SafeCheckpoints
from lightning_modules.training.run.data_faults import DataFaults
from lightning_modules.training.run.devices import check_devices
from lightning_modules.training.run.ownership import RunOwner
from lightning_modules.training.run.private import option_names
from lightning_modules.training.run.seeding import StepSeed
from lightning_modules.training.run.settings import SameSettings
from lightning_modules.training.run.watchdog import StallWatchdog


class RecipeParser(lightning_cli.LightningArgumentParser):
    """LightningCLI's parser with one short error instead of the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        """Raise the user's mistake as a ValueError, with the nearest valid key if one is near."""
        if "File does not exist" in message:  # on this node, that is
            ex = FileNotFoundError(message)
        raise ValueError(shorten(message) + self._nearest(message)) from ex

    def _nearest(self, message: str) -> str:
        found = re.search(
            r"(?:[Oo]ption|[Kk]ey|arguments:) ['\"]?-*([\w.]+)['\"]?(?: is not|=|$)", message
        ) or re.search(r"does not accept option '([\w.]+)'", message)
        if not found or "Did you mean" in message:  # jsonargparse's own
            return ""
        keys = option_names(self)
        keys |= set(re.findall(r"\b[a-z]\w+\b", self._class_parameters(message)))
        near = difflib.get_close_matches(found[1], sorted(keys), n=1) or difflib.get_close_matches(
            found[1].rsplit(".", 1)[-1], sorted(keys), n=1
        )
        return f" Did you mean `{near[0]}`?" if near else ""

    @staticmethod
    def _class_parameters(message: str) -> str:
        """Names that the class named in the message, and its dataclass arguments, accept."""
        named = re.search(r"given class_path '([\w.]+)'", message)
        if not named:
            return ""
        module, _, name = named[1].rpartition(".")
        hints: dict[str, Any] = {}
        for parent in getattr(importlib.import_module(module), name).__mro__:
            init = parent.__dict__.get("__init__")
            if init is not None and parent not in (LightningModule, LightningDataModule, object):
                hints |= typing.get_type_hints(init)
            if parent in (LightningModule, LightningDataModule):
                break
        names = set(hints)
        for hint in hints.values():
            if dataclasses.is_dataclass(hint):
                names |= {field.name for field in dataclasses.fields(hint)}
        return " ".join(names)


# Sections of a recipe beside `model`, `data` and `trainer`; each is a callback of every run.
RUN_CALLBACKS = {
    "owner": RunOwner,
    "checkpoints": SafeCheckpoints,
    "settings": SameSettings,
    "finite": FiniteGuard,
    "data_faults": DataFaults,
    "watchdog": StallWatchdog,
    "random": StepSeed,
    "throughput": ThroughputMonitor,
    "progress": RunProgress,
}


# The streams shard themselves; a resumed run must not validate before its first step; the summary
# counts no operation of these models. A recipe may say otherwise.
TRAINER_DEFAULTS = {
    "use_distributed_sampler": False,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
    "enable_progress_bar": False,  # RunProgress has its place
    "log_every_n_steps": 10,
}


class RecipeCLI(lightning_cli.LightningCLI):
    """LightningCLI over a recipe: `model`, `data`, `trainer`, and the run's own keys."""

    words: Sequence[str] = ()  # what it was parsed from

    def init_parser(self, **kwargs: Any) -> lightning_cli.LightningArgumentParser:
        """Use our parser; abbreviated options are refused, since they hide typing errors."""
        parser = RecipeParser(allow_abbrev=False, **kwargs)
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="a recipe; later files override earlier"
        )
        return parser

    def add_arguments_to_parser(self, parser: lightning_cli.LightningArgumentParser) -> None:
        """Add the keys of a run that belong to none of the classes."""
        parser.add_argument(
            "--run_dir", type=str, default="runs/default", help="everything the run writes"
        )
        parser.add_argument(
            "--data_dir", type=str, default="data", help="root for the recipe's ${data_dir}"
        )
        parser.add_argument(
            "--ckpt_path",
            type=str | None,
            default=None,
            help="checkpoint to resume or evaluate; fit takes run_dir's newest complete one",
        )
        for name, callback in RUN_CALLBACKS.items():
            parser.add_lightning_class_args(callback, name)

    def kept(self) -> str:
        """The resolved recipe, as a run keeps it."""
        return with_references(self.parser.dump(self.config, skip_none=False), self.words)

    def before_instantiate_classes(self) -> None:
        """Give the trainer its place to write, unless the recipe names one."""
        trainer = self.config.trainer
        check_devices(trainer.accelerator, trainer.devices, trainer.num_nodes)
        run_dir = self.config.run_dir
        if trainer.default_root_dir is None:
            trainer.default_root_dir = run_dir
        if trainer.logger is not False:
            trainer.logger = _with_csv(trainer.logger, run_dir)


def _with_csv(loggers: Any, run_dir: str) -> list[Any]:
    """The recipe's loggers, TensorBoard where it names none, and always the CSV."""

    def logger(kind: type, **arguments: Any) -> Any:
        path = f"{kind.__module__}.{kind.__qualname__}"
        init_args = lightning_cli.Namespace(**arguments)
        return lightning_cli.Namespace(class_path=path, init_args=init_args)

    csv = logger(AppendingCSVLogger, save_dir=f"{run_dir}/logs")
    if loggers in (None, True):
        return [csv, logger(TolerantTensorBoardLogger, save_dir=run_dir, name="", version="logs")]
    given = loggers if isinstance(loggers, list) else [loggers]
    return [csv, *(one_wandb_run(logger, run_dir) for logger in given)]


def build_cli(words: list[str]) -> RecipeCLI:
    """Parse a recipe and build its trainer, module and data, without running anything.

    Args:
        words: `--config FILE` (or a packaged recipe's name) and `--key.sub=value` words.

    Raises:
        ValueError: For any mistake in the recipe, naming the key and the rule.
    """
    words = with_recipe_paths(words)
    _refuse_other_files(words)
    _find_own_classes(words)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(_no_advertisement)
    # One may well be on a cluster's login node, or in an allocation, without `srun`.
    warnings.filterwarnings("ignore", message="The `srun` command is available")
    # Lightning's own use of torch, and its advice about a run of a few batches.
    warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", message="The number of training batches")
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
    # The modules check on the host and copy beside the computation; the datamodules have no such
    # hooks.
    warnings.filterwarnings("ignore", message="You have overridden `on_before_batch_transfer`")
    warnings.filterwarnings("ignore", message="You have overridden `transfer_batch_to_device`")
    # DeepSpeed's and Lightning's own barriers, on the device that Lightning has chosen.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under")
    # Metrics are computed over all ranks before they are logged.
    warnings.filterwarnings("ignore", message=r"It is recommended to use `self.log\('(val|test)/")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        try:
            cli = RecipeCLI(
                LightningModule,
                LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                save_config_callback=None,
                seed_everything_default=0,
                trainer_defaults=TRAINER_DEFAULTS,
                parser_kwargs={"parser_mode": "omegaconf+"},
                run=False,
                args=words,
            )
            cli.words = words
            return cli
        except ValueError as error:  # what a class says of its arguments comes wrapped
            raise ValueError(shorten(str(error))) from error


def _recipes(words: list[str]) -> list[str]:
    files = [word.partition("=")[2] for word in words if word.startswith(("--config=", "-c="))]
    return files + [file for word, file in pairwise(words) if word in ("--config", "-c")]


def _refuse_other_files(words: list[str]) -> None:
    """Name a file that is no recipe; the parser's own word for one is `Unexpected config`."""
    for file in _recipes(words):
        try:
            content = yaml.safe_load(Path(file).read_text())
        except (OSError, yaml.MarkedYAMLError):
            continue  # the parser says what and where
        except (UnicodeDecodeError, yaml.YAMLError):
            raise ValueError(
                f"--config {file} is no text; it must be a recipe in YAML (`eva02-at recipes`)"
            ) from None
        if not isinstance(content, dict):
            kind = "empty" if content is None else f"a {type(content).__name__}"
            raise ValueError(
                f"--config {file} is {kind}; a recipe is a mapping with the keys model, data and "
                "trainer (`eva02-at recipes show NAME` prints one)"
            )


def _find_own_classes(words: list[str]) -> None:
    """Let a recipe name classes in files beside it, or where the command is run.

    A console script looks in its own folder instead. Theirs come last: they hide nothing.
    """
    files = _recipes(words)
    for folder in (*(Path(file).resolve().parent for file in files), Path.cwd()):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


def _no_advertisement(record: logging.LogRecord) -> bool:
    return "Tip:" not in record.getMessage() and "TPU available" not in record.getMessage()
