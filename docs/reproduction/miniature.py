"""Tables IV and V of EVA02-AT in miniature, on the demo world; results in docs/reproduction.md.

    python docs/reproduction/miniature.py --out runs/miniature --write docs/reproduction.md

Runs only what is not there yet: a finished cell is a file OUT/cells/*.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kernels.pages import write_between
from lightning_modules.cli.main import main as run_command
from lightning_modules.demo.probe import Probe
from lightning_modules.demo.run import Demo
from lightning_modules.demo.world import WorldOptions
from lightning_modules.training.recipe import build_cli

CONFIGS = Path(__file__).parents[2] / "configs"
WORLD = WorldOptions(seed=0, num_pretrain=4800, num_train=1200, num_test=576)
SEEDS = (0, 1, 2)
TEMPORAL = {  # mode: the paper's zero-shot mAP / nDCG (table IV)
    "none": "",
    "learnable": "28.2 / 29.9",
    "rotary": "28.8 / 30.1",
    "both": "30.2 / 31.1",
    "split": "",
}
SMS = "SymmetricMultiSimilarityLoss"
MIN_RELEVANCE = 0.1  # of a training pair of clip and narration, as in the paper
PRETRAIN = ("--trainer.max_epochs=10",)
FINE_TUNE = ("--trainer.max_epochs=9", "--trainer.check_val_every_n_epoch=9")


class Loss(NamedTuple):
    """An arm of table V: its class, the margins tried, and the paper's mAP / nDCG."""

    kind: str
    margins: Sequence[float]
    paper: str
    more: tuple[str, ...] = ()


LOSSES = {
    "MI-MM": Loss("MaxMarginLoss", (0.1, 0.2, 0.4), "52.1 / 67.3"),
    "adaptive MI-MM": Loss("AdaptiveMaxMarginLoss", (0.2, 0.4, 0.6), "55.1 / 68.1"),
    "SMS, tau = 0": Loss(SMS, (0.6, 0.8), "55.2 / 68.6", ("--model.loss.relaxation=0",)),
    "SMS": Loss(SMS, (0.4, 0.6, 0.8), "57.0 / 69.2"),
}


