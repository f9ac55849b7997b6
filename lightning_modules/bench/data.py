"""`eva02-at bench data`: stored forms and our reading against what AVION's users run.

One core, end to end: read, verify, decode, crop, tokenise. The baseline decodes 4 frames of a
1.5 s segment out of a 15 s chunk (512x288, GOP 30) with decord and crops on float.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import random
import tempfile
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from datamodules.manifest import ClipRecord, Manifest
from datamodules.shards.build import build_shards
from datamodules.shards.layouts import LAYOUTS
from datamodules.stream.clips import ClipOptions, TrainStream, own_text
from datamodules.stream.faults import FaultMonitor
from datamodules.stream.order import StreamOrder
from datamodules.stream.reader import Corpus, SampleReader
from datamodules.tokenizer import Tokenizer
from datamodules.video.crops import random_crop_box
from datamodules.video.decode import Decoder, check_decoder
from datamodules.video.encode import RECIPES, EncodeOptions
from lightning_modules.bench.data_planner import planner_rows
from lightning_modules.bench.timing import (
    Row,
    add_clock_argument,
    add_output_argument,
    chosen_clock,
    compare,
    report,
)
from lightning_modules.cli.parser import CommandParser

SIZE, FPS, CHUNK_S, SPAN_S = (512, 288), 30, 15, 1.5
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)

FORMS: dict[str, EncodeOptions] = {
    "recipe pretrain: 256 px, 15 fps, GOP 8": RECIPES["pretrain"],
    "the same, arithmetic coding": dataclasses.replace(RECIPES["pretrain"], fast_decode=False),
    "recipe mir: 256 px, 30 fps, GOP 8": RECIPES["mir"],
    "the same, arithmetic coding ": dataclasses.replace(RECIPES["mir"], fast_decode=False),
    "256 px, 30 fps, GOP 1": EncodeOptions(gop=1),
    "256 px, 15 fps, GOP 4": EncodeOptions(fps=15.0, gop=4),
    "256 px, 8 fps, GOP 1": EncodeOptions(fps=8.0, gop=1),
    "224 px, 15 fps, GOP 8": EncodeOptions(short_side=224, fps=15.0),
    "224 px, 8 fps, GOP 4": EncodeOptions(short_side=224, fps=8.0, gop=4),
}


def write_footage(folder: Path, num_videos: int) -> None:
    """Write 15 s chunks as AVION stores them: a head that turns in a textured scene, with noise."""
    for video in range(num_videos):
        draw = np.random.default_rng(video)
        scene = torch.full((1, 3, 900, 1600), 128.0)
        for octave, weight in ((1, 40.0), (2, 30.0), (5, 18.0), (12, 10.0)):
            grain = torch.from_numpy(draw.normal(size=(1, 3, 45 * octave, 80 * octave))).float()
            scene += weight * F.interpolate(grain, (900, 1600), mode="bicubic")
        _write_chunk(folder / f"v{video}.mp4" / "0.mp4", scene[0].clamp(0, 255), draw)


def _write_chunk(path: Path, scene: Tensor, draw: np.random.Generator) -> None:
    path.parent.mkdir(parents=True)
    image = scene.permute(1, 2, 0).numpy()
    noise = draw.normal(0, 2.5, size=(8, SIZE[1], SIZE[0], 1))
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(FPS))
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.options = {"crf": "23", "g": "30", "keyint_min": "30", "preset": "veryfast"}
        for k in range(CHUNK_S * FPS):
            # about 5 pixels a frame, and a little sway
            top = int(300 + 250 * np.sin(k / 40) + 6 * np.sin(k / 3))
            left = int(500 + 480 * np.sin(k / 55))
            view = image[top : top + SIZE[1], left : left + SIZE[0]]
            frame = np.clip(view + noise[k % 8], 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make_records(num_videos: int, num_clips: int) -> list[ClipRecord]:
    """Choose segments of `SPAN_S` seconds at random."""
    draw = random.Random(0)
    return [
        ClipRecord(
            clip_id=str(k),
            video_id=f"v{k % num_videos}",
            start_s=(start := draw.uniform(0, CHUNK_S - SPAN_S - 0.1)),
            end_s=start + SPAN_S,
            texts=(f"#C C picks up the {k} bag from the table with the left hand",),
        )
        for k in range(num_clips)
    ]


def run_baseline(folder: Path, records: list[ClipRecord], num_frames: int, size: int) -> Tensor:
    """Load clips as AVION's users do: decord on the chunk, then crop and normalise on float."""
    import decord  # what the baseline is; nothing else depends on it

    tokenizer, videos, draw = Tokenizer(), [], random.Random(1)
    for record in records:
        path = folder / f"{record.video_id}.mp4" / "0.mp4"
        reader = decord.VideoReader(str(path), num_threads=1)
        first, last = int(record.start_s * FPS), int(record.end_s * FPS)
        edges = np.linspace(first, last, num_frames + 1)
        chosen = [int(draw.uniform(a, b)) for a, b in itertools.pairwise(edges)]
        frames = torch.from_numpy(reader.get_batch(chosen).asnumpy()).float()
        video = frames.permute(0, 3, 1, 2)
        box = random_crop_box(video.shape[2], video.shape[3], draw, (0.5, 1.0))
        top, left, height, width = box
        part = video[:, :, top : top + height, left : left + width]
        video = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
        videos.append((video / 255 - MEAN) / STD)
    tokenizer([record.texts[0] for record in records])
    return torch.stack(videos)


