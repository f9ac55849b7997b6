"""`eva02-at bench step`: a training step against the same step as AVION's users run it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import nullcontext
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
    device_name,
    report,
)
from lightning_modules.models import PRESETS, DualEncoder, DualEncoderConfig
from lightning_modules.training.monitor.flops import pair_flops, peak_tflops

TEMPERATURE = 0.05
# As our data path pads: to a multiple of 16 above the longest narration. AVION pads to 77.
SHORT_TEXT = 32
Forward = Callable[[DualEncoder, Tensor, Tensor], tuple[Tensor, Tensor]]


def main(argv: list[str]) -> int:
    """Run the bench.

    Args:
        argv: --preset NAME, --depth N (blocks of either tower; 0: all), --batch B, --frames T,
            --rounds R, --variants NAME ..., --dtype NAME, --cpu-time, --json FILE.
    """
    parser = argparse.ArgumentParser(prog="eva02-at bench step", description=__doc__)
    parser.add_argument("--preset", choices=PRESETS, default="eva02_at_base_16")
    parser.add_argument("--depth", type=int, default=2, help="blocks of either tower; 0: all")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--frames", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=["softmax", "sdpa", "kept", "ours"],
        help="ways of running the step; graphs: CUDA graphs (%(default)s)",
    )
    on_cuda = torch.cuda.is_available()
    parser.add_argument(
        "--dtype",
        choices=["float32", "bf16-mixed"],
        default="bf16-mixed" if on_cuda else "float32",
        help="bf16-mixed: under autocast, as the recipes (%(default)s)",
    )
    add_clock_argument(parser)
    add_output_argument(parser)
    args = parser.parse_args(argv)
    if "graphs" in args.variants and not on_cuda:
        raise ValueError("the variant `graphs` needs a CUDA device; leave it out")
    rows = step_rows(args, device_name(), chosen_clock(args))
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


class Step:
    """One optimiser step of a model of its own; all start from the same seed.

    Args:
        variant: A name in `VARIANTS`.
        config: The model's.
        device: Where it runs.
        mixed: Under autocast to bf16.
    """

    def __init__(self, variant: str, config: DualEncoderConfig, device: str, mixed: bool) -> None:
        torch.manual_seed(0)
        self.ours, self.forward = variant in _OURS, VARIANTS[variant][1]
        config = replace(
            config,
            activation_checkpointing=variant == "recomputed",
            compile_blocks=variant == "compiled",
        )
        with torch.device(device):
            self.model = DualEncoder(config).train()
        fused, graphs = self.ours or None, variant == "graphs"
        parameters = self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters, lr=3e-5, fused=fused, capturable=graphs)
        self.autocast = torch.autocast(device, torch.bfloat16) if mixed else nullcontext()
        self.losses: list[Tensor] = []
        self.captured_bytes: int | None = None  # a graph's memory is taken when it is recorded
        self._captured: Callable[[], Tensor] | None = None

    def loss(self, video: Tensor, tokens: Tensor) -> Tensor:
        """The forward pass."""
        with self.autocast:
            embeddings = self.forward(self.model, video, tokens)
        return _loss(*(x.float() for x in embeddings))

    def __call__(self, video: Tensor, tokens: Tensor) -> None:
        """The whole step; its loss stays on the device."""
        if self._captured is None:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self.loss(video, tokens)
            loss.backward()
            self.optimizer.step()
            self.losses.append(loss.detach())
        else:
            self.losses.append(self._captured().clone())

    def capture(self, video: Tensor, tokens: Tensor) -> None:
        """Record the step as one CUDA graph; the tensors given are those of every later step."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):  # lets libraries and Triton do what may not happen while recording
                self(video, tokens)
        torch.cuda.current_stream().wait_stream(side)
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = self.loss(video, tokens)
            loss.backward()
            self.optimizer.step()
        self.captured_bytes = torch.cuda.max_memory_allocated() - before

        def replay() -> Tensor:
            graph.replay()
            return loss.detach()

        self._captured = replay


VARIANTS: dict[str, tuple[str, Forward]] = {
    "softmax": ("AVION-style, softmax", _field(explicit=True)),
    "sdpa": ("AVION-style, SDPA", _field(explicit=False)),
    "kept": ("SDPA, no recomputation", _field(False, recompute=False)),
    "ours": ("this project", _ours),
    "recomputed": ("this project, recomputed", _ours),
    "compiled": ("this project, compiled", _ours),
    "graphs": ("this project, CUDA graph", _ours),
}
_OURS = ("ours", "recomputed", "compiled", "graphs")


def step_rows(args: argparse.Namespace, device: str, clock: Callable[[], float]) -> list[Row]:
    """Time the variants in turns."""
    preset = PRESETS[args.preset]
    config = replace(
        preset,
        embed_dim=256,
        vision=replace(
            preset.vision, depth=args.depth or preset.vision.depth, num_frames=args.frames
        ),
        text=replace(preset.text, depth=args.depth or preset.text.depth),
    )
    video, tokens = make_batch(config, args.batch, device)
    short = tokens[:, :SHORT_TEXT].contiguous()
    steps, cases = {}, {}
    for variant in args.variants:
        name = VARIANTS[variant][0]
        step = steps[name] = Step(variant, config, device, args.dtype == "bf16-mixed")
        words = short if step.ours else tokens
        if variant == "graphs":
            step.capture(video, words)
        cases[name] = lambda step=step, words=words: step(video, words)
    title = f"{args.preset}, depth {config.vision.depth}, {args.batch} x {args.frames} frames"
    rows = compare(f"{title}, {args.dtype}", cases, rounds=args.rounds, memory=True, clock=clock)
    peak = peak_tflops(torch.cuda.get_device_name()) if device == "cuda" else None
    for row in rows:
        step = steps[row.name]
        if step.captured_bytes is not None:
            row.peak_bytes = step.captured_bytes
        rate = args.batch / row.median_s
        row.notes["pairs/s"] = round(rate, 1)
        if peak:
            row.notes["mfu"] = round(3 * pair_flops(config, SHORT_TEXT) * rate / (peak * 1e12), 3)
        row.notes["loss"] = f"{step.losses[0].item():.5f} -> {step.losses[args.rounds].item():.5f}"
    return rows


def make_batch(config: DualEncoderConfig, batch: int, device: str) -> tuple[Tensor, Tensor]:
    """Clips (B, 3, T, H, W) uint8 and sentences (B, 77) whose end stands at place 20."""
    generator = torch.Generator().manual_seed(0)
    size, frames = config.vision.image_size, config.vision.num_frames
    video = torch.randint(0, 256, (batch, 3, frames, size, size), generator=generator)
    tokens = torch.randint(1, 49406, (batch, config.text.context_length), generator=generator)
    tokens[:, 20] = 49407
    return video.to(device, torch.uint8), tokens.to(device)
