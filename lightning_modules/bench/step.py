"""`eva02-at bench step`: a training step against the same step as AVION's users run it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.bench import baselines
from lightning_modules.bench.timing import (
    Row,
    add_clock_argument,
    add_output_argument,
    chosen_clock,
    compare,
    report,
)
from lightning_modules.models import PRESETS, DualEncoder

TEMPERATURE = 0.05
Forward = Callable[[DualEncoder, Tensor, Tensor], tuple[Tensor, Tensor]]


def main(argv: list[str]) -> int:
    """Run the bench.

    Args:
        argv: --depth N (blocks of either tower), --batch B, --frames T, --rounds R, --compile,
            --cpu-time, --json FILE.
    """
    parser = argparse.ArgumentParser(prog="eva02-at bench step", description=__doc__)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="add a row with compiled blocks")
    add_clock_argument(parser)
    add_output_argument(parser)
    args = parser.parse_args(argv)
    rows = _step(args, chosen_clock(args))
    report(rows, args.json)
    return 0


def _ours(model: DualEncoder, video: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return model.visual(video), model.text(tokens)


def _field(explicit: bool, recompute: bool = True) -> Forward:
    def forward(model: DualEncoder, video: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        options = {"explicit": explicit, "recompute": recompute}
        return (
            baselines.encode_video(model.visual, video, **options),
            baselines.encode_text(model, tokens, **options),
        )

    return forward


def _loss(video: Tensor, text: Tensor) -> Tensor:
    """Bidirectional InfoNCE."""
    logits = F.normalize(video, dim=-1) @ F.normalize(text, dim=-1).t() / TEMPERATURE
    target = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.t(), target)) / 2


class _Step:
    """One optimiser step of a model of its own; all start from the same seed."""

    def __init__(self, forward: Forward, depth: int, frames: int, *, fused: bool) -> None:
        torch.manual_seed(0)
        preset = PRESETS["eva02_at_base_16"]
        config = replace(
            preset,
            embed_dim=256,
            vision=replace(preset.vision, depth=depth, num_frames=frames),
            text=replace(preset.text, depth=depth),
        )
        self.model = DualEncoder(config).train()
        self.forward = forward
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-5, fused=fused or None)
        self.losses: list[float] = []

    def __call__(self, video: Tensor, tokens: Tensor) -> None:
        loss = _loss(*self.forward(self.model, video, tokens))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())


def _step(args: argparse.Namespace, clock: Callable[[], float]) -> list[Row]:
    depth, batch, frames = args.depth, args.batch, args.frames
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (batch, 3, frames, 224, 224), generator=generator)
    video = video.to(torch.uint8)
    tokens = torch.randint(1, 49406, (batch, 77), generator=generator)
    tokens[:, 20] = 49407
    # As our data path pads: to a multiple of 16 above the longest narration.
    short = tokens[:, :32].contiguous()
    steps = {
        "AVION-style, softmax": _Step(_field(explicit=True), depth, frames, fused=False),
        "AVION-style, SDPA": _Step(_field(explicit=False), depth, frames, fused=False),
        "SDPA, no recomputation": _Step(_field(False, recompute=False), depth, frames, fused=False),
        "this project": _Step(_ours, depth, frames, fused=True),
    }
    if args.compile:
        step = steps["this project, compiled"] = _Step(_ours, depth, frames, fused=True)
        for block in (*step.model.visual.blocks, *step.model.text.blocks):
            block.compile()
    ours = [name for name in steps if name.startswith("this project")]
    cases = {
        name: (lambda step=step, words=short if name in ours else tokens: step(video, words))
        for name, step in steps.items()
    }
    title = f"step, depth {depth}, {batch} x {frames} frames"
    rows = compare(title, cases, rounds=args.rounds, memory=True, clock=clock)
    for row in rows:
        losses = steps[row.name].losses
        row.notes["loss"] = f"{losses[0]:.5f} -> {losses[args.rounds]:.5f}"
    return rows
