"""What a second look adds to the demo's fine-tuned models; figures in docs/rerank.md.

    for seed in 0 1 2; do eva02-at demo --seed $seed --out runs/demo-$seed; done
    python docs/reproduction/rerank.py --demos runs/demo-0 runs/demo-1 runs/demo-2 \\
        --out runs/rerank --write docs/rerank.md

Trains a head on each model, chooses K and W on clips of a world that no model was trained on, and
tests on the demo's test split. Every step is a command of `eva02-at`; what is there is kept.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from miniature import CONFIGS
from seeds import interval, markdown, script_parser, show
from torch import Tensor

from datamodules.tokenizer import Tokenizer
from lightning_modules.checkpoints.conversion import load_model
from lightning_modules.checkpoints.rerank import load_reranker
from lightning_modules.cli.main import main as run_command
from lightning_modules.demo.probe import Probe
from lightning_modules.demo.run import Demo
from lightning_modules.demo.world import WorldOptions
from lightning_modules.demo.world.vocabulary import NOUNS, VERBS, imperative
from lightning_modules.evaluation.intervals import bootstrap
from lightning_modules.models.rerank import words_of
from lightning_modules.training.recipe import build_cli

HELD_OUT = WorldOptions(seed=1000, num_pretrain=2, num_train=576, num_test=2)
TOP = 50  # the largest K that is tried


@dataclass(frozen=True)
class Reranking:
    """One demo's head.

    Attributes:
        demo: Folder of `eva02-at demo`.
        held_out: The same of the clips that K and W are chosen on.
        out: Folder of what is made.
        seed: Of the head's training.
    """

    demo: Path
    held_out: Path
    out: Path
    seed: int

    def run(self) -> dict[str, Any]:
        """Run what is missing; returns the figures."""
        dual = self.demo / "fine_tune"
        words = [f"--config={CONFIGS / 'demo' / 'rerank.yaml'}", f"--data_dir={self.demo}"]
        words += [f"--run_dir={self.out / 'run'}", f"--seed_everything={self.seed}"]
        made = "run/ended.json", "second.npy", "tuned.json", "test.json", "test_dual.json"
        fitted, second, tuned, test, test_dual = (self.out / name for name in made)
        command(fitted, ["fit", *words, f"--model.dual_checkpoint={dual}"])

        read = ["evaluate", f"--checkpoint={dual}", "--benchmark=ek100_mir", "--workers=0"]
        head = [f"--rerank={self.out / 'run'}"]
        wide = [*head, f"--top={TOP}", "--blend=0", f"--prediction={self.out / 'dual.npy'}"]
        held = [f"--annotations={self.held_out / 'world' / 'annotations'}"]
        shards = [f"--shards={self.held_out / 'shards' / 'train'}", "--split=train"]
        command(second, [*read, *held, *shards, *wide, f"--rerank-scores={second}"])
        matrices = [f"--similarity={self.out / 'dual.npy'}", f"--rerank-scores={second}"]
        command(tuned, ["tune", *held, *matrices, f"--output={tuned}"])

        choice = json.loads(tuned.read_text())
        read.append(f"--annotations={self.demo / 'world' / 'annotations'}")
        read.append(f"--shards={self.demo / 'shards' / 'test'}")
        how = [*head, f"--top={choice['top']}", f"--blend={choice['blend']}"]
        command(test, [*read, *how, f"--json={test}"])
        command(test_dual, [*read, f"--json={test_dual}"])
        before, after = (json.loads(path.read_text()) for path in (test_dual, test))
        return {"choice": choice, "before": before, "after": after, **self.accuracies(choice)}

    @torch.inference_mode()
    def accuracies(self, choice: Mapping[str, Any]) -> dict[str, list[float]]:
        """Verbs and nouns named, percent, as `Probe.accuracies`: by S, and by S + W p of all."""
        probe, model = probe_of(self.demo), load_model(self.demo / "fine_tune").model
        head = load_reranker(self.out / "run", model)
        tokens = Tokenizer()(prompts())
        texts, states = model.encode_text_with_words(tokens)
        pairs = head.words(states), words_of(tokens), torch.zeros(len(tokens)).long()
        first, second = [], []
        for video in probe.video.split(48):
            clips, patches = model.encode_video_with_patches(video)
            first.append(clips @ texts.T)
            places = head.places(patches)
            second += [head(one[None], *pairs).sigmoid() for one in places]
        cosines = torch.cat(first)
        both = cosines + choice["blend"] * torch.stack(second)
        found = [named(scores, probe) for scores in (cosines, both)]
        return {"verb": [verb for verb, _ in found], "noun": [noun for _, noun in found]}


@cache
def probe_of(demo: Path) -> Probe:
    """The demo's test clips, decoded once, and what they show."""
    run = demo / "fine_tune"
    words = [f"--config={CONFIGS / 'demo' / 'retrieval.yaml'}", f"--data_dir={demo}"]
    return Probe(run, run / "checkpoints", build_cli([*words, f"--run_dir={run}"]).datamodule)


