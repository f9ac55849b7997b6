"""What clips backwards and ensembles add to the demo's fine-tuned models; figures in docs/demo.md.

    for seed in 0 1 2; do eva02-at demo --seed $seed --out runs/demo-$seed; done
    python docs/reproduction/rerank.py --demos runs/demo-0 runs/demo-1 runs/demo-2 --out runs/rerank
    python docs/reproduction/beyond.py --demos runs/demo-0 runs/demo-1 runs/demo-2 \\
        --rerank runs/rerank --out runs/beyond --write docs/demo.md

Weights are chosen on the clips that `rerank.py` holds out; its second look is a row of the table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from miniature import CONFIGS
from rerank import Reranking, command, named, probe_of, prompts
from seeds import differences, markdown, script_parser, show
from torch import Tensor

from datamodules.tokenizer import Tokenizer
from lightning_modules.checkpoints.conversion import load_model

COLUMNS = {"mAP": "map", "nDCG": "ndcg", "verbs named": "verb", "nouns named": "noun"}
MODELS = {
    "zero-shot": "zero_shot",
    "fine-tuned": "fine_tuned",
    "fine-tuned, clips forwards alone": "forwards",
}
ENSEMBLES = {
    "zero-shot + fine-tuned": ("zero_shot", "fine_tuned"),
    "zero-shot + both fine-tuned": ("zero_shot", "fine_tuned", "forwards"),
}


@dataclass(frozen=True)
class Arms:
    """One demo's models and what is made of them.

    Attributes:
        demo: Folder of `eva02-at demo`.
        reranked: Of `rerank.py`, for this demo.
        held_out: The clips that weights are chosen on.
        out: Folder of what is made.
        seed: Of the fine-tuning.
    """

    demo: Path
    reranked: Path
    held_out: Path
    out: Path
    seed: int

    def run(self) -> dict[str, dict[str, float]]:
        """Run what is missing; returns the figures of each row."""
        self.out.mkdir(parents=True, exist_ok=True)
        words = [f"--config={CONFIGS / 'demo' / 'retrieval.yaml'}", f"--data_dir={self.demo}"]
        words += [f"--run_dir={self.out / 'forwards'}", f"--seed_everything={self.seed}"]
        words += [f"--model.init_checkpoint={self.demo / 'pretrain'}"]
        # as many steps of as many pairs, each of another clip
        words += ["--data.hard_negatives=null", "--data.global_batch_size=64"]
        words += ["--trainer.max_epochs=16", "--trainer.check_val_every_n_epoch=8"]
        command(self.out / "forwards" / "ended.json", ["fit", *words])

        runs = {
            "zero_shot": self.demo / "pretrain",
            "fine_tuned": self.demo / "fine_tune",
            "forwards": self.out / "forwards",
        }
        scores = {name: self._measure(name, run) for name, run in runs.items()}
        rows = {told: self._figures(name, scores[name]) for told, name in MODELS.items()}
        for told, members in ENSEMBLES.items():
            weights = self._tune("-".join(members), members)
            parts = [w * scores[m] for w, m in zip(weights, members, strict=True)]
            rows[told] = self._figures("-".join(members), torch.stack(parts).sum(0))
        look = Reranking(self.demo, self.held_out, self.reranked, self.seed).run()
        both = {name: look[name][1] for name in ("verb", "noun")}
        return {**rows, "a second look at the fine-tuned's": {**_averages(look["after"]), **both}}

    def _measure(self, name: str, run: Path) -> Tensor:
        """Write a model's matrices of both splits; returns its cosines with all prompts."""
        read = ["evaluate", f"--checkpoint={run}", "--benchmark=ek100_mir", "--workers=0"]
        for split, folder in (("train", self.held_out), ("test", self.demo)):
            made = self.out / f"{name}_{split}"
            where = [f"--annotations={folder / 'world' / 'annotations'}", f"--split={split}"]
            where.append(f"--shards={folder / 'shards' / split}")
            kept = [f"--prediction={made}.npy", f"--json={made}.json"]
            command(Path(f"{made}.json"), [*read, *where, *kept])
        return self._prompts(run)

    @torch.inference_mode()
    def _prompts(self, run: Path) -> Tensor:
        model = load_model(run).model
        clips = model.encode_video(probe_of(self.demo).video)
        return clips @ model.encode_text(Tokenizer()(prompts())).T

    def _tune(self, name: str, members: tuple[str, ...]) -> list[float]:
        chosen = self.out / f"{name}_tuned.json"
        held = f"--annotations={self.held_out / 'world' / 'annotations'}"
        matrices = [str(self.out / f"{member}_train.npy") for member in members]
        command(chosen, ["tune", held, "--similarity", *matrices, f"--output={chosen}"])
        test = f"--annotations={self.demo / 'world' / 'annotations'}"
        matrices = [str(self.out / f"{member}_test.npy") for member in members]
        made = self.out / f"{name}_test.json"
        words = ["score", test, "--similarity", *matrices, f"--tuned={chosen}", f"--json={made}"]
        command(made, words)
        return json.loads(chosen.read_text())["weights"]

    def _figures(self, name: str, scores: Tensor) -> dict[str, float]:
        found = json.loads((self.out / f"{name}_test.json").read_text())
        verb, noun = named(scores, probe_of(self.demo))
        return {**_averages(found), "verb": verb, "noun": noun}


def _averages(found: Mapping[str, Any]) -> dict[str, float]:
    return {metric: found[metric]["avg"] for metric in ("map", "ndcg")}


def table(found: Mapping[int, Mapping[str, Mapping[str, float]]]) -> str:
    """A line of each arm: the seeds' mean, and its difference to the fine-tuned model's."""
    arms = list(next(iter(found.values())))
    base = {seed: rows["fine-tuned"] for seed, rows in found.items()}
    lines: list[list[object]] = []
    for arm in arms:
        cells = {seed: rows[arm] for seed, rows in found.items()}
        each = [" / ".join(f"{row[key]:.1f}" for row in cells.values()) for key in COLUMNS.values()]
        apart = differences(cells, base, COLUMNS) if arm != "fine-tuned" else [""] * len(COLUMNS)
        lines.append([arm, *(f"{e}; {a}" if a else e for e, a in zip(each, apart, strict=True))])
    return markdown(["", *COLUMNS], lines)


def main() -> None:
    """Train, choose, test and write the table."""
    parser = script_parser(__doc__, "runs/beyond")
    parser.add_argument("--rerank", type=Path, default=Path("runs/rerank"), help="(%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    held_out = args.rerank / "held_out"
    found = {
        seed: Arms(demo, args.rerank / demo.name, held_out, args.out / demo.name, seed).run()
        for seed, demo in enumerate(args.demos)
    }
    show({"beyond.demo": table(found)}, args.write)


if __name__ == "__main__":
    main()
