"""What a path given as a checkpoint is: a file, a run, a checkpoint of a run, a DeepSpeed folder.

RUN/config.yaml                          the resolved recipe of the last `fit`
RUN/checkpoints/step-00000400/           complete where its manifest is there and fits
  state                                  a Lightning file, or a folder of DeepSpeed's
  config.yaml                            the recipe it was trained with: says which model it is
  ema.safetensors                        the average of the weights, if the run keeps one
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lightning_modules.checkpoints import read_checkpoint
from lightning_modules.checkpoints.hub import CONFIG, fetch, is_on_hub
from lightning_modules.checkpoints.layouts import unwrap
from lightning_modules.checkpoints.model_config import has_model_section, is_description
from lightning_modules.checkpoints.zero import consolidate, is_deepspeed_folder
from lightning_modules.training.run.checkpoint_store import (
    MANIFEST,
    STATE,
    CheckpointFolder,
    Manifest,
    check_contents,
    check_sizes,
    is_of_the_machine,
)

log = logging.getLogger(__name__)
_MODULE = "model."  # where the dual encoder lies within our LightningModules
_EMA = "ema.safetensors"
_LIGHTNING = "pytorch-lightning_version"


@dataclass(frozen=True)
class CheckpointSource:
    """A checkpoint that was found and looks complete.

    Attributes:
        path: As it should be named to the user: the file, or the checkpoint's folder.
        data: The file or DeepSpeed folder that holds the weights.
        manifest: Of a checkpoint of our own runs.
        config: The file that describes the model, if one lies beside it.
    """

    path: Path
    data: Path
    manifest: Manifest | None = None
    config: Path | None = None

    @property
    def step(self) -> int | None:
        """Optimiser steps done, where the checkpoint says so."""
        return None if self.manifest is None else self.manifest.step

    def read(self, *, average: bool = False) -> dict[str, Tensor]:
        """Read the weights, without running any code a file may carry.

        Args:
            average: Take the run's moving average of the weights.

        Returns:
            Key -> tensor, out of all wrappers; of a LightningModule, the dual encoder alone.

        Raises:
            ValueError: damaged, unsafe, or without the average asked for.
        """
        data = self.path / _EMA if average else self.data
        if average and not data.is_file():
            raise ValueError(f"checkpoint {self.path} holds no moving average ({_EMA})")
        self._verify(data)
        if data.is_dir():
            state: object = _dual_encoder_of(consolidate(data))
        else:
            state = read_checkpoint(data)
            if isinstance(state, Mapping) and _LIGHTNING in state:
                state = _dual_encoder_of(state["state_dict"])
            elif average:
                state = _dual_encoder_of(state)  # type: ignore[arg-type]
        try:
            return unwrap(state)
        except ValueError as error:
            raise ValueError(f"checkpoint {self.path}: {error}") from None

    def read_module(self) -> dict[str, Tensor] | None:
        """Read the whole state of the LightningModule that was trained, as `read` does.

        None where the file is of another kind: published weights, a converted model.

        Raises:
            ValueError: damaged or unsafe.
        """
        self._verify(self.data)
        if self.data.is_dir():
            return consolidate(self.data) if self.manifest is not None else None
        state = read_checkpoint(self.data)
        if isinstance(state, Mapping) and _LIGHTNING in state:
            return dict(state["state_dict"])
        return None

    def _verify(self, data: Path) -> None:
        """Compare what is about to be read with what was written."""
        if self.manifest is None:
            return
        name = str(data.relative_to(self.path))
        needed = [
            record
            for record in self.manifest.files
            if record.path == name or record.path.startswith(f"{name}/")
        ]
        check_contents(self.path, needed)

    def content_hash(self) -> str:
        """SHA-256 over the weights' bytes (as the manifest records them, where there is one)."""
        if self.manifest is not None:
            records = {r.path: r.sha256 for r in self.manifest.files}
            return hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
        digest = hashlib.sha256()
        files = [self.data] if self.data.is_file() else sorted(self.data.glob("*.pt"))
        for path in files:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def _dual_encoder_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a LightningModule's state, the model; losses and heads have keys of their own."""
    inner = {k.removeprefix(_MODULE): v for k, v in state.items() if k.startswith(_MODULE)}
    return inner or dict(state)


