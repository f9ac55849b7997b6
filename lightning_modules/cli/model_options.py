"""Options by which several commands name a model."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from lightning_modules.packaged import find_recipe

if TYPE_CHECKING:
    from lightning_modules.checkpoints.conversion import LoadedModel


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add what says how to read a checkpoint, for files that do not say it themselves."""
    group = parser.add_argument_group("reading the checkpoint")
    group.add_argument(
        "--config",
        metavar="FILE",
        help="the model's description: a run's config.yaml, a recipe (or its packaged name), or "
        "a converted model's JSON; by default what lies beside the checkpoint, else what its "
        "shapes tell",
    )
    group.add_argument(
        "--set",
        dest="settings",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change one field of that description, as vision.num_frames=16; may be repeated",
    )
    group.add_argument(
        "--average", action="store_true", help="take the run's moving average of the weights"
    )
    group.add_argument(
        "--drop-time-attention",
        action="store_true",
        help="read LaViLa's TimeSformer without its attention over time: a point to start from",
    )


def reading(options: argparse.Namespace) -> dict[str, Any]:
    """How to read the checkpoint, as `load_model` and `load_trained` take it."""
    return {
        "config": find_recipe(options.config) if options.config else None,
        "settings": options.settings,
        "average": options.average,
        "drop_time_attention": options.drop_time_attention,
    }


def load_from_options(options: argparse.Namespace, path: str) -> LoadedModel:
    """Load the dual encoder that the options name."""
    from lightning_modules.checkpoints.conversion import load_model

    return load_model(path, **reading(options))


def model_words(options: argparse.Namespace) -> list[str]:
    """The same options as words, for a command that another one starts."""
    words = ["--config", str(find_recipe(options.config).resolve())] if options.config else []
    words += [f"--set={setting}" for setting in options.settings]
    words += ["--average"] if options.average else []
    return words + (["--drop-time-attention"] if options.drop_time_attention else [])