@dataclass(frozen=True)
class Miniature:
    """The experiments.

    Attributes:
        out: Folder of everything.
        jobs: Runs at a time, one core each.
        words: Further words for every training command.
    """

    out: Path
    jobs: int
    words: Sequence[str] = ()

    def run(self) -> dict[str, str]:
        """Run what is missing; returns the tables by name."""
        world = Demo(run_command, self.out, WORLD.seed, WORLD)
        world.make_videos()
        world.make_shards()
        modes = [(mode, seed) for seed in SEEDS for mode in TEMPORAL]
        arms = [(name, margin) for name, loss in LOSSES.items() for margin in loss.margins]
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda cell: self.pretrain(*cell), modes))
            tuning = pool.map(lambda arm: self.fine_tune(arm[0], arm[1], SEEDS[0])["map"], arms)
            found = dict(zip(arms, tuning, strict=True))
            best = {
                name: max((m for n, m in arms if n == name), key=lambda m: found[name, m])
                for name in LOSSES
            }
            cells = [(name, best[name], seed) for seed in SEEDS[1:] for name in best]
            list(pool.map(lambda cell: self.fine_tune(*cell), cells))
        return {
            "temporal": self.temporal_table(),
            "losses": self.loss_table(best),
            "margins": self.tuning_table(),
        }

    def pretrain(self, mode: str, seed: int) -> dict[str, Any]:
        """Pretrain with a temporal mode and evaluate zero-shot."""
        run = self.out / f"temporal-{mode}-{seed}"
        overlay = f"--config={CONFIGS / 'temporal' / mode}.yaml"

        def work() -> dict[str, Any]:
            self._command("fit", "pretrain", run, seed, overlay, *PRETRAIN)
            checkpoint = run / "checkpoints"
            words = [overlay, f"--model.init_checkpoint={checkpoint}"]
            self._command("test", "retrieval", run / "zero_shot", seed, *words)
            return self._figures(run / "zero_shot", checkpoint)

        return self._cell(run.name, work)

    def fine_tune(self, name: str, margin: float, seed: int) -> dict[str, Any]:
        """Fine-tune the seed's pretrained model with a loss, and evaluate."""
        loss = LOSSES[name]
        label = name.replace(" ", "-").replace(",", "").replace("=-", "")
        run = self.out / f"loss-{label}-{margin}-{seed}"
        words = [
            f"--model.init_checkpoint={self.out / f'temporal-both-{seed}' / 'checkpoints'}",
            f"--model.loss=lightning_modules.losses.{loss.kind}",
            f"--model.loss.margin={margin}",
            *loss.more,
            f"--data.min_relevance={MIN_RELEVANCE}",
            *FINE_TUNE,
        ]

        def work() -> dict[str, Any]:
            self._command("fit", "retrieval", run, seed, *words)
            tuned = f"--ckpt_path={run / 'checkpoints'}"
            self._command("test", "retrieval", run, seed, *words, tuned)
            return self._figures(run, run / "checkpoints")

        return self._cell(run.name, work)

    def _cell(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.out / "cells" / f"{name}.json"
        if not path.is_file():
            figures = work()
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(figures) + "\n")
            print(name, figures, flush=True)
        return json.loads(path.read_text())

    def _command(self, verb: str, recipe: str, run: Path, seed: int, *words: str) -> None:
        command = [sys.executable, "-m", "lightning_modules.cli.main", verb]
        command += [f"--config={CONFIGS / 'demo' / recipe}.yaml", *words]
        command += [f"--data_dir={self.out}", f"--run_dir={run}", f"--seed_everything={seed}"]
        command += ["--data.num_workers=0", *self.words]
        run.mkdir(parents=True, exist_ok=True)
        if verb == "test":  # or results of other weights would get another name
            (run / "test.json").unlink(missing_ok=True)
        with (run / f"{verb}.log").open("w") as log:
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT, env=env)

    def _figures(self, run: Path, checkpoint: Path) -> dict[str, Any]:
        """The figures of a test run, and how often the model names verb and noun."""
        flat = json.loads((run / "test.json").read_text())
        words = [f"--config={CONFIGS / 'demo' / 'retrieval.yaml'}", f"--data_dir={self.out}"]
        probe = Probe(run, checkpoint, build_cli([*words, f"--run_dir={run}"]).datamodule)
        plain, shuffled = probe.accuracies(), probe.accuracies(shuffled=True)
        return {
            "map": flat["test/map_avg"],
            "ndcg": flat["test/ndcg_avg"],
            "verb": plain["verb"],
            "verb_shuffled": shuffled["verb"],
            "noun": plain["noun"],
        }

    def temporal_table(self) -> str:
        """Table IV in Markdown."""
        rows = [
            _row(mode, [self.pretrain(mode, seed) for seed in SEEDS], paper)
            for mode, paper in TEMPORAL.items()
        ]
        return "\n".join([_header("temporal positions"), *rows])

    def loss_table(self, best: dict[str, float]) -> str:
        """Table V in Markdown."""
        rows = [
            _row(
                f"{name}, {margin}",
                [self.fine_tune(name, margin, seed) for seed in SEEDS],
                LOSSES[name].paper,
            )
            for name, margin in best.items()
        ]
        return "\n".join([_header("loss, margin"), *rows])

    def tuning_table(self) -> str:
        """mAP / nDCG of every margin tried, of the first seed."""
        lines = ["| loss | margin: mAP / nDCG |", "|---|---|"]
        for name, loss in LOSSES.items():
            cells = [(m, self.fine_tune(name, m, SEEDS[0])) for m in loss.margins]
            told = [f"{margin}: {cell['map']:.1f} / {cell['ndcg']:.1f}" for margin, cell in cells]
            lines.append(f"| {name} | {', '.join(told)} |")
        return "\n".join(lines)


COLUMNS = {
    "mAP": "map",
    "nDCG": "ndcg",
    "verb": "verb",
    "verb, frames shuffled": "verb_shuffled",
    "noun": "noun",
}


def _header(first: str) -> str:
    names = (first, *COLUMNS, "paper, mAP / nDCG")
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def _row(first: str, cells: list[dict[str, Any]], paper: str) -> str:
    columns = []
    for key in COLUMNS.values():
        values = [cell[key] for cell in cells]
        columns.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
    return f"| {' | '.join([first, *columns, paper])} |"


def main() -> None:
    """Run the experiments and write their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/miniature"), help="(%(default)s)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time (%(default)s)")
    parser.add_argument("--write", type=Path, help="the page, with its markers")
    args, words = parser.parse_known_args()
    torch.set_num_threads(1)
    tables = Miniature(args.out, args.jobs, words).run()
    print("\n\n".join(tables.values()))
    if args.write:
        for name, table in tables.items():
            write_between(args.write, f"reproduction.{name}", table)


if __name__ == "__main__":
    main()