def find_checkpoint(path: str | Path) -> CheckpointSource:
    """Find the checkpoint that a path names.

    Args:
        path: A file of any supported format; a run's folder or its `checkpoints` (the newest
            complete one is taken; others are skipped with a warning); one checkpoint's folder; a
            DeepSpeed folder; or `hf:ORG/NAME[/FILE][@REV]` on the Hub.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: what is there is no checkpoint, or not a complete one.
    """
    path = fetch(path) if is_on_hub(path) else Path(path)
    if path.is_file():
        return CheckpointSource(path, path, config=_description_of(path))
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint {path}: no such file or folder")
    if (path / MANIFEST).is_file():
        return _complete(path)
    for folder in (path, path / "checkpoints"):
        if candidates := CheckpointFolder(folder).candidates():
            return _newest(folder, candidates)
    deepspeed = _deepspeed_folder(path)
    if deepspeed is not None:
        return CheckpointSource(path, deepspeed, config=_recipe_of(path))
    if path.name.startswith("step-"):
        raise ValueError(f"checkpoint {path} has no {MANIFEST}: it was never completed")
    raise ValueError(
        f"{path} is no checkpoint: expected a file, a run's folder with `checkpoints/step-*`, or "
        "a DeepSpeed folder (`*_model_states.pt`, or `latest` naming the folder that has them)"
    )


def _description_of(path: Path) -> Path | None:
    """What describes a file's model: the JSON of `convert`, or the recipe of the run it is in."""
    if path.suffix == ".safetensors":
        if (beside := path.with_suffix(".json")).is_file():
            return beside
        if is_description(path.with_name(CONFIG)):
            return path.with_name(CONFIG)
    return _recipe_of(path)


def complete_checkpoints(path: str | Path) -> tuple[list[CheckpointSource], dict[str, str]]:
    """List every complete checkpoint of a run, oldest first, and what is wrong with the others.

    Args:
        path: A run's folder, or its `checkpoints`. Sizes are checked, contents when read.
    """
    path = Path(path)
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found, damaged = [], {}
    for folder in sorted(p for p in root.glob("step-*") if p.is_dir()):
        try:
            found.append(_complete(folder))
        except ValueError as error:
            damaged[str(folder)] = str(error)
    return found, damaged


def _complete(folder: Path) -> CheckpointSource:
    manifest = Manifest.read(folder)
    check_sizes(folder, manifest)
    data = folder / STATE
    if data.is_dir():
        data = _deepspeed_folder(data) or data
    return CheckpointSource(folder, data, manifest, _recipe_of(folder))


def _newest(root: Path, names: list[str]) -> CheckpointSource:
    complaints = []
    for name in names:
        try:
            return _complete(root / name)
        except ValueError as error:
            if is_of_the_machine(error):
                raise
            complaints.append(str(error))
            log.warning("checkpoint skipped: %s", error)
    raise ValueError(f"no complete checkpoint in {root}: {'; '.join(complaints)}")


def _deepspeed_folder(path: Path) -> Path | None:
    """The folder with the ranks' files: this one, the one `latest` names, or the only one."""
    if is_deepspeed_folder(path):
        return path
    tagged = sorted(p for p in path.iterdir() if p.is_dir() and is_deepspeed_folder(p))
    latest = path / "latest"
    if latest.is_file():
        named = path / latest.read_text().strip()
        return named if named in tagged else None
    if len(tagged) > 1:
        raise ValueError(
            f"{path} holds several DeepSpeed checkpoints and no `latest`: name one of "
            f"{', '.join(p.name for p in tagged)}"
        )
    return tagged[0] if tagged else None


def _recipe_of(path: Path) -> Path | None:
    """The resolved recipe: the checkpoint's own, else the run's, at most three folders up."""
    for folder in (path, *list(path.resolve().parents)[:3]):
        if has_model_section(folder / "config.yaml"):
            return folder / "config.yaml"
    return None
