"""Help of `fit`, `validate`, `test` and `predict`, read from the classes' sources.

Building the real parser imports torch and Lightning, seconds for a page of which a reader wants a
line. The docstrings and defaults are in the source files: parsing those needs neither.
"""

from __future__ import annotations

import ast
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import docstring_parser

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Section:
    """Keys of a recipe that one class takes.

    Attributes:
        title: Over the section.
        prefix: In front of each key, `--data.` say.
        files: Source files of the class and the bases that share its arguments.
        owners: Names of the classes, in the same order.
        common: What the short help shows; the rest is shown by `--help.NAME`.
    """

    title: str
    prefix: str
    files: tuple[str, ...]
    owners: tuple[str, ...]
    common: tuple[str, ...]


@dataclass(frozen=True)
class Key:
    """One key: its name after the prefix, its default as written in the source, its meaning."""

    name: str
    default: str | None
    text: str


_MODULES = (
    "lightning_modules/base.py",
    "lightning_modules/recognition.py",
)
SECTIONS: dict[str, tuple[Section, ...]] = {
    "model": (
        Section(
            "model",
            "--model.",
            _MODULES,
            ("DualEncoderModule", "RecognitionModule"),
            ("init_checkpoint", "micro_batch"),
        ),
        Section(
            "the encoders",
            "--model.model.",
            ("lightning_modules/models/config.py",),
            ("ModelConfig",),
            ("preset", "embed_dim", "num_frames", "temporal", "activation_checkpointing"),
        ),
        Section(
            "optimiser",
            "--model.optimizer.",
            ("lightning_modules/training/optim/optimizers.py",),
            ("OptimizerConfig",),
            ("name", "lr", "weight_decay", "schedule", "warmup_epochs"),
        ),
    ),
    "data": (
        Section(
            "data",
            "--data.",
            ("datamodules/module.py", "datamodules/pretrain.py", "datamodules/retrieval.py"),
            ("StreamDataModule", "PretrainDataModule", "RetrievalDataModule"),
            ("train", "val", "global_batch_size", "eval_batch_size", "image_size", "num_workers"),
        ),
    ),
    "run": (
        Section(
            "checkpoints",
            "--checkpoints.",
            ("lightning_modules/training/run/checkpointing.py",),
            ("SafeCheckpoints",),
            ("every_n_steps", "every_minutes", "keep_last", "keep_best", "monitor"),
        ),
        Section(
            "who works in the run's folder",
            "--owner.",
            ("lightning_modules/training/run/ownership.py",),
            ("RunOwner",),
            (),
        ),
        Section(
            "a recipe that has changed since",
            "--settings.",
            ("lightning_modules/training/run/settings.py",),
            ("SameSettings",),
            ("on_change",),
        ),
        Section(
            "damaged data over all ranks",
            "--data_faults.",
            ("lightning_modules/training/run/data_faults.py",),
            ("DataFaults",),
            (),
        ),
        Section(
            "losses that are not finite",
            "--finite.",
            ("lightning_modules/training/monitor/health.py",),
            ("FiniteGuard",),
            ("policy",),
        ),
        Section(
            "progress",
            "--progress.",
            ("lightning_modules/training/monitor/progress.py",),
            ("RunProgress",),
            ("every_s",),
        ),
        Section(
            "runs that hang",
            "--watchdog.",
            ("lightning_modules/training/run/watchdog.py",),
            ("StallWatchdog",),
            (),
        ),
    ),
}
# Lightning's own, in its own words where they are short; `--help.all` has every one.
TRAINER = (
    Key("devices", "auto", "GPUs (or processes) a node."),
    Key("num_nodes", "1", "Nodes."),
    Key("accelerator", "auto", "cpu, gpu or auto."),
    Key("strategy", "auto", "Better: --config configs/strategy/NAME.yaml."),
    Key("precision", "32-true", "bf16-mixed on GPUs."),
    Key("max_epochs", None, "Epochs to train."),
    Key("max_steps", "-1", "Optimiser steps to train; -1 leaves it to the epochs."),
    Key("max_time", None, "DD:HH:MM:SS after which the run stops."),
    Key("accumulate_grad_batches", "1", "Batches to an optimiser step."),
    Key("gradient_clip_val", None, "Greatest norm of the gradient."),
    Key("check_val_every_n_epoch", "1", "Epochs between validations."),
    Key("log_every_n_steps", "10", "Steps between rows of the log."),
)
RUN = (
    Key("config", None, "A recipe (YAML); may be repeated, later files override earlier ones."),
    Key("run_dir", "runs/default", "Everything the run writes; `fit` goes on from what is there."),
    Key("data_dir", "data", "Root for the recipe's ${data_dir}."),
    Key("ckpt_path", None, "Checkpoint to resume or evaluate."),
    Key("seed_everything", "0", "Of weights, order, crops and texts."),
)
TOPICS = (*SECTIONS, "trainer")


