"""Tables IV and V of EVA02-AT in miniature, on the demo world; results in docs/reproduction.md.

    python docs/reproduction/miniature.py --out runs/miniature --write docs/reproduction.md

Runs only what is not there yet: a finished cell is a file OUT/cells/*.json. With --finished it runs
nothing and writes the tables of what is there; a row says of how many seeds it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from seeds import BySeed, Figures, differences, markdown, means, script_parser, show

from lightning_modules.cli.main import main as run_command
from lightning_modules.demo.probe import Probe
from lightning_modules.demo.run import Demo
from lightning_modules.demo.world import WorldOptions
from lightning_modules.training.recipe import build_cli

CONFIGS = Path(__file__).parents[2] / "configs"
WORLD = WorldOptions(seed=0, num_pretrain=4800, num_train=1200, num_test=576)


class Mode(NamedTuple):
    """An arm of table IV: its overlay in configs/temporal, seeds, and the paper's mAP / nDCG."""

    overlay: str
    num_seeds: int = 3
    paper: str = ""
    more: tuple[str, ...] = ()


P_T = ("--model.model.temporal_init_std=0.02",)  # the authors' code; ours starts P_t at zero
TEMPORAL = {
    "none": Mode("none"),
    "learnable": Mode("learnable", 3, "28.2 / 29.9"),
    "learnable-0.02": Mode("learnable", 3, more=P_T),
    "rotary": Mode("rotary", 8, "28.8 / 30.1"),
    "both": Mode("both", 8, "30.2 / 31.1"),
    "both-0.02": Mode("both", 3, more=P_T),
    "split": Mode("split"),
}
SMS = "SymmetricMultiSimilarityLoss"
MIN_RELEVANCE = 0.1  # of a training pair of clip and narration, as in the paper
PAPER = (  # its method, where the demo's recipes have found a faster one
    "--model.optimizer.name=adamw",
    "--model.optimizer.matrix_lr=null",
    "--data.hard_negatives=null",
    "--data.global_batch_size=64",
)
PRETRAIN = (
    "--model.loss=lightning_modules.losses.InfoNCELoss",
    "--model.loss.temperature=0.07",
    "--trainer.max_epochs=10",
)
FINE_TUNE = ("--trainer.max_epochs=9", "--trainer.check_val_every_n_epoch=9")


class Loss(NamedTuple):
    """An arm of table V: its class, the margins tried, and the paper's mAP / nDCG."""

    kind: str
    margins: Sequence[float]
    paper: str
    more: tuple[str, ...] = ()


