"""`test` of a recipe and `evaluate` of its checkpoint: the same figures, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from epic_files import write_retrieval_split
from small_world import NUM_CLIPS, NUM_SENTENCES

from lightning_modules.cli.main import main

RECIPE = Path(__file__).parents[2] / "configs" / "mir" / "eva02_at_base_sms.yaml"


def of_test(folder: Path, out: Path, *words: str) -> list[str]:
    """Words of the recipe's test on the small world's checkpoint."""
    return [
        "test",
        f"--config={RECIPE}",
        f"--run_dir={out}",
        f"--model.init_checkpoint={folder / 'm.pt'}",
        "--model.model.preset=eva02_at_tiny",
        "--model.model.embed_dim=64",
        "--model.model.num_frames=2",
        "--data.image_size=64",
        "--data.num_workers=0",
        "--data.eval_batch_size=3",
        f"--data.val.manifest={folder / 'shards'}",
        f"--data.val.annotations={folder / 'annotations'}",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32",
        "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        *words,
    ]


def of_evaluate(folder: Path, out: Path, *words: str) -> list[str]:
    """Words of the same through `evaluate`."""
    checkpoint = ["--checkpoint", folder / "m.pt", "--config", folder / "m.json"]
    data = ["--shards", folder / "shards", "--annotations", folder / "annotations"]
    how = ["--accelerator", "cpu", "--workers", "0", "--batch-size", "3"]
    benchmark = ["--benchmark", "ek100_mir", "--json", out]
    return [*map(str, ["evaluate", *benchmark, *checkpoint, *data, *how, *words])]


def flat(result: dict, stem: str = "test/") -> dict[str, float]:
    """`evaluate`'s figures under the names of `test.json`."""
    found: dict[str, float] = {}
    for name, value in result.items():
        if name in ("benchmark", "protocol", "checkpoint", "per_query"):
            continue
        found |= flat(value, f"{stem}{name}_") if isinstance(value, dict) else {stem + name: value}
    return found


def figures_of(run: Path) -> dict[str, float]:
    """The figures and counts of a run's `test.json`, without what it says of itself."""
    content = json.loads((run / "test.json").read_text())
    return {name: value for name, value in content.items() if name.startswith("test/")}


def both(folder: Path, out: Path, *, tests: tuple = (), evaluates: tuple = (), run=main) -> dict:
    """Run both, compare, return the figures."""
    assert run(of_test(folder, out / "run", *tests)) == 0
    assert run(of_evaluate(folder, out / "e.json", *evaluates)) == 0
    tested = figures_of(out / "run")
    evaluated = flat(json.loads((out / "e.json").read_text()))
    assert tested == evaluated  # floats as JSON writes them, which is all their bits
    return tested


def run_apart(words: list[str]) -> int:
    """As a user's shell would, with one thread a process: sums of another order are no point."""
    command = [sys.executable, "-m", "lightning_modules.cli.main", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, timeout=200, check=False).returncode


def test_one_process(world, tmp_path):
    figures = both(world[0], tmp_path)
    assert figures["test/num_queries_v2t"] == NUM_CLIPS and figures["test/num_missing_clips"] == 0
    assert 0 < figures["test/map_avg"] < 100


@pytest.mark.distributed
def test_two_ranks(world, tmp_path):
    ranks = ("--trainer.devices=2", "--trainer.strategy=ddp")
    both(world[0], tmp_path, tests=ranks, evaluates=("--devices", "2"), run=run_apart)


def test_the_precision_of_the_recipes(world, tmp_path):
    both(world[0], tmp_path / "plain", evaluates=("--prediction", str(tmp_path / "plain.npy")))
    tests = ("--trainer.precision=bf16-mixed",)
    evaluates = ("--dtype", "bf16-mixed", "--prediction", str(tmp_path / "mixed.npy"))
    both(world[0], tmp_path / "mixed", tests=tests, evaluates=evaluates)
    plain, mixed = np.load(tmp_path / "plain.npy"), np.load(tmp_path / "mixed.npy")
    assert 1e-5 < np.abs(plain - mixed).max() < 0.1  # bf16 has three digits


def test_a_part_is_refused_and_counted_alike(world, tmp_path, capsys):
    """13 clips in the shards, 16 in the annotations."""
    folder = tmp_path / "part"
    folder.mkdir()
    for name in ("shards", "m.pt", "m.json"):
        (folder / name).symlink_to(world[0] / name)
    (folder / "annotations").mkdir()
    write_retrieval_split(folder / "annotations", "test", NUM_CLIPS + 3, NUM_SENTENCES)
    for words in (of_test(folder, tmp_path / "run"), of_evaluate(folder, tmp_path / "e.json")):
        capsys.readouterr()
        assert main(words) == 2
        assert "3 of 16 clips missing (18.75%)" in capsys.readouterr().err
    assert not (tmp_path / "run" / "test.json").exists()
    tests, evaluates = ("--data.max_missing=0.2",), ("--max-missing", "0.2")
    figures = both(folder, tmp_path, tests=tests, evaluates=evaluates)
    assert figures["test/num_missing_clips"] == 3
    assert "-- 3 of 16 clips missing" in capsys.readouterr().out  # test's; evaluate's goes to err


def test_batches_left_out_leave_no_figures(world, tmp_path):
    with pytest.warns(UserWarning, match="limit_test_batches leaves some clips out"):
        assert main(of_test(world[0], tmp_path, "--trainer.limit_test_batches=2")) == 0
    assert figures_of(tmp_path) == {}
