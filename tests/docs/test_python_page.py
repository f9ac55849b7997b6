"""The page for Python users runs from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from small_videos import write_video

from lightning_modules.checkpoints.model_config import config_to_json
from lightning_modules.models import build_dual_encoder

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_every_block_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = build_dual_encoder("eva02_at_tiny")
    Path("eva02_at.json").write_text(config_to_json(model.config))
    from safetensors.torch import save_file

    save_file(model.state_dict(), "eva02_at.safetensors")
    write_video(Path("kitchen.mp4"), 60)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    space: dict[str, object] = {"__name__": "page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{PAGE.name}, block {number}", "exec"), space)
    told = capsys.readouterr().out
    assert "tensors loaded" in told and "kitchen.mp4: " in told
    assert Path("copy.safetensors").is_file()
    assert torch.isfinite(space["trainer"].callback_metrics["train/loss"])
