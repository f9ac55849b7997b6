"""The recipes and batch scripts that come with the package, wherever it is installed.

A checkout has them at its top, as `configs/` and `slurm/`; a wheel carries the same folders beside
this file.
"""

from __future__ import annotations

import difflib
from importlib import metadata
from pathlib import Path

_BESIDE = Path(__file__).parent
RECIPE_OPTIONS = ("--config", "-c", "--cluster")  # whose values may be a packaged recipe's name


def version() -> str:
    """The project's version; a checkout on PYTHONPATH has none and says so."""
    try:
        return metadata.version("eva02-at")
    except metadata.PackageNotFoundError:
        return f"not installed, run from {_BESIDE.parent}"


def folder(name: str) -> Path:
    """Return the folder "configs" or "slurm" of this installation."""
    beside = _BESIDE / name
    return beside if beside.is_dir() else _BESIDE.parent / name


def recipe_names() -> list[str]:
    """Names of the packaged recipes and overlays: `mir/eva02_at_base_sms`."""
    configs = folder("configs")
    return sorted(
        str(path.relative_to(configs).with_suffix("")) for path in configs.rglob("*.yaml")
    )


def script_names() -> list[str]:
    """Names of the packaged batch scripts: `slurm/env.sh`."""
    return sorted(f"slurm/{path.name}" for path in folder("slurm").iterdir() if path.is_file())


def find_recipe(name: str) -> Path:
    """Find a recipe by its path or, where no such file is, by its packaged name.

    Args:
        name: A file; or `mir/eva02_at_base_sms`, also as it lies in a checkout:
            `configs/mir/eva02_at_base_sms.yaml`.

    Raises:
        FileNotFoundError: Neither is there; the nearest packaged names are told.
    """
    if Path(name).is_file():
        return Path(name)
    known = recipe_names()
    short = name.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
    if short in known:
        return folder("configs") / f"{short}.yaml"
    near = difflib.get_close_matches(short, known, n=3, cutoff=0.5)
    told = f"; near it: {', '.join(near)}" if near else ""
    raise FileNotFoundError(
        f"{name} is neither a file nor a packaged recipe (`eva02-at recipes` lists them){told}"
    )


def with_recipe_paths(words: list[str]) -> list[str]:
    """Return a command's words with each recipe's name replaced by its file.

    Args:
        words: As typed: `--config NAME`, `--config=NAME`, `-c NAME`, among others.

    Raises:
        FileNotFoundError: A name is neither a file nor a packaged recipe.
    """
    done: list[str] = []
    for number, word in enumerate(words):
        option, separator, value = word.partition("=")
        if number and words[number - 1] in RECIPE_OPTIONS and not word.startswith(("-", "{")):
            done.append(str(find_recipe(word)))
        elif option in RECIPE_OPTIONS and separator and not value.startswith("{"):
            done.append(f"{option}={find_recipe(value)}")
        else:
            done.append(word)
    return done