def prompts() -> list[str]:
    """The 96 of every verb with every noun, verb by verb."""
    return [imperative(v, [n]) for v in range(len(VERBS)) for n in range(len(NOUNS))]


def named(scores: Tensor, probe: Probe) -> tuple[float, float]:
    """Percent of clips whose verb, and one of whose nouns, (V, 96) scores name."""
    table = scores.view(-1, len(VERBS), len(NOUNS))
    verb = table.mean(2).argmax(1) == probe.verbs[:, 0]
    noun = (table.mean(1).argmax(1)[:, None] == probe.nouns).any(1)
    return 100 * verb.float().mean().item(), 100 * noun.float().mean().item()


def command(made: Path, words: Sequence[str]) -> None:
    """Run a command of `eva02-at`, unless what it makes is there."""
    if made.is_file():
        return
    made.parent.mkdir(parents=True, exist_ok=True)
    print(f"\n$ eva02-at {shlex.join(words)}", flush=True)
    if code := run_command(list(words)):
        raise SystemExit(code)


def gain(before: Mapping[str, Any], after: Mapping[str, Any], metric: str) -> str:
    """The difference and its 95 % interval, by resampling queries, each with itself."""
    difference = after[metric]["avg"] - before[metric]["avg"]
    one, other = (result["per_query"][metric] for result in (before, after))
    parts = [np.array(other[side], float) - np.array(one[side], float) for side in ("v2t", "t2v")]
    low, high = bootstrap(parts, difference)
    return f"{difference:+.1f} ({low:+.1f} ... {high:+.1f})"


def table(found: Mapping[int, Mapping[str, Any]]) -> str:
    """A line of each seed, and their mean with its 95 % interval by Student's t."""
    metrics = {"map": "mAP", "ndcg": "nDCG"}
    header = ["seed", "K, W", *metrics.values(), *(f"{name} gained" for name in metrics.values())]
    rows: list[list[object]] = []
    for seed, figures in found.items():
        choice, before, after = (figures[name] for name in ("choice", "before", "after"))
        told = [f"{before[m]['avg']:.2f} → {after[m]['avg']:.2f}" for m in metrics]
        gains = [gain(before, after, m) for m in metrics]
        named = [f"{one:.1f} → {other:.1f}" for one, other in (figures[name] for name in _NAMES)]
        rows.append([seed, f"{choice['top']}, {choice['blend']:g}", *told, *gains, *named])
    apart = [
        [f["after"][m]["avg"] - f["before"][m]["avg"] for f in found.values()] for m in metrics
    ]
    apart += [[other - one for one, other in (f[n] for f in found.values())] for n in _NAMES]
    means = [f"{sum(values) / len(values):+.1f}{interval(values)}" for values in apart]
    rows.append(["mean", "", "", "", *means])
    return markdown([*header, *(f"{name}s named" for name in _NAMES)], rows)


_NAMES = ("verb", "noun")


def main() -> None:
    """Train, choose, test and write the table."""
    args = script_parser(__doc__, "runs/rerank").parse_args()
    torch.set_num_threads(1)
    held_out = args.out / "held_out"
    if not (held_out / "shards" / "train" / "manifest.json").is_file():
        world = Demo(run_command, held_out, HELD_OUT.seed, HELD_OUT)
        world.make_videos()
        world.make_shards()
    found = {
        seed: Reranking(demo, held_out, args.out / demo.name, seed).run()
        for seed, demo in enumerate(args.demos)
    }
    show({"rerank.demo": table(found)}, args.write)


if __name__ == "__main__":
    main()
