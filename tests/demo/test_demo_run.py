"""`eva02-at demo` from videos to report, as small as it goes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_modules.cli.main import main
from lightning_modules.demo.run import Demo
from lightning_modules.demo.world import WorldOptions

FASTEST = (
    "--trainer.max_epochs=3",
    "--trainer.enable_progress_bar=false",
    "--data.init_args.global_batch_size=12",
    "--data.init_args.num_workers=0",
)


def test_the_demo_runs_from_videos_to_report(tmp_path: Path, capsys) -> None:
    out = tmp_path / "demo"
    words = ["demo", f"--out={out}", "--seed=5", "--clips", "24", "24", "12", *FASTEST]
    assert main(words) == 0
    wrote, following = capsys.readouterr().err.splitlines()[-2:]
    assert str(out / "report.html") in wrote and "next: eva02-at search" in following
    metrics = json.loads((out / "metrics.json").read_text())
    for model in ("random", "zero_shot", "fine_tuned"):
        for metric in ("map", "ndcg"):
            scores = metrics[model][metric]
            assert scores["avg"] == pytest.approx((scores["v2t"] + scores["t2v"]) / 2, abs=1e-3)
            assert 0 < scores["avg"] < 100
    for kind in ("verb", "noun"):
        accuracy = metrics[f"{kind}_accuracy"]
        assert set(accuracy) == {"chance", "zero_shot", "fine_tuned", "fine_tuned_shuffled_frames"}
    for part in ("colour", "object"):  # a noun that is named right is so in both
        after = metrics["noun_parts"][part]["fine_tuned"]
        assert metrics["noun_accuracy"]["fine_tuned"] <= after <= 100
    assert metrics["data"]["pretrain_clips"] == 24
    assert metrics["data"]["test_clips"] == 12
    assert metrics["seed"] == 5
    page = (out / "report.html").read_text()
    assert "fine-tuned" in page and "data:image" in page
    kept = {path: path.stat().st_mtime_ns for path in (out / "shards").rglob("*.tar")}
    assert kept

    assert main(words) == 0  # again: videos and shards are there, and the runs are finished
    assert {path: path.stat().st_mtime_ns for path in (out / "shards").rglob("*.tar")} == kept
    again = json.loads((out / "metrics.json").read_text())
    assert again["fine_tuned"] == metrics["fine_tuned"]
    assert again["seconds"]["pretrain"] >= metrics["seconds"]["pretrain"]  # times add up
    assert main([*words, "--seed=6"]) == 2  # another world belongs into another folder


def test_the_time_of_a_stopped_stage_counts(tmp_path: Path) -> None:
    demo = Demo(main, tmp_path, seed=0, world=WorldOptions(), seconds={"pretrain": 5.0})

    def stopped() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo._stage("pretrain", stopped)
    assert json.loads((tmp_path / "seconds.json").read_text())["pretrain"] >= 5.0