def keys_of(section: Section) -> list[Key]:
    """Read a section's keys from the sources, each once."""
    found: dict[str, Key] = {}
    for file, owner in zip(section.files, section.owners, strict=True):
        for key in _documented(_ROOT / file, owner):
            found.setdefault(key.name, key)
    return list(found.values())


def _documented(path: Path, owner: str) -> Iterator[Key]:
    tree = ast.parse(path.read_text())
    node = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == owner)
    defaults = _defaults(node)
    for parameter in docstring_parser.parse(ast.get_docstring(node) or "").params:
        if parameter.arg_name in defaults:
            text = " ".join((parameter.description or "").split())
            yield Key(parameter.arg_name, defaults[parameter.arg_name], text)


def _defaults(node: ast.ClassDef) -> dict[str, str | None]:
    """Arguments of a class with the source of their defaults: of `__init__`, or a dataclass's."""
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == "__init__":
            arguments = [*item.args.args[1:], *item.args.kwonlyargs]
            missing = len(item.args.args) - len(item.args.defaults)
            values: list[ast.expr | None] = [None] * (missing - 1)
            values += [*item.args.defaults, *item.args.kw_defaults]
            return {a.arg: _source(v) for a, v in zip(arguments, values, strict=True)}
    fields = (i for i in node.body if isinstance(i, ast.AnnAssign))
    return {f.target.id: _source(f.value) for f in fields if isinstance(f.target, ast.Name)}


def _source(value: ast.expr | None) -> str | None:
    if value is None:
        return None
    source = ast.unparse(value)
    return {"None": "null", "True": "true", "False": "false"}.get(source, source.strip("'\""))


def short_help(verb: str) -> str:
    """What somebody who has a recipe sets, a line a key, and where the rest is told."""
    parts = [
        f"usage: eva02-at {verb} --config RECIPE.yaml [--config MORE.yaml ...] [--key=value ...]",
        _rows("the run", "--", RUN),
    ]
    for sections in SECTIONS.values():
        parts += [_section(s, s.common) for s in sections if s.common]
    parts.append(_rows("trainer", "--trainer.", TRAINER))
    more = ", ".join(f"`--help.{topic}`" for topic in TOPICS)
    parts.append(
        f"The rest: {more}; `--help.all` is every key with its type; `--print_config` prints the "
        "recipe as it is resolved."
    )
    return "\n\n".join(parts)


def topic_help(topic: str) -> str:
    """Every key of one part of a recipe.

    Raises:
        ValueError: No such part.
    """
    if topic == "trainer":
        more = "\n\nThese are Lightning's; it has more: `--help.all`."
        return _rows("trainer", "--trainer.", TRAINER) + more
    if topic not in SECTIONS:
        raise ValueError(f"no help on {topic!r}; one of: {', '.join(TOPICS)}, all")
    return "\n\n".join(_section(section, None) for section in SECTIONS[topic])


def _section(section: Section, names: tuple[str, ...] | None) -> str:
    keys = {key.name: key for key in keys_of(section)}
    if names is None:
        return _rows(section.title, section.prefix, list(keys.values()))
    short = [replace(keys[name], text=_first_sentence(keys[name].text)) for name in names]
    return _rows(section.title, section.prefix, short)


def _first_sentence(text: str) -> str:
    return text.partition(". ")[0].rstrip(".") + "."


def _rows(title: str, prefix: str, keys: tuple[Key, ...] | list[Key]) -> str:
    indent = 4 + max(len(prefix + key.name) for key in keys)
    width = max(60, min(110, shutil.get_terminal_size().columns))
    lines = [f"{title}:"]
    for key in keys:
        default = "" if key.default is None else f" ({key.default})"
        name = f"  {prefix}{key.name}".ljust(indent)
        lines += textwrap.wrap(
            key.text + default, width, initial_indent=name, subsequent_indent=" " * indent
        )
    return "\n".join(lines)
