"""How fast clips decode here and how fast a training step is: whether one can feed the other."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from datamodules.shards.build import build_shards
from datamodules.shards.layouts import LAYOUTS
from datamodules.video.encode import RECIPES
from lightning_modules.bench.data import make_records, make_stream, write_footage
from lightning_modules.bench.step import SHORT_TEXT, Step, make_batch
from lightning_modules.doctor.finding import Finding
from lightning_modules.models import PRESETS
from lightning_modules.models.config import resolve_config
from lightning_modules.planning.costs import GIB, largest_batch
from lightning_modules.training.monitor.flops import pair_flops, peak_tflops

_CLIPS, _STEPS = 24, 6
_LARGEST_BATCH = 128


def decode_clips_per_s(num_frames: int = 4, size: int = 224) -> float:
    """Clips that one core reads, verifies, decodes, crops and tokenises in a second.

    Clips of 1.5 s as `shards build --recipe pretrain` stores them, made here.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_footage(folder / "videos", 1)
            build_shards(
                make_records(1, _CLIPS),
                videos=folder / "videos",
                layout=LAYOUTS["avion"],
                output=folder / "shards",
                options=replace(RECIPES["pretrain"], preset="veryfast"),
            )
            stream = make_stream(folder / "shards", num_frames, size, "auto")
            stream[0, 0, 0]
            start = time.perf_counter()
            stream[0, 0, 0]
            return _CLIPS / (time.perf_counter() - start)
    finally:
        torch.set_num_threads(threads)


def decoding() -> Iterator[Finding]:
    """The rate of one core."""
    rate = decode_clips_per_s()
    text = f"{rate:.0f} clips/s a core (4 frames, the stored form of `shards build`)"
    yield Finding("decoding", "ok", text, figures={"decode_clips_per_s": rate})


def training_step(preset: str, device: torch.device) -> Iterator[Finding]:
    """Steps of a preset on this rank alone: forward, loss, backward, AdamW; bf16 on GPUs."""
    config = resolve_config(PRESETS[preset], embed_dim=256)
    on_gpu = device.type == "cuda"
    batch = 2
    if on_gpu:
        free = torch.cuda.mem_get_info(device)[0] / GIB
        batch = min(_LARGEST_BATCH, largest_batch(config, 0.9 * free))
        if batch < 1:
            text = f"{preset} does not fit into {free:.0f} GiB"
            yield Finding("step", "bad", text, "a smaller preset, or a GPU that nobody else uses")
            return
        torch.cuda.reset_peak_memory_stats(device)
    step = Step("ours", config, device.type, mixed=on_gpu)
    video, tokens = make_batch(config, batch, device.type)
    tokens = tokens[:, :SHORT_TEXT].contiguous()
    seconds = []
    for _ in range(2 + _STEPS if on_gpu else 3):
        _wait(device)
        start = time.perf_counter()
        step(video, tokens)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    rate = batch / sorted(seconds[1:])[len(seconds) // 2 - 1]
    text = f"{preset}, {batch} pairs of 4 frames: {rate:.1f} pairs/s"
    figures: dict[str, float | str] = {"pairs_per_s": rate}
    peak = peak_tflops(torch.cuda.get_device_name(device)) if on_gpu else None
    state, mend = "ok", ""
    if peak is not None:
        efficiency = 3 * pair_flops(config, SHORT_TEXT) * rate / (peak * 1e12)
        figures |= {"efficiency": efficiency, "gpu_tflops": peak}
        text += f", MFU {efficiency:.0%} of {peak:g} TFLOP/s"
        if efficiency < 0.1:
            state = "bad"
            mend = "see the lines on attention and Triton; is the GPU throttled, or shared?"
    if on_gpu:
        text += f", {torch.cuda.max_memory_allocated(device) / GIB:.1f} GiB"
    yield Finding("step", state, text, mend, figures)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def feeding(findings: list[Finding]) -> Iterator[Finding]:
    """Whether the cores of a GPU decode what it takes in."""
    figures = {name: value for f in findings for name, value in f.figures.items()}
    needed = {"pairs_per_s", "decode_clips_per_s", "cores_per_gpu"}
    if not needed <= set(figures):
        yield Finding("feeding", "skipped", "no GPU to feed")
        return
    taken = float(figures["pairs_per_s"])
    decoded = float(figures["decode_clips_per_s"]) * float(figures["cores_per_gpu"])
    text = f"a GPU's cores decode {decoded:.0f} clips/s, its step takes {taken:.0f}"
    if decoded < 0.5 * taken:
        mend = (
            "more cores a GPU (--cpus-per-gpu, and data.num_workers with them), clips stored at a "
            "lower rate (docs/data.md), or data.decoder=torchcodec-cuda"
        )
        yield Finding("feeding", "bad", text, mend)
    else:
        yield Finding("feeding", "ok" if decoded > taken else "note", text)