LOSS_SEEDS = 8
LOSSES = {
    "MI-MM": Loss("MaxMarginLoss", (0.1, 0.2, 0.4), "52.1 / 67.3"),
    "adaptive MI-MM": Loss("AdaptiveMaxMarginLoss", (0.2, 0.4, 0.6), "55.1 / 68.1"),
    "SMS, tau = 0": Loss(SMS, (0.6, 0.8), "55.2 / 68.6", ("--model.loss.relaxation=0",)),
    "SMS": Loss(SMS, (0.4, 0.6, 0.8), "57.0 / 69.2"),
}
PAIRS = {  # whose difference is told, seed by seed
    "temporal": (
        ("both", "rotary"),
        ("rotary", "learnable"),
        ("both", "split"),
        ("learnable-0.02", "learnable"),
        ("both-0.02", "both"),
    ),
    "losses": (("SMS", "MI-MM"), ("SMS", "SMS, tau = 0"), ("adaptive MI-MM", "MI-MM")),
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

    def run(self) -> None:
        """Run what is missing."""
        world = Demo(run_command, self.out, WORLD.seed, WORLD)
        world.make_videos()
        world.make_shards()
        modes = [(name, seed) for name, m in TEMPORAL.items() for seed in range(m.num_seeds)]
        margins = [(name, margin, 0) for name, loss in LOSSES.items() for margin in loss.margins]
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda cell: self.pretrain(*cell), modes))
            list(pool.map(lambda cell: self.fine_tune(*cell), margins))
            best = [(name, self.best_margin(name)) for name in LOSSES]
            cells = [(*arm, seed) for seed in range(1, LOSS_SEEDS) for arm in best]
            list(pool.map(lambda cell: self.fine_tune(*cell), cells))

    def tables(self) -> dict[str, str]:
        """The tables of what is finished, by name; one without a row is left out."""
        modes = {
            name: self._finished(f"temporal-{name}-{{}}", mode.num_seeds)
            for name, mode in TEMPORAL.items()
        }
        best = {name: self.best_margin(name) for name in LOSSES}
        losses = {
            name: self._finished(_run_name(name, margin, "{}"), LOSS_SEEDS)
            for name, margin in best.items()
        }
        told = {name: f"{name}, {margin}" for name, margin in best.items()}
        papers = {name: mode.paper for name, mode in TEMPORAL.items()}
        papers |= {name: loss.paper for name, loss in LOSSES.items()}
        tables = {
            "temporal": _table("temporal positions", modes, papers, {}),
            "temporal_pairs": _pairs(modes, PAIRS["temporal"]),
            "losses": _table("loss, margin", losses, papers, told),
            "losses_pairs": _pairs(losses, PAIRS["losses"]),
            "margins": self.tuning_table(),
        }
        return {name: table for name, table in tables.items() if table.count("\n") > 1}

    def best_margin(self, name: str) -> float:
        """The margin of the highest mAP with the first seed, of those that are finished."""
        tried = self._tried(name)
        return max(tried, key=lambda margin: tried[margin]["map"], default=LOSSES[name].margins[0])

    def pretrain(self, name: str, seed: int) -> dict[str, Any]:
        """Pretrain with a temporal mode and evaluate zero-shot."""
        run = self.out / f"temporal-{name}-{seed}"
        overlay = f"--config={CONFIGS / 'temporal' / TEMPORAL[name].overlay}.yaml"
        arm = [overlay, *TEMPORAL[name].more]

        def work() -> dict[str, Any]:
            self._command("fit", "pretrain", run, seed, *arm, *PRETRAIN)
            checkpoint = run / "checkpoints"
            words = [*arm, f"--model.init_checkpoint={checkpoint}"]
            self._command("test", "retrieval", run / "zero_shot", seed, *words)
            return self._figures(run / "zero_shot", checkpoint)

        return self._cell(run.name, work)

    def fine_tune(self, name: str, margin: float, seed: int) -> dict[str, Any]:
        """Fine-tune the seed's pretrained model with a loss, and evaluate."""
        loss = LOSSES[name]
        run = self.out / _run_name(name, margin, seed)
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
        command += [f"--config={CONFIGS / 'demo' / recipe}.yaml", *PAPER, *words]
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

    def _finished(self, run: str, num_seeds: int) -> BySeed:
        paths = {seed: self.out / "cells" / f"{run.format(seed)}.json" for seed in range(num_seeds)}
        return {
            seed: json.loads(path.read_text()) for seed, path in paths.items() if path.is_file()
        }

    def _tried(self, name: str) -> dict[float, Figures]:
        """Figures of each margin that is finished with the first seed."""
        found = {m: self._finished(_run_name(name, m, "{}"), 1) for m in LOSSES[name].margins}
        return {margin: cells[0] for margin, cells in found.items() if cells}

    def tuning_table(self) -> str:
        """mAP / nDCG of every margin tried, of the first seed."""
        rows = []
        for name in LOSSES:
            cells = self._tried(name).items()
            told = [f"{margin}: {cell['map']:.1f} / {cell['ndcg']:.1f}" for margin, cell in cells]
            if told:
                rows.append([name, ", ".join(told)])
        return markdown(["loss", "margin: mAP / nDCG"], rows)


COLUMNS = {
    "mAP": "map",
    "nDCG": "ndcg",
    "verb": "verb",
    "verb, frames shuffled": "verb_shuffled",
    "noun": "noun",
}


def _run_name(loss: str, margin: float, seed: int | str) -> str:
    label = loss.replace(" ", "-").replace(",", "").replace("=-", "")
    return f"loss-{label}-{margin}-{seed}"


def _table(
    first: str, arms: Mapping[str, BySeed], papers: Mapping[str, str], told: Mapping[str, str]
) -> str:
    """Means of the arms that have any seeds."""
    rows = [
        [told.get(name, name), len(cells), *means(cells, COLUMNS), papers[name]]
        for name, cells in arms.items()
        if cells
    ]
    return markdown([first, "seeds", *COLUMNS, "paper, mAP / nDCG"], rows)


def _pairs(arms: Mapping[str, BySeed], pairs: Sequence[tuple[str, str]]) -> str:
    """Mean differences of arms, seed by seed."""
    rows = []
    for name, base in pairs:
        num_seeds = len(arms[name].keys() & arms[base].keys())
        if num_seeds:
            told = differences(arms[name], arms[base], COLUMNS)
            rows.append([f"{name} - {base}", num_seeds, *told])
    return markdown(["difference", "seeds", *COLUMNS], rows)


def main() -> None:
    """Run the experiments and write their tables."""
    parser = script_parser(__doc__, "runs/miniature", demos=False)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time (%(default)s)")
    parser.add_argument("--finished", action="store_true", help="run nothing")
    args, words = parser.parse_known_args()
    torch.set_num_threads(1)
    miniature = Miniature(args.out, args.jobs, words)
    if not args.finished:
        miniature.run()
    tables = {f"reproduction.{name}": table for name, table in miniature.tables().items()}
    show(tables, args.write)


if __name__ == "__main__":
    main()
