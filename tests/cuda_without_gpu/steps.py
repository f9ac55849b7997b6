"""Every recipe's training step on fake CUDA tensors: what it asks of GPU and network.

    python tests/cuda_without_gpu/steps.py                                # the tables
    python tests/cuda_without_gpu/steps.py --json FILE                    # the same for a program
    python tests/cuda_without_gpu/steps.py --write docs/performance.md    # into the page
    python tests/cuda_without_gpu/steps.py --all                          # every recipe

The recipe is the one in `configs/`, with its model's two towers cut down to two blocks of full
width; Lightning's Trainer runs its loop, hooks, bar and loggers over it. One process stands for
one rank of many: PyTorch's `fake` process group sends nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cuda_without_gpu import fake_cuda

if __name__ == "__main__":
    fake_cuda.load()

import argparse
import contextlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import repeat
from typing import Any

import torch
import torch.distributed as dist
from epic_files import write_recognition_split
from lightning.pytorch import Callback
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from cuda_without_gpu.counting import Counting, Counts, patch_fake_tensors
from cuda_without_gpu.kinds import KINDS
from datamodules.batch import ClipBatch
from datamodules.retrieval import RetrievalDataModule
from kernels import norm
from kernels.pages import write_between
from lightning_modules.models import DualEncoder
from lightning_modules.models import config as model_config
from lightning_modules.models.config import resolve_config
from lightning_modules.planning.costs import count_saved
from lightning_modules.training.optim.ema import _whole_tensor
from lightning_modules.training.optim.lamb import Lamb
from lightning_modules.training.recipe import RecipeCLI, build_cli
from lightning_modules.training.run import agreement
from lightning_modules.training.run.watchdog import StallWatchdog

ROOT = Path(__file__).parents[2]
SMS = ROOT / "configs" / "mir" / "eva02_at_base_sms.yaml"
MUON = ["--model.optimizer.name=muon"]
ROOMS = ("pretrain", "mir", "charades_ego", "recognition")  # a re-ranker mines by values
RANKS = (1, 8, 64, 512)
PAIRS = 4  # of a rank
TOKENS = 32
INTERVAL = 5  # steps between two records of the loggers
COUNTED = 2  # the step that is counted: everything has run before, nothing is recorded after it
MODE: FakeTensorMode
WHOLE = dict(model_config.PRESETS)
WHOLE_MODELS = (("eva02_at_base_16", 4), ("eva02_at_large_14", 4), ("eva02_at_base_16", 16))


class EndOfCount(Exception):
    """Leaves the Trainer once the step has been counted."""


@dataclass(frozen=True)
class Step:
    """A recipe's step on one rank of so many.

    Attributes:
        recipe: Its path below `configs/`, without suffix.
        ranks: Size of the process group.
        rank: This process's place in it.
        waits: As in `Counts`.
        collectives: As in `Counts`.
        wide_fp32: Activations and their gradients of more than 16 bits: "phase shape type".
        gradients: Types of the parameters' gradients.
        not_repeatable: As in `Counts`.
    """

    recipe: str
    ranks: int
    rank: int
    waits: dict[str, int]
    collectives: list[dict[str, Any]]
    wide_fp32: dict[str, int]
    gradients: list[str]
    not_repeatable: dict[str, int]


def recipes() -> list[Path]:
    """Every recipe of `configs/` that is meant for GPUs."""
    return sorted(path for room in ROOMS for path in (ROOT / "configs" / room).glob("*.yaml"))


class CountOneStep(Callback):
    """Counts from the end of one batch to the end of the next, the optimiser's step included."""

    def __init__(self, counting: Counting) -> None:
        self.counting = counting
        self.counts = Counts()
        self.gradients: list[str] = []

    def on_before_backward(self, *args: Any) -> None:
        """The loss is computed."""
        self.counting.phase = "backward"

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """The gradients are there."""
        self.counting.phase = "optimizer"
        self.gradients = sorted({str(p.grad.dtype) for p in module.parameters()})

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Begin the count, or end it."""
        if batch_idx == COUNTED - 1:
            self.counting.counts = Counts()
        if batch_idx == COUNTED:
            self.counts = self.counting.counts
            self.counting.counts = Counts()  # what follows is the Trainer's end
            raise EndOfCount
        self.counting.phase = "forward"


def parse(recipe: Path, folder: str, words: list[str]) -> RecipeCLI:
    """Build a recipe's trainer and module, the module without storage."""
    here = {
        "trainer.accelerator": "gpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.num_nodes": 1,
        "trainer.limit_val_batches": 0,
        "trainer.limit_train_batches": 100,
        "trainer.log_every_n_steps": INTERVAL,
        "model.init_checkpoint": "null",
        "run_dir": folder,
    }
    if recipe.parent.name == "recognition":
        here["model.annotations"] = folder
    options = [f"--{key}={value}" for key, value in here.items()]
    with torch.device("meta"):
        return build_cli(["--config", str(recipe), *options, *words])


