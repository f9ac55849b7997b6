"""A trained model on the Hub: its weights, its description and a card that says what it is."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_modules.checkpoints.conversion import Loaded
from lightning_modules.checkpoints.hub import CONFIG, WEIGHTS, push
from lightning_modules.sweep.table import figures_of

_HIDDEN = re.compile(r"(token|secret|password|api_?key)", re.I)


def model_card(name: str, loaded: Loaded, licence: str, results: Sequence[Path] = ()) -> str:
    """Write the card of a model.

    Args:
        name: `ORG/NAME`.
        loaded: The model and where it came from.
        licence: The Hub's identifier, such as `mit` or `cc-by-nc-4.0`.
        results: Files of `eva02-at evaluate --json`.

    Raises:
        ValueError: A file of results is none.
    """
    environment = Environment(
        loader=PackageLoader("lightning_modules.checkpoints", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    recipe = _recipe(loaded.source.config)
    return environment.get_template("model_card.md.j2").render(
        name=name,
        licence=licence,
        config=loaded.config,
        source=loaded.source.path.name,
        step=loaded.source.step,
        assumed=loaded.assumed,
        figures=[row for path in results for row in _figures(path)],
        data=_manifests(recipe.get("data")),
        recipe=yaml.safe_dump(recipe, sort_keys=False).rstrip() if recipe else "",
    )


def push_model(name: str, weights: Path, card: str, *, private: bool) -> str:
    """Upload what `save_model` wrote, under the names the Hub knows, and the card.

    Returns:
        The commit's address.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shutil.copyfile(weights, folder / WEIGHTS)
        shutil.copyfile(weights.with_suffix(".json"), folder / CONFIG)
        (folder / "README.md").write_text(card)
        return push(name, folder, private=private)


def _recipe(path: Path | None) -> dict[str, Any]:
    """The run's resolved recipe: model, loss, optimiser and data."""
    if path is None or path.suffix == ".json":
        return {}
    content = yaml.safe_load(path.read_text())
    kept = {key: content[key] for key in ("model", "data", "seed_everything") if key in content}
    return _public(kept)


def _public(content: Any) -> Any:
    """The same without secrets, and without where things lie on the machine."""
    if isinstance(content, dict):
        return {k: _public(v) for k, v in content.items() if not _HIDDEN.search(str(k))}
    if isinstance(content, list):
        return [_public(item) for item in content]
    if isinstance(content, str) and content.startswith("/"):
        return "/".join(("...", *Path(content).parts[-2:]))
    return content


def _manifests(content: Any) -> list[str]:
    """Every manifest that a data section names, by the folder it lies in."""
    if isinstance(content, dict):
        return [name for value in content.values() for name in _manifests(value)]
    if isinstance(content, list):
        return [name for value in content for name in _manifests(value)]
    is_manifest = isinstance(content, str) and content.endswith("manifest.json")
    return [Path(content).parent.name] if is_manifest else []


def _figures(path: Path) -> list[dict[str, str]]:
    try:
        result = json.loads(path.read_text())
        benchmark, protocol = result["benchmark"], result["protocol"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is nothing that `evaluate --json` wrote ({error!r})") from None
    return [
        {"benchmark": benchmark, "protocol": protocol, "name": name, "value": str(figure)}
        for name, figure in figures_of(result).items()
    ]
