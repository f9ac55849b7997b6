"""`eva02-at recipes`: the recipes and batch scripts that come with the package."""

from __future__ import annotations

import sys
from pathlib import Path

from datamodules.files import write_atomically
from lightning_modules.cli.parser import CommandParser
from lightning_modules.packaged import find_recipe, folder, recipe_names, script_names
from lightning_modules.training.closing import close


def main(argv: list[str]) -> int:
    """List, show or copy what is packaged.

    Args:
        argv: Words after `eva02-at recipes`.

    Raises:
        ValueError: Unknown words, or a copy would overwrite a file.
    """
    parser = CommandParser(
        "recipes",
        "Without words: list the recipes that `--config NAME` finds, and the batch scripts.",
    )
    parser.add_argument("action", nargs="?", choices=("show", "copy"), help="print or copy one")
    parser.add_argument("name", nargs="?", help="as listed")
    parser.add_argument("to", nargs="?", type=Path, help="of copy: a file or folder (here)")
    options = parser.parse_args(argv)
    if options.action is None:
        print(_listing())
        close("recipes", "copy", "NAME")
    elif options.name is None:
        raise ValueError(f"{options.action} needs a name; `eva02-at recipes` lists them")
    elif options.action == "show":
        print(_find(options.name).read_text(), end="")
        close("recipes", "copy", options.name)
    else:
        copy = _copy(_find(options.name), options.to or Path())
        fit = ("fit", "--config", copy, "--data_dir=DIR", "--run_dir=DIR")
        script = copy.suffix != ".yaml"
        close(*("submit", "--help") if script else fit, wrote=(copy,))
    return 0


def _listing() -> str:
    """Every name with the first sentence of its first comment."""
    names = [*recipe_names(), *script_names()]
    width = max(map(len, names)) + 2
    return "\n".join(f"{name:<{width}}{_title(_find(name))}" for name in names)


def _title(path: Path) -> str:
    lines = (line.strip("# ") for line in path.read_text().splitlines() if line.startswith("# "))
    return next(lines, "")


def _find(name: str) -> Path:
    if name in script_names():
        return folder("slurm") / name.removeprefix("slurm/")
    return find_recipe(name)


def _copy(source: Path, to: Path) -> Path:
    target = to / source.name if to.is_dir() else to
    if target.exists():
        raise ValueError(f"{target} is there already; name another path")
    write_atomically(target, source.read_text())
    return target


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