def start_group(ranks: int, rank: int) -> None:
    """Be one rank of a group that sends nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()
    if ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)


def count_step(
    recipe: Path, ranks: int, rank: int, folder: str, words: list[str], plant: Any = None
) -> Step:
    """Run a recipe's Trainer up to one step that is counted.

    Args:
        recipe: Its file.
        ranks: Size of the process group.
        rank: This process's place in it.
        folder: For what the run writes.
        words: More words of the command line.
        plant: Called with the module before it runs, to plant a fault.
    """
    start_group(ranks, rank)
    cli = parse(recipe, folder, words)
    module, vision = cli.model, cli.model.model.config.vision
    counting = Counting(PAIRS)
    kept = [c for c in cli.trainer.callbacks if not isinstance(c, StallWatchdog)]  # a thread
    counter = CountOneStep(counting)
    cli.trainer.callbacks = [*kept, counter]  # the last, so that the bar's work is within
    # the module is on the device, and has nothing to move
    cli.trainer.strategy.model_to_device = cli.trainer.strategy.teardown = lambda: None
    with MODE, counting:
        to_fake(module)
        if plant is not None:
            plant(module)
        batch = batch_of(PAIRS, vision.num_frames, vision.image_size)
        batch.even = True  # as `TrainStream` guarantees
        if (negatives := cli.datamodule.hard_negatives) is not None:
            count = negatives.num_verbs + negatives.num_nouns
            batch.negative_tokens = torch.ones(PAIRS, count, TOKENS, dtype=torch.int64)
        batch.same_text_widths = isinstance(cli.datamodule, RetrievalDataModule)
        with contextlib.suppress(EndOfCount):
            cli.trainer.fit(module, train_dataloaders=Batches(batch))
    counts = counter.counts
    return Step(
        name_of(recipe),
        ranks,
        rank,
        dict(counts.waits),
        [asdict(c) for c in counts.collectives],
        {key: n for key, n in counts.made.items() if _is_wide(key)},
        counter.gradients,
        dict(counts.not_repeatable),
    )


def name_of(recipe: Path) -> str:
    """A recipe's path below `configs/`, without suffix."""
    return f"{recipe.parent.name}/{recipe.stem}"


def kind_of(recipe: str) -> str | None:
    """What a recipe stands for in the table, if it does."""
    return KINDS.get(recipe) or KINDS.get(recipe.split("/")[1])


def _is_wide(key: str) -> bool:
    """True for activations of a tower in more than 16 bits: pairs first, then tokens and channels.

    What belongs to a token but not to a channel (statistics of norms, of softmax) is float32.
    """
    _, rest = key.split(" ", 1)
    shape, dtype = rest.rsplit(" ", 1)
    sizes = [int(n) for n in shape.strip("(,)").split(",") if n.strip()]
    return dtype in ("fp32", "fp64") and (
        len(sizes) == 3 and sizes[0] == PAIRS and sizes[1] >= TOKENS and sizes[2] >= 64
    )


def to_fake(module: nn.Module) -> None:
    """Give parameters and buffers fake storage on the GPU; leave metrics out, of no use here."""
    for name in ("metrics", "hits"):
        if hasattr(module, name):
            setattr(module, name, nn.Identity())
    for part in module.modules():
        for name, old in list(part.named_parameters(recurse=False)):
            new = torch.empty(old.shape, dtype=old.dtype, device="cuda")
            part.register_parameter(name, nn.Parameter(new))
        for name, old in list(part.named_buffers(recurse=False)):
            new = torch.empty(old.shape, dtype=old.dtype, device="cuda")
            part.register_buffer(name, new, persistent=False)


