"""Small real videos and shards, made once a session."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from datamodules.manifest import ClipRecord
from datamodules.shards import LAYOUTS, EncodeOptions, build_shards

FAST = EncodeOptions(short_side=48, preset="ultrafast")


def write_video(path: Path, seconds: float = 4.0, fps: int = 10, size=(80, 64), first: int = 0):
    """Write an mp4 whose k-th frame has mean brightness 8 + 4 * (first + k): time can be read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": "10", "preset": "ultrafast"}
        for k in range(round(seconds * fps)):
            grey = np.full((size[1], size[0], 3), min(255, 8 + 4 * (first + k)), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode())
    return path


def make_records(num_videos: int = 4, per_video: int = 8) -> list[ClipRecord]:
    return [
        ClipRecord(
            clip_id=f"v{v}_{k}",
            video_id=f"v{v}",
            start_s=0.4 * k,
            end_s=0.4 * k + 0.8,
            texts=(f"C opens drawer {v}", f"C pulls handle {k}"),
            verb_classes=((v + k) % 5,),
            noun_classes=(v, 10 + k),
        )
        for v in range(num_videos)
        for k in range(per_video)
    ]


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for v in range(4):
        write_video(folder / f"v{v}.mp4", first=5 * v)
    return folder


@pytest.fixture(scope="session")
def records() -> list[ClipRecord]:
    return make_records()


@pytest.fixture(scope="session")
def shards(tmp_path_factory, videos, records) -> Path:
    """32 clips in 4 shards; read only."""
    output = tmp_path_factory.mktemp("shards") / "set"
    build_shards(
        records,
        videos=videos,
        layout=LAYOUTS["whole"],
        output=output,
        options=FAST,
        samples_per_shard=9,
        num_workers=2,
    )
    return output
