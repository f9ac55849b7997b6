"""Runs with checkpoints as training leaves them, whose weights are a few letters."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lightning_modules.training.run.checkpoint_store import (
    STATE,
    CheckpointFolder,
    Manifest,
    checkpoint_name,
    file_record,
)

RECIPE = """
model:
  class_path: lightning_modules.pretrain.PretrainModule
  init_args:
    model: {preset: eva02_at_tiny}
"""


def write_checkpoint(run: Path, step: int, content: str) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(RECIPE)
    folder = CheckpointFolder(run / "checkpoints")
    temporary = folder.begin(checkpoint_name(step))
    (temporary / STATE).write_text(content)
    record = file_record(temporary, temporary / STATE)
    return folder.commit(checkpoint_name(step), Manifest(step, 0, 1, "plain", files=[record]))


def write_program(folder: Path) -> Path:
    """The stub as one executable file."""
    program = folder / "program"
    script = Path(__file__).with_name("stub_program.py")
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {script} "$@"\n')
    program.chmod(0o755)
    return program


def results(sweep: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((sweep / "results").glob("*.json"))]