def batch_of(pairs: int, frames: int, size: int) -> ClipBatch:
    """A rank's batch on the host, as loaders hand it over."""

    def ids(*shape: int) -> torch.Tensor:
        return torch.zeros(pairs, *shape, dtype=torch.int64)

    return ClipBatch(
        video=torch.zeros(pairs, 3, frames, size, size, dtype=torch.uint8),
        tokens=ids(TOKENS),
        clip_index=ids(),
        text_index=ids(),
        sample_index=ids(),
        mask=torch.ones(pairs, dtype=torch.bool),
        verb_classes=ids(1),
        noun_classes=ids(3),
        text_verb_classes=ids(1),
        text_noun_classes=ids(3),
        keys=["clip"] * pairs,
    )


def _agree_with_nobody(ranks: agreement.Ranks) -> None:
    """The agreements over gloo touch no GPU: each rank takes its own word for all."""
    ranks.rank = dist.get_rank() if dist.is_initialized() else 0
    ranks.size = dist.get_world_size() if dist.is_initialized() else 1
    ranks._group = None


def forward_of(preset: str, frames: int) -> dict[str, Any]:
    """What a whole model's forward pass keeps and casts, under bf16 autocast.

    Returns:
        `saved_mib`, bytes that autograd keeps of a pair; `casts`, of activations, in one forward.
    """
    saved = []
    casts = 0
    for pairs in (1, 2):
        with torch.device("meta"):
            model = DualEncoder(resolve_config(WHOLE[preset], num_frames=frames, embed_dim=256))
        with MODE, Counting() as counting, torch.autocast("cuda", torch.bfloat16):
            to_fake(model)
            size = model.config.vision.image_size
            batch = batch_of(pairs, frames, size)
            video, tokens = (x.to("cuda") for x in (batch.video, batch.tokens))
            tokens = tokens.new_zeros(pairs, model.config.text.context_length)
            saved.append(count_saved(model, video, tokens))
        shapes = [key.split(")")[0].strip("(").split(",") for key in counting.counts.casts]
        times = list(counting.counts.casts.values())
        casts = sum(n for s, n in zip(shapes, times, strict=True) if len(s) > 2 and s[0] == "2")
    return {"saved_mib": (saved[1] - saved[0]) / 2**20, "casts": casts}


class Batches:
    """A loader of the same batch again and again."""

    def __init__(self, batch: ClipBatch) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[ClipBatch]:
        return repeat(self.batch)


def prepare() -> None:
    """Pretend the GPU, and cut the presets down to two blocks a tower."""
    norm.LEAST_ELEMENTS = 0  # the few pairs here stand for a full batch
    global MODE
    fake_cuda.pretend()
    patch_fake_tensors()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    agreement.Ranks.__init__ = _agree_with_nobody
    MODE = FakeTensorMode(allow_non_fake_inputs=True)
    for name, preset in list(model_config.PRESETS.items()):
        model_config.PRESETS[name] = replace(
            preset,
            vision=replace(preset.vision, depth=2),
            text=replace(preset.text, depth=2),
        )


def plants(folder: str) -> dict[str, Any]:
    """Faults planted in a step, and what the count says of them."""

    def count(plant: Callable[[nn.Module], None], rank: int = 0) -> Step | str:
        try:
            return count_step(SMS, 8, rank, folder, [], plant)
        except (RuntimeError, torch._subclasses.fake_tensor.UnsupportedOperatorException) as error:
            return str(error).splitlines()[0]

    def after_block(change: Callable[[Any], Any]) -> Callable[[nn.Module], None]:
        def plant(module: Any) -> None:
            module.model.visual.blocks[0].register_forward_hook(lambda m, a, out: change(out))

        return plant

    def extra(on_rank: int, tensor: Callable[[], torch.Tensor]) -> Callable[[nn.Module], None]:
        def reduce(out: Any) -> None:
            if dist.get_rank() == on_rank:
                dist.all_reduce(tensor())

        return after_block(reduce)

    return {
        "a tensor on the CPU": count(after_block(lambda out: out * torch.ones(out.shape[-1]))),
        "a read": count(after_block(lambda out: out * out.sum().item())),
        "float32": count(after_block(lambda out: out.float())),
        "a collective of one rank": count(extra(0, lambda: torch.zeros(1, device="cuda"))),
        "a collective on the CPU": count(extra(0, lambda: torch.zeros(1))),
    }


