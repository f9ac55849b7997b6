"""What a run keeps of its recipe: secrets as references, and one W&B run over all its starts."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

_REFERENCE = re.compile(r"\$\{oc\.env:([A-Za-z_]\w*)")
_SHORT = 6  # letters; a value as short as a number may stand in others by accident
WANDB_ID = "wandb-id"


def with_references(text: str, words: Sequence[str]) -> str:
    """Put `${oc.env:NAME}` back where a recipe was given it: what it stands for may be a secret.

    Args:
        text: The resolved recipe, as YAML.
        words: What it was parsed from: `--config FILE` and `--key=value` words.
    """
    names = _referred(words)
    values = {name: os.environ[name] for name in names if os.environ.get(name)}
    if not values:
        return text

    def refer(content: Any) -> Any:
        if isinstance(content, dict):
            return {key: refer(value) for key, value in content.items()}
        if isinstance(content, list):
            return [refer(value) for value in content]
        if not isinstance(content, str):
            return content
        for name, value in sorted(values.items(), key=lambda item: -len(item[1])):
            if content == value:
                return f"${{oc.env:{name}}}"
            if len(value) >= _SHORT:
                content = content.replace(value, f"${{oc.env:{name}}}")
        return content

    return yaml.safe_dump(refer(yaml.safe_load(text)), sort_keys=False, allow_unicode=True)


def _referred(words: Sequence[str]) -> set[str]:
    """Names of the environment that the words, or the files they name, refer to."""
    names = set(_REFERENCE.findall(" ".join(words)))
    for number, word in enumerate(words):
        option, equals, value = word.partition("=")
        file = Path(value if equals else "".join(words[number + 1 : number + 2]))
        if option in ("--config", "-c") and file.is_file():
            names.update(_REFERENCE.findall(file.read_text()))
    return names


def one_wandb_run(logger: Any, run_dir: str) -> Any:
    """Give a W&B logger the run's folder and an id that is kept there; others are left alone.

    A requeued job would otherwise begin another W&B run at every start.
    """
    if not str(getattr(logger, "class_path", "")).endswith("WandbLogger"):
        return logger
    given = logger.init_args
    if given.get("save_dir") in (None, "."):
        given["save_dir"] = run_dir
    if given.get("id") is None and given.get("version") is None:
        file = Path(run_dir) / WANDB_ID
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                with file.open("x") as new:
                    new.write(secrets.token_hex(4))
            except FileExistsError:
                pass  # another rank of this run
        given["id"] = file.read_text().strip()
        given["resume"] = "allow"
    return logger
