"""A recipe on real shards, small enough for the tests."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from datamodules.manifest import ClipRecord
from datamodules.shards import LAYOUTS, EncodeOptions, build_shards

RECIPE = """
model:
  class_path: lightning_modules.pretrain.PretrainModule
  init_args:
    model: {preset: eva02_at_tiny, embed_dim: 32, num_frames: 2, image_size: 32, patch_dropout: 0.2}
    loss: {class_path: lightning_modules.losses.InfoNCELoss, init_args: {temperature: null}}
    optimizer: {lr: 1.0e-3, schedule: cosine, warmup_epochs: 0.5}
data:
  class_path: datamodules.pretrain.PretrainDataModule
  init_args:
    train: [SHARDS/manifest.json]
    val: {manifest: SHARDS/manifest.json}
    global_batch_size: 8
    eval_batch_size: 8
    num_frames: 2
    image_size: 32
    num_workers: 1
trainer:
  accelerator: cpu
  max_epochs: 3
  gradient_clip_val: 1.0
  enable_progress_bar: false
  log_every_n_steps: 1
checkpoints: {every_n_steps: 4}
"""


def write_recipe(folder: Path) -> Path:
    """Make 32 clips in 4 shards, and a recipe that trains on them."""
    path = folder / "v.mp4"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(10))
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"x264-params": "mbtree=0"}  # its bytes are not always the same
        noise = np.random.default_rng(0)
        for _ in range(60):
            frame = noise.integers(0, 256, (6, 8, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    records = [
        ClipRecord(f"v_{k}", "v", 0.15 * k, 0.15 * k + 0.6, (f"C moves thing {k}",), (k % 3,), (k,))
        for k in range(32)
    ]
    build_shards(
        records,
        videos=folder,
        layout=LAYOUTS["whole"],
        output=folder / "shards",
        options=EncodeOptions(short_side=48, preset="ultrafast"),
        samples_per_shard=8,
        num_workers=1,
    )
    file = folder / "recipe.yaml"
    file.write_text(RECIPE.replace("SHARDS", str(folder / "shards")))
    return file