def offloaded() -> dict[str, str]:
    """LAMB and the average of weights, their tensors on the host and the group's on the GPU."""
    start_group(8, 0)
    told = {}

    def attempt(name: str, call: Callable[[], Any]) -> None:
        with MODE, Counting() as counting:
            try:
                told[name] = f"result on {call()}, {len(counting.counts.collectives)} collective"
            except RuntimeError as error:
                told[name] = str(error).splitlines()[0]

    def lamb() -> torch.device:
        weight = nn.Parameter(torch.ones(5))
        weight.grad = torch.ones(5)
        Lamb([weight], weight_decay=0.1, sharded=True).step()
        return weight.device

    def average() -> torch.device:
        weight = nn.Parameter(torch.ones(16))
        weight.ds_tensor, weight.ds_numel, weight.ds_shape = torch.ones(2), 16, (16,)
        return _whole_tensor(torch.ones(2), weight).device

    attempt("lamb", lamb)
    attempt("average", average)
    attempt("unguarded", lambda: dist.all_reduce(torch.ones(1)))
    return told


def table(steps: list[Step], forward: dict[str, dict[str, Any]]) -> str:
    """Steps by kind, and what a forward pass of a whole model costs, as Markdown."""
    lines = [
        f"{PAIRS} pairs a rank, two blocks a tower; written by "
        "`python tests/cuda_without_gpu/steps.py --write docs/performance.md`.",
        "",
        "| step | ranks | the host waits | collectives, forward + backward | bytes a rank sends |",
        "|---|---|---|---|---|",
    ]
    for step in steps:
        calls = [c["phase"] for c in step.collectives]
        sent = sum(c["sent"] for c in step.collectives)
        kind = kind_of(step.recipe) or step.recipe
        lines.append(
            f"| {kind} | {step.ranks} | {sum(step.waits.values())} "
            f"| {calls.count('forward')} + {calls.count('backward')} | {sent:,} |"
        )
    lines += ["", "| whole model, forward | kept for the backward, a pair | activations cast |"]
    lines += ["|---|---|---|"]
    for model, cost in forward.items():
        lines.append(f"| {model} | {cost['saved_mib']:.1f} MiB | {cost['casts']} |")
    return "\n".join(lines)


def main() -> int:
    """Count, print and perhaps write."""
    parser = argparse.ArgumentParser(prog="python tests/cuda_without_gpu/steps.py")
    parser.add_argument("--json", type=Path, help="write everything that was counted to a file")
    parser.add_argument("--write", type=Path, help="a Markdown page with the two markers")
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    parser.add_argument("--all", action="store_true", help="every recipe, not one of each kind")
    parser.add_argument("--last", action="store_true", help="the last rank beside the first")
    parser.add_argument("--plant", action="store_true", help="faults, to see them counted")
    args = parser.parse_args()
    prepare()
    chosen = [r for r in recipes() if args.all or kind_of(name_of(r))]
    if not args.all:
        chosen.sort(key=lambda r: list(KINDS.values()).index(kind_of(name_of(r)) or ""))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        for split in ("train", "validation"):
            write_recognition_split(Path(folder), split, [("x", 0, 0, [0]), ("y", 1, 1, [1])])
        steps = [count_step(r, n, 0, folder, []) for r in chosen for n in args.ranks]
        if args.last:
            several = [n for n in args.ranks if n > 1]
            steps += [count_step(r, n, n - 1, folder, []) for r in chosen for n in several]
        planted = plants(folder) if args.plant else {}
        muon = asdict(count_step(SMS, 8, 0, folder, MUON)) if args.plant else {}
        forward = {f"`{p}`, {t} frames": forward_of(p, t) for p, t in WHOLE_MODELS}
        content = table([step for step in steps if step.rank == 0], forward)
    if args.json:
        counted = {
            "steps": [asdict(step) for step in steps],
            "plants": {k: p if isinstance(p, str) else asdict(p) for k, p in planted.items()},
            "muon": muon,
            "offloaded": offloaded() if args.plant else {},
            "forward": forward,
        }
        args.json.write_text(json.dumps(counted, indent=1))
    print(content)
    if args.write:
        write_between(args.write, "cuda_without_gpu.steps", content)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # autograd's thread of the device does not end
