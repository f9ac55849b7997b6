"""Runs as they lie on the disk: their state, step, speed and best figure. Imports nothing heavy."""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_modules.training.run.checkpoint_store import CheckpointFolder, Manifest
from lightning_modules.training.run.owner import FOLDER, RunOwnership

ENDED = "ended.json"  # written when a run has come to the end that its recipe names
_TAIL_BYTES = 1 << 16  # of a log: its last rows


@dataclass(frozen=True)
class RunState:
    """A run in a line.

    Attributes:
        path: The run's folder.
        state: `running`, `finished`, `stopped` (goes on with the same command), `died` (its process
            went without giving the folder back; goes on likewise) or `no checkpoint`.
        step: Of the newest checkpoint that can be read, or the log's where it is further.
        total: Steps or epochs that the recipe asks for, in words.
        clips_per_s: The last logged.
        best: The monitored metric's best value over the checkpoints that are kept.
        monitor: Its name.
        owner: Who works in it.
        changed_s: Seconds since the log was last written to.
    """

    path: Path
    state: str
    step: int | None
    total: str
    clips_per_s: float | None
    best: float | None
    monitor: str
    owner: str
    changed_s: float | None


def find_runs(root: Path) -> list[Path]:
    """Folders below `root` (itself included) that hold a run.

    Raises:
        ValueError: There is none.
    """
    found = sorted({p.parent for p in root.rglob("config.yaml") if _is_run(p.parent)})
    if not found:
        raise ValueError(f"no run in {root}: no folder with a config.yaml and logs or checkpoints")
    return found


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_dir() for name in ("checkpoints", "logs", FOLDER))


def read_run(folder: Path) -> RunState:
    """Read a run's state without touching it."""
    config = _config(folder)
    section = config.get("checkpoints") or {}
    store = CheckpointFolder(section.get("dirpath") or folder / "checkpoints")
    manifests = list(_manifests(store))
    monitor = section.get("monitor") or ""
    values = [v for m in manifests if (v := m.metrics.get(monitor)) is not None and v == v]
    best = (min if section.get("mode") == "min" else max)(values, default=None)
    last = _last_row(folder / "logs" / "metrics.csv")
    newest = manifests[-1] if manifests else None
    steps = [newest.step] if newest else []
    steps += [int(last["step"])] if last.get("step") else []
    ownership = RunOwnership(folder)
    owner = ownership.owner()
    trainer = config.get("trainer") or {}
    if owner is not None:
        state = "running"
    elif newest is None:
        state = "no checkpoint"
    elif _is_finished(folder, newest, trainer):
        state = "finished"
    else:
        state = "stopped" if ownership.was_released() else "died"
    return RunState(
        folder,
        state,
        max(steps, default=None),
        _total(trainer),
        float(last["speed/clips_per_s"]) if last.get("speed/clips_per_s") else None,
        best,
        monitor,
        str(owner) if owner else "",
        _age_s(folder / "logs" / "metrics.csv"),
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load((folder / "config.yaml").read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def _manifests(store: CheckpointFolder) -> Iterable[Manifest]:
    """Those that can be read, by step."""
    found = []
    for name in store.names():
        try:
            found.append(Manifest.read(store.root / name))
        except ValueError:
            continue
    return sorted(found, key=lambda manifest: manifest.step)


def _last_row(path: Path) -> dict[str, str]:
    """The last value of each column of a log's tail; a speed is not logged at every step."""
    try:
        with path.open("rb") as file:
            header = file.readline()
            start = file.tell()
            file.seek(max(start, path.stat().st_size - _TAIL_BYTES))
            tail = file.read().decode(errors="replace").splitlines()
            tail = tail if file.tell() - start <= _TAIL_BYTES else tail[1:]
    except OSError:
        return {}
    last: dict[str, str] = {}
    for row in csv.DictReader(tail, fieldnames=next(csv.reader([header.decode()]), [])):
        last |= {str(key): value for key, value in row.items() if value and key}
    return last


def _is_finished(folder: Path, newest: Manifest, trainer: dict[str, Any]) -> bool:
    """Whether the run ended by itself, at its newest checkpoint and under today's limits."""
    try:
        ended = json.loads((folder / ENDED).read_text())
    except (OSError, ValueError):
        return False
    wanted = {"max_steps": trainer.get("max_steps", -1), "max_epochs": trainer.get("max_epochs")}
    return ended == {"step": newest.step, **wanted}


def _total(trainer: dict[str, Any]) -> str:
    if (trainer.get("max_steps") or -1) > 0:
        return f"{trainer['max_steps']:,} steps"
    return f"{trainer['max_epochs']} epochs" if trainer.get("max_epochs") else ""


def _age_s(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def as_table(runs: Iterable[RunState], root: Path) -> str:
    """Lay runs out, a line each."""
    head = ("run", "state", "step", "of", "clips/s", "best", "written", "owner")
    rows = [head]
    for run in runs:
        best = "" if run.best is None else f"{run.monitor} {run.best:.2f}"
        rows.append(
            (
                str(run.path.relative_to(root)) if run.path != root else root.name or ".",
                run.state,
                "" if run.step is None else f"{run.step:,}",
                run.total,
                "" if run.clips_per_s is None else f"{run.clips_per_s:,.0f}",
                best,
                "" if run.changed_s is None else _ago(run.changed_s),
                run.owner,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def _ago(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{math.floor(seconds / length)} {unit} ago"
    return f"{math.floor(seconds)} s ago"
