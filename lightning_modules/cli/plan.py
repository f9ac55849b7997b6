"""`eva02-at plan`: memory, time and cost of a recipe on a cluster, before anybody queues it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import torch

from datamodules.files import write_atomically
from lightning_modules.packaged import with_recipe_paths
from lightning_modules.planning.costs import ClusterConfig
from lightning_modules.planning.plan import describe, make_plan
from lightning_modules.planning.store import StoreConfig
from lightning_modules.training.closing import close
from lightning_modules.training.recipe import RecipeParser, build_cli

# the recipe is only read: nothing of this machine may matter
_HERE = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
    "--trainer.logger=false",
]


def _parser() -> RecipeParser:
    parser = RecipeParser(prog="eva02-at plan", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", action="append", required=True, help="recipe; may be repeated")
    parser.add_argument("--cluster", type=ClusterConfig, default=ClusterConfig())
    parser.add_argument(
        "--clips",
        type=int | None,
        help="clips an epoch; else the manifests', or the data sets' own",
    )
    parser.add_argument("--epochs", type=int | None, help="instead of the recipe's max_epochs")
    parser.add_argument(
        "--doctor",
        help="what `eva02-at doctor --json` wrote on the cluster: measured instead of assumed",
    )
    parser.add_argument(
        "--store",
        type=StoreConfig | None,
        help="shards in an object store: bytes, requests and waiting of an epoch",
    )
    parser.add_argument("--json", type=str | None, help="write the plan to this file as well")
    return parser


def main(argv: list[str]) -> int:
    """Plan a recipe.

    Args:
        argv: Options of the command; further `--key=value` words change the recipe.

    Returns:
        The exit code: 0, also where nothing fits (the table says so).
    """
    parser = _parser()
    known = with_recipe_paths([word for word in argv if not _is_recipe_word(word)])
    known = _with_measurements(known)
    try:
        given = parser.parse_args(known)
    except SystemExit as stop:
        return int(stop.code or 0)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # what it would run on is not the point
    configs = [word for path in given.config for word in ("--config", path)]
    with torch.device("meta"):
        cli = build_cli([*configs, *(w for w in argv if _is_recipe_word(w)), *_HERE])
    made = parser.instantiate_classes(given)
    plan = make_plan(cli, made.cluster, given.clips, given.epochs, made.store)
    print(describe(plan))
    if given.json:
        write_atomically(Path(given.json), json.dumps(plan, indent=2) + "\n")
    close("submit", *configs, "--nodes", "N", "--dry-run", wrote=(given.json,))
    return 0


def _is_recipe_word(word: str) -> bool:
    return word.startswith(("--model.", "--data.", "--data_dir=", "--trainer."))


def _with_measurements(words: list[str]) -> list[str]:
    """Put `--cluster.NAME=VALUE` in the place of `--doctor FILE`: later words override earlier."""
    out: list[str] = []
    rest = iter(words)
    for word in rest:
        if word.split("=")[0] != "--doctor":
            out.append(word)
            continue
        file = Path(word.split("=", 1)[1] if "=" in word else next(rest, ""))
        measured = json.loads(file.read_text()).get("cluster")
        if not measured:
            raise ValueError(
                f"{file} has no measurement of a GPU in it; write it with `eva02-at doctor --json` "
                "on a node of the cluster"
            )
        out += [f"--cluster.{name}={value}" for name, value in measured.items()]
    return out
