"""The whole mission in small, through the commands that a cluster runs.

Videos -> shards -> pretraining -> zero-shot evaluation -> fine-tuning -> evaluation -> report.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from datamodules.files import write_atomically
from datamodules.manifest import Manifest
from lightning_modules.demo.probe import Probe
from lightning_modules.demo.report import DemoResults, gallery_rows, write_report
from lightning_modules.demo.world import WorldOptions, build_world
from lightning_modules.metrics.functional import multi_instance_map, multi_instance_ndcg
from lightning_modules.packaged import folder
from lightning_modules.training.recipe import build_cli
from lightning_modules.training.runs import ENDED

CONFIGS = folder("configs") / "demo"
VERSIONED = ("torch", "lightning", "webdataset", "decord", "torchmetrics", "deepspeed", "xformers")


class StageFailed(Exception):
    """A stage ended with an exit code other than 0."""

    def __init__(self, code: int) -> None:
        super().__init__(f"exit code {code}")
        self.code = code


@dataclass
class Demo:
    """One run of the demo.

    Attributes:
        run_command: Runs the words after `eva02-at`; returns the exit code.
        out: Folder of everything it writes.
        seed: Of the videos, the order, the crops and the weights.
        world: Size of the demo world.
        words: Further words for every training command, `--trainer.max_epochs=1` say.
        seconds: Time of each stage; a run that goes on where another stopped adds to its time.
    """

    run_command: Callable[[list[str]], int]
    out: Path
    seed: int
    world: WorldOptions
    words: Sequence[str] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Run every stage; returns what `metrics.json` holds."""
        ledger = self.out / "seconds.json"
        self.seconds = json.loads(ledger.read_text()) if ledger.is_file() else {}
        self._stage("videos", self.make_videos)
        self._stage("shards", self.make_shards)
        self._stage("pretrain", lambda: self.train("fit", "pretrain", "pretrain"))
        pretrained = f"--model.init_checkpoint={self.out / 'pretrain' / 'checkpoints'}"
        self._stage("zero_shot", lambda: self.train("test", "retrieval", "zero_shot", pretrained))
        self._stage("fine_tune", lambda: self.train("fit", "retrieval", "fine_tune", pretrained))
        tuned = f"--ckpt_path={self.out / 'fine_tune' / 'checkpoints'}"
        self._stage("evaluate", lambda: self.train("test", "retrieval", "fine_tune", tuned))
        print("\n# what the model has learnt")
        metrics, results = self.measure()
        write_atomically(self.out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
        write_report(results, self.out / "report.html")
        return metrics

    def _stage(self, name: str, work: Callable[[], object]) -> None:
        start = time.monotonic()
        try:
            work()
        finally:  # a stage that is stopped goes on in the next run
            passed = time.monotonic() - start
            self.seconds[name] = round(self.seconds.get(name, 0.0) + passed, 1)
            write_atomically(self.out / "seconds.json", json.dumps(self.seconds) + "\n")

    def make_videos(self) -> None:
        """Render the demo world, unless it is there."""
        print(f"# rendering the demo world to {self.out / 'world'}")
        build_world(self.out / "world", self.world, num_workers=os.cpu_count() or 1, progress=True)

    def make_shards(self) -> None:
        """Cut the annotated clips into shards; finished ones are kept."""
        root = self.out / "world"
        ek100 = root / "annotations" / "EPIC_100_retrieval_{}.csv"
        for split, file, kind, videos, layout in (
            ("pretrain", root / "annotations" / "ego4d_rephrased.pkl", "lavila", "ego4d", "whole"),
            ("train", Path(str(ek100).format("train")), "ek100", "ek100", "ek100"),
            ("test", Path(str(ek100).format("test")), "ek100", "ek100", "ek100"),
        ):
            words = ["build", f"--annotations={file}", f"--format={kind}"]
            words += [f"--videos={root / 'videos' / videos}", f"--layout={layout}"]
            words += [f"--output={self.out / 'shards' / split}", "--samples-per-shard=240"]
            words += ["--short-side=72", "--gop=12", "--crf=20", "--preset=veryfast"]
            self._command(["shards", *words, f"--workers={os.cpu_count() or 1}"])

    def train(self, verb: str, recipe: str, name: str, *words: str) -> None:
        """Run a training command on one of the demo's recipes."""
        if verb == "test":  # or results of other weights would get another name
            (self.out / name / "test.json").unlink(missing_ok=True)
        command = [verb, f"--config={CONFIGS / recipe}.yaml", f"--data_dir={self.out}"]
        command += [f"--run_dir={self.out / name}", f"--seed_everything={self.seed}"]
        self._command([*command, *words, *self.words])

    def _command(self, words: list[str]) -> None:
        print(f"\n$ eva02-at {shlex.join(words)}", flush=True)
        code = self.run_command(words)
        if code:
            raise StageFailed(code)

    def measure(self) -> tuple[dict[str, Any], DemoResults]:
        """Probe the fine-tuned model and put everything together."""
        words = [f"--config={CONFIGS / 'retrieval.yaml'}", f"--data_dir={self.out}"]
        words += [f"--run_dir={self.out / 'fine_tune'}", *self.words]
        module = build_cli(words).datamodule
        zero_shot = Probe(self.out / "zero_shot", self.out / "pretrain" / "checkpoints", module)
        tuned = Probe(self.out / "fine_tune", self.out / "fine_tune" / "checkpoints", module)
        similarity, relevance = tuned.similarity(), tuned.relevance()
        plain, shuffled = tuned.accuracies(), tuned.accuracies(shuffled=True, seed=self.seed)
        before = zero_shot.accuracies()
        rows = gallery_rows(similarity, relevance)
        metrics = {
            "seed": self.seed,
            "random": _random_figures(relevance, self.seed),
            "zero_shot": _figures(self.out / "zero_shot" / "test.json"),
            "fine_tuned": _figures(self.out / "fine_tune" / "test.json"),
        }
        for kind in ("verb", "noun"):
            metrics[f"{kind}_accuracy"] = {
                "chance": tuned.chance[kind],
                "zero_shot": before[kind],
                "fine_tuned": plain[kind],
                "fine_tuned_shuffled_frames": shuffled[kind],
            }
        metrics["noun_parts"] = {
            part: {"zero_shot": before[part], "fine_tuned": plain[part]}
            for part in ("colour", "object")
        }
        metrics["unseen_pairs"] = {
            "num_clips": plain["num_unseen"],
            "verb_accuracy": plain["unseen_verb"],
            "noun_accuracy": plain["unseen_noun"],
        }
        metrics |= {
            "seconds": {**self.seconds, "total": round(sum(self.seconds.values()), 1)},
            "clips_per_second": {
                "pretrain": self._speed("pretrain"),
                "fine_tune": self._speed("fine_tune"),
            },
            "data": self._data(len(tuned.sentences)),
            "model": tuned.model_facts(),
            "versions": _versions(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        }
        results = DemoResults(
            metrics=metrics,
            pretrain_log=self._log("pretrain"),
            fine_tune_log=self._log("fine_tune"),
            similarity=similarity,
            relevance=relevance,
            narrations=tuned.narrations,
            sentences=[sentence.text for sentence in tuned.sentences],
            frames=tuned.frames(sorted({clip for _, clips in rows for clip in clips})),
            configs={
                name: (self.out / name / "config.yaml").read_text()
                for name in ("pretrain", "fine_tune")
            },
        )
        return metrics, results

    def _log(self, name: str) -> Path | None:
        """A run's figures; one shorter than `log_every_n_steps` has none."""
        path = self.out / name / "logs" / "metrics.csv"
        return path if path.exists() else None

    def _speed(self, name: str) -> float:
        """Clips a second of a run, its evaluations and start included."""
        step = json.loads((self.out / name / ENDED).read_text())["step"]
        config = yaml.safe_load((self.out / name / "config.yaml").read_text())
        clips = step * config["data"]["init_args"]["global_batch_size"]
        return round(clips / self.seconds[name], 1)

    def _data(self, num_sentences: int) -> dict[str, Any]:
        manifests = {
            split: Manifest.load(str(self.out / "shards" / split / "manifest.json"))
            for split in ("pretrain", "train", "test")
        }
        counts = {f"{split}_clips": m.num_samples for split, m in manifests.items()}
        megabytes = sum(s.num_bytes for m in manifests.values() for s in m.shards) / 1e6
        return {**counts, "test_sentences": num_sentences, "shards_megabytes": round(megabytes, 1)}


def _versions() -> dict[str, str]:
    """Versions of what is installed; a platform may lack decord or xformers."""
    found = {}
    for name in VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return found


def _figures(path: Path) -> dict[str, dict[str, float]]:
    """`test.json` of a run as {"map": {"v2t", "t2v", "avg"}, "ndcg": {...}}, in percent."""
    flat = json.loads(path.read_text())
    directions = ("v2t", "t2v", "avg")
    return {
        name: {direction: flat[f"test/{name}_{direction}"] for direction in directions}
        for name in ("map", "ndcg")
    }


def _random_figures(relevance: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    """The metrics of similarities drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.rand(relevance.shape, generator=generator)
    figures = {}
    for name, metric in (("map", multi_instance_map), ("ndcg", multi_instance_ndcg)):
        v2t, t2v = (100 * float(x) for x in metric(similarity, torch.from_numpy(relevance)))
        figures[name] = {"v2t": v2t, "t2v": t2v, "avg": (v2t + t2v) / 2}
    return figures
