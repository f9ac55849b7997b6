"""Which weights an evaluation scores, and what its results say of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_modules.checkpoints.source import CheckpointSource, find_checkpoint
from lightning_modules.training.recipe import RecipeCLI
from lightning_modules.training.run.checkpoint_store import CheckpointFolder

# Arguments of a DataModule that do not change what is scored.
_NOT_PROTOCOL = (
    "accept_changed_data",
    "cache_dir",
    "cache_gb",
    "eval_batch_size",
    "global_batch_size",
    "lanes",
    "max_fault_rate",
    "num_workers",
    "prefetch",
    "seed",
    "shuffle_window",
)


def load_weights(cli: RecipeCLI) -> CheckpointSource:
    """Put weights into the recipe's module: those named, else the run's newest, else its initial.

    They are read as `convert` reads them, so that no optimiser, no training data and no strategy
    of the run is needed.

    Raises:
        ValueError: There are none, or they are another model's.
    """
    given, initial = cli.config.ckpt_path, getattr(cli.model, "init_checkpoint", None)
    root = cli.config.checkpoints.dirpath or Path(cli.config.run_dir) / "checkpoints"
    if given is None and CheckpointFolder(root).candidates():
        given, which = root, ", the run's newest"
    elif given is None and initial is not None:
        return find_checkpoint(initial)  # which the module loads by itself, and says so
    elif given is None:
        raise ValueError(
            f"there is nothing to evaluate: no checkpoint in {root}, and neither --ckpt_path nor "
            "model.init_checkpoint names one"
        )
    else:
        which = ""
    source = find_checkpoint(given)
    state = source.read_module()
    cli.model.init_checkpoint = None if state is not None else str(source.path)
    if state is not None:
        try:
            cli.model.load_state_dict(state)
        except RuntimeError as error:
            told = [line.strip() for line in str(error).splitlines()[1:4]]
            raise ValueError(
                f"checkpoint {source.path} is of another model than the recipe's: "
                f"{' '.join(told)} Mend: the recipe and options that trained it stand in its "
                "config.yaml"
            ) from None
        rank_zero_info(f"weights of {source.path}{which}")
    return source


def provenance(verb: str, cli: RecipeCLI, source: CheckpointSource) -> dict[str, Any]:
    """What results are of: the weights, by name and hash, and the data, as plain data."""
    data = cli.config.data.as_dict()
    arguments = {
        name: value
        for name, value in data.get("init_args", {}).items()
        if name not in _NOT_PROTOCOL and not name.startswith("train")
    }
    stated = {
        "weights": {
            "path": str(source.path),
            "step": source.step,
            "sha256": source.content_hash(),
        },
        "protocol": {"verb": verb, "data": data.get("class_path"), **arguments},
    }
    return json.loads(json.dumps(stated, default=str))


def result_path(path: Path, record: Path, stated: dict[str, Any]) -> Path:
    """Where results go: `path`, or a name of their own if that holds other weights' results.

    Args:
        path: The usual place.
        record: The JSON that says what lies there.
        stated: From `provenance`.
    """
    if not path.exists():
        return path
    try:
        held = json.loads(record.read_text())
        if _identity(held) == _identity(stated):
            return path
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing says what it is
    digest = hashlib.sha256(json.dumps(_identity(stated), sort_keys=True).encode()).hexdigest()
    name = Path(stated["weights"]["path"]).stem
    return path.with_name(f"{path.stem}-{name}-{digest[:8]}{path.suffix}")


def _identity(stated: dict[str, Any]) -> list[Any]:
    """The same weights may lie elsewhere by now."""
    return [stated["weights"]["sha256"], stated["protocol"]]
