"""Models trained on four frames, shown more: what time to give them; figures in docs/long_clips.md.

    for seed in 0 1 2; do eva02-at demo --seed $seed --out runs/demo-$seed; done
    python docs/reproduction/long_clips.py --demos runs/demo-0 runs/demo-1 runs/demo-2 \\
        --out runs/long_clips --write docs/long_clips.md

Trains nothing. Runs only what is not there yet: a finished cell is a file OUT/cells/*.json.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from miniature import CONFIGS
from seeds import BySeed, differences, markdown, means, script_parser, show
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.checkpoints.conversion import load_model
from lightning_modules.cli.main import main as run_command
from lightning_modules.demo.probe import Probe
from lightning_modules.demo.run import Demo
from lightning_modules.demo.world import WorldOptions
from lightning_modules.metrics.functional import multi_instance_map, multi_instance_ndcg
from lightning_modules.training.recipe import build_cli

TRAINED = 4  # frames
SMALL = {"seed": 0, "num_pretrain": 2, "num_train": 2, "num_test": 288}
WORLDS = {  # the demo's world has 12 frames a clip: 1.5 s, 8 frames a second
    "denser": WorldOptions(**SMALL, fps=48),
    "longer": WorldOptions(**SMALL, clip_s=8.0),
}
FRAMES = (4, 8, 16, 32)
INDEX, VIEWS = "frame index", "views of 4"
REFERENCE = f"vision.reference_frames={TRAINED}"
TIMES = {
    INDEX: [],
    "linear": [REFERENCE],
    "centred": [REFERENCE, "vision.time_scaling=centred"],
    "NTK": [REFERENCE, "vision.time_scaling=ntk"],
}
COLUMNS = {
    "mAP": "map",
    "nDCG": "ndcg",
    "verb": "verb",
    "verb, frames shuffled": "verb_shuffled",
}


@dataclass(frozen=True)
class Views:
    """A dual encoder that sees a clip as several of `TRAINED` frames, interleaved, and averages."""

    model: Any

    def encode_video(self, video: Tensor) -> Tensor:
        """(B, 3, T, H, W) to (B, E), as `evaluate --views` does."""
        count = video.shape[2] // TRAINED
        views = [self.model.encode_video(video[:, :, k::count]) for k in range(count)]
        return F.normalize(torch.stack(views).mean(0), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """The model's own."""
        return self.model.encode_text(tokens)


@dataclass(frozen=True)
class LongClips:
    """The evaluations.

    Attributes:
        out: Folder of the worlds and the figures.
        demos: Folders of `eva02-at demo`, one of each seed.
    """

    out: Path
    demos: Sequence[Path]

    def run(self) -> dict[str, str]:
        """Run what is missing; returns the tables by name."""
        for name, options in WORLDS.items():
            world = Demo(run_command, self.out / name, options.seed, options)
            world.make_videos()
            world.make_shards()
        for num_frames in FRAMES:
            for name in WORLDS:
                self.measure(name, num_frames)
        return {name: self.table(name) for name in WORLDS}

    def measure(self, world: str, num_frames: int) -> None:
        """Every model, in every time, on a world's clips of so many frames."""
        cells = [(time, demo) for time in times_of(num_frames) for demo in self.demos]
        missing = [cell for cell in cells if not self._path(world, num_frames, *cell).is_file()]
        if not missing:
            return
        run = self.demos[0] / "fine_tune"
        words = [f"--config={CONFIGS / 'demo' / 'retrieval.yaml'}", f"--run_dir={run}"]
        words += [f"--data_dir={self.out / world}", f"--model.model.num_frames={num_frames}"]
        probe = Probe(run, run / "checkpoints", build_cli(words).datamodule)
        for time, demo in missing:
            run = demo / "fine_tune"
            loaded: Any = load_model(
                run / "checkpoints", config=run / "test.yaml", settings=TIMES.get(time, ())
            )
            if time == VIEWS:
                loaded = replace(loaded, model=Views(loaded.model))
            probe.loaded = loaded
            figures = figures_of(probe)
            path = self._path(world, num_frames, time, demo)
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(figures) + "\n")
            print(path.stem, figures, flush=True)

    def _path(self, world: str, num_frames: int, time: str, demo: Path) -> Path:
        name = f"{world}-{num_frames}-{time.replace(' ', '-')}-{demo.name}.json"
        return self.out / "cells" / name

    def table(self, world: str) -> str:
        """Means of the models, and how each differs from itself at four frames, in Markdown."""
        base = self._read(world, TRAINED, INDEX)
        rows = [[TRAINED, "any", *means(base, COLUMNS)]]
        for num_frames in FRAMES[1:]:
            for time in [*TIMES, VIEWS]:
                cells = self._read(world, num_frames, time)
                told = zip(means(cells, COLUMNS), differences(cells, base, COLUMNS), strict=True)
                columns = [f"{mean.partition(' ')[0]} ({apart})" for mean, apart in told]
                rows.append([num_frames, time, *columns])
        return markdown(["frames", "time", *COLUMNS], rows)

    def _read(self, world: str, num_frames: int, time: str) -> BySeed:
        paths = [self._path(world, num_frames, time, demo) for demo in self.demos]
        return {seed: json.loads(path.read_text()) for seed, path in enumerate(paths)}


def times_of(num_frames: int) -> list[str]:
    """The ways to tell a model when so many frames are; at four frames they are one."""
    return [INDEX] if num_frames == TRAINED else [*TIMES, VIEWS]


def figures_of(probe: Probe) -> dict[str, float]:
    """mAP, nDCG and accuracies of verbs in percent, of the probe's model on its clips."""
    similarity = torch.from_numpy(probe.similarity())
    relevance = torch.from_numpy(probe.relevance())
    plain, shuffled = probe.accuracies(), probe.accuracies(shuffled=True)
    return {
        "map": 50 * float(sum(multi_instance_map(similarity, relevance))),
        "ndcg": 50 * float(sum(multi_instance_ndcg(similarity, relevance))),
        "verb": plain["verb"],
        "verb_shuffled": shuffled["verb"],
    }


def main() -> None:
    """Evaluate and write the tables."""
    args = script_parser(__doc__, "runs/long_clips").parse_args()
    torch.set_num_threads(1)
    tables = LongClips(args.out, args.demos).run()
    show({f"long_clips.{name}": table for name, table in tables.items()}, args.write)


if __name__ == "__main__":
    main()
