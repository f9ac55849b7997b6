"""EK-100's files, shards of their clips and a checkpoint, all made in a second."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from epic_files import write_retrieval_split
from small_videos import write_video

from datamodules.annotations.formats import read_clips
from datamodules.shards import LAYOUTS, EncodeOptions, build_shards
from lightning_modules.checkpoints.model_config import config_to_json
from lightning_modules.models import DualEncoder, build_dual_encoder

NUM_CLIPS, NUM_SENTENCES = 13, 7


@lru_cache
def tiny_model() -> DualEncoder:
    torch.manual_seed(0)
    model = build_dual_encoder("eva02_at_tiny", num_frames=2).eval()
    with torch.no_grad():
        # far apart, else every clip looks the same to a random model
        for parameter in model.visual.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def make_world(folder: Path) -> tuple[Path, list, list]:
    """Fill a folder; returns it with the classes of clips and of sentences."""
    (folder / "annotations").mkdir()
    videos, texts = write_retrieval_split(folder / "annotations", "test", NUM_CLIPS, NUM_SENTENCES)
    write_video(folder / "videos" / "P01_01.mp4", 40)
    records = read_clips(folder / "annotations" / "EPIC_100_retrieval_test.csv", "ek100")
    build_shards(
        records,
        videos=folder / "videos",
        layout=LAYOUTS["whole"],
        output=folder / "shards",
        options=EncodeOptions(short_side=48, preset="ultrafast"),
        samples_per_shard=5,
    )
    model = tiny_model()
    torch.save(model.state_dict(), folder / "m.pt")
    (folder / "m.json").write_text(config_to_json(model.config))
    return folder, videos, texts