def make_stream(folder: Path, num_frames: int, size: int, decoder: Decoder) -> TrainStream:
    """Open a built form with the code that training runs."""
    corpus = Corpus.load([str(folder)])
    order = StreamOrder(corpus.counts, global_batch_size=sum(corpus.counts))
    options = ClipOptions(num_frames, size, decoder=decoder)
    monitor = FaultMonitor(0, 0.0)
    return TrainStream(SampleReader(corpus), order, options, own_text, monitor, 0, 1)


def form_rows(options: argparse.Namespace, work: Path) -> list[Row]:
    """Build every form from the same footage and time them in turns with the baseline."""
    chunks = work / "chunks"
    write_footage(chunks, options.videos)
    records = make_records(options.videos, options.clips)
    frames, size = options.frames, options.size
    baseline = "15 s chunk, 288 px, GOP 30, float crop"
    cases: dict[str, Callable[[], object]] = {
        baseline: partial(run_baseline, chunks, records, frames, size)
    }
    stored = {baseline: sum(p.stat().st_size for p in chunks.rglob("*.mp4")) * SPAN_S / CHUNK_S}
    stored[baseline] /= options.videos
    for number, (name, form) in enumerate(FORMS.items()):
        output = work / f"form{number}"
        form = dataclasses.replace(form, preset="veryfast")
        build_shards(records, videos=chunks, layout=LAYOUTS["avion"], output=output, options=form)
        manifest = Manifest.load(output)
        sizes = np.concatenate([manifest.load_index(k).rows["video_bytes"] for k in range(1)])
        for decoder in options.decoders:
            stream = make_stream(output, frames, size, decoder)
            label = name if decoder == "decord" else f"{name}, {decoder}"
            cases[label], stored[label] = partial(stream.__getitem__, (0, 0, 0)), sizes.mean()
    group = f"{frames} frames of {SPAN_S} s"
    rows = compare(group, cases, rounds=options.rounds, clock=chosen_clock(options))
    for row in rows:
        row.notes["clips/s/core"] = round(options.clips / row.median_s, 1)
        row.notes["kB a clip"] = round(stored[row.name] / 1000)
    return rows


def main(argv: list[str]) -> int:
    """Time the stored forms, then the planner at scale.

    Args:
        argv: Words after `eva02-at bench data`.
    """
    parser = CommandParser("bench data", "Clips a second a core, and the planner at scale.")
    add = parser.add_argument
    add("--clips", type=int, default=24, help="clips a turn (%(default)s)")
    add("--videos", type=int, default=3, help="15 s chunks that they come from (%(default)s)")
    add("--frames", type=int, default=4, help="frames a clip (%(default)s)")
    add("--size", type=int, default=224, help="side of the crop (%(default)s)")
    add("--rounds", type=int, default=7, help="timed turns (%(default)s)")
    add(
        "--decoders",
        nargs="+",
        default=["decord"],
        choices=["decord", "torchcodec", "pyav"],
        help="libraries to compare (decord)",
    )
    add("--only", choices=["forms", "planner"], help="one half of the bench")
    add_clock_argument(parser)
    add_output_argument(parser)
    options = parser.parse_args(argv)
    for decoder in options.decoders:
        check_decoder(decoder)
    torch.set_num_threads(1)
    rows: list[Row] = []
    if options.only != "planner":
        with tempfile.TemporaryDirectory() as work:
            rows += form_rows(options, Path(work))
    if options.only != "forms":
        rows += planner_rows()
    report(rows, options.json)
    return 0
