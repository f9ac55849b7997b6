"""Every command ends by saying what it wrote, the figure that matters, and what may come next."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from sweep_runs import write_checkpoint, write_program

from lightning_modules.cli.main import COMMANDS, main
from lightning_modules.demo.run import CONFIGS, Demo
from lightning_modules.demo.world import WorldOptions

HELD = "EPIC_100_retrieval_train.csv"
RUN = f"--config={CONFIGS}/retrieval.yaml --data_dir=. --run_dir=run"
TINY = (
    "--data.init_args.global_batch_size=12 --data.num_workers=0 --data.eval_batch_size=12 "
    "--trainer.max_epochs=2 --trainer.check_val_every_n_epoch=2 --trainer.log_every_n_steps=1"
)
EK100 = "--annotations=world/annotations"
BUILD = (
    "--annotations=world/annotations/EPIC_100_retrieval_{0}.csv --format=ek100 "
    "--videos=world/videos/ek100 --layout=ek100 --output=shards/{0} --short-side=72 --gop=12"
)
# In order, each on what those before it left: command, files it wrote, its figure, what is next.
ROWS: list[tuple[str, str, str, str]] = [
    (f"shards build {BUILD.format('test')} --dry-run", "", r"12 clips", "without --dry-run"),
    (f"shards build {BUILD.format('train')}", "shards/train", r"12 clips in 1 shards", "shards"),
    (f"shards build {BUILD.format('test')}", "shards/test", r"0 rejected", "shards browse"),
    ("shards verify shards/test --decode-every=6", "", r"; 0 faults", "shards info"),
    ("shards info shards/test --json=info.json", "info.json", r"12", "shards browse"),
    ("shards browse shards/test --html=s.html --samples=2", "s.html", "", "open s.html"),
    ("recipes", "", r"mir/eva02_at_base_sms", "recipes copy"),
    ("recipes show demo/pretrain", "", r"max_epochs", "recipes copy demo/pretrain"),
    ("recipes copy demo/pretrain mine.yaml", "mine.yaml", "", "fit --config mine.yaml"),
    (f"fit {RUN} {TINY}", "run/checkpoints", r"step 2, epoch 2: val/map_avg \d", "test"),
    ("runs .", "", r"run +finished +2", "fit --config swept/config.yaml"),
    (f"validate {RUN} {TINY}", "run/validate.json", r"val/map_avg +\d", "test"),
    (f"test {RUN} {TINY}", "run/test.json", r"test/map_avg +\d", "convert --input run"),
    (f"predict {RUN} {TINY}", "run/embeddings.pt", "", "search --checkpoint run"),
    ("convert --input run --output m.safetensors", "m.safetensors", r"read run/.*: ", "search"),
    (
        f"evaluate --checkpoint m.safetensors --benchmark=ek100_mir {EK100} --shards=shards/test "
        "--workers=0 --prediction=s.npy --json=e.json --accelerator=cpu",
        "e.json, s.npy",
        r"map_avg|mAP",
        "audit --annotations world/annotations --similarity s.npy",
    ),
    (f"score {EK100} --similarity s.npy --json=score.json", "score.json", r'"avg"', "audit"),
    (f"audit {EK100} --similarity s.npy --json=audit.json", "audit.json", r"this matrix", "score"),
    (f"tune {EK100} --similarity held.npy --output=t.json", "t.json", r"\d  weight 1", "score"),
    ("embed --checkpoint m.safetensors --videos world/videos/ek100 --output=f.pt --workers=1",
     "f.pt", r"\d", "search"),
    ("embed --checkpoint m.safetensors --texts=q.txt --output=q.npy", "q.npy", r"2", "embed"),
    ("search --checkpoint m.safetensors --videos world/videos/ek100 --workers=1 --rate=2 cuts",
     "", r"answered in", "search --videos"),
    ("sweep --checkpoints swept --benchmark=mir --output=out", "out/table.html", r"map.avg",
     "out/table.html in a browser"),
    ("zoo", "", r"never|none has been checked", "zoo NAME"),
    ("zoo eva02_clip_b_16", "", r"published by", "evaluate --zoo"),
    (f"plan --config={CONFIGS}/pretrain.yaml --clips=1000 --json=plan.json", "plan.json", r"GiB",
     "submit"),
    (f"submit {RUN} {TINY} --gpus-per-node=0 --dry-run", "", r"sbatch", "without --dry-run"),
    ("doctor --quick --json=doctor.json", "doctor.json", r"", "plan"),
    ("bench eval --videos=50 --texts=20 --items=0 --rounds=1 --json=b.json", "", r"\d", "docs/"),
]  # fmt: skip
MAY_FIND_FAULTS = ("audit", "doctor")  # on chance's figures, on a machine without a GPU


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The demo's videos, sentences to embed, and a run that a sweep's stand-in evaluates."""
    monkeypatch.chdir(tmp_path)
    options = WorldOptions(num_pretrain=12, num_train=12, num_test=12)
    Demo(main, tmp_path, seed=0, world=options).make_videos()
    (tmp_path / "q.txt").write_text("cut the bread\nwash the cup\n")
    write_checkpoint(Path("swept"), 10, "x")
    monkeypatch.setenv("EVA02_AT", str(write_program(tmp_path)))
    annotations = tmp_path / "world" / "annotations"
    sizes = [len((annotations / name).read_text().splitlines()) - 1
             for name in (HELD, HELD.replace(".csv", "_sentence.csv"))]  # fmt: skip
    np.save("held.npy", np.random.default_rng(0).random(sizes, dtype=np.float32))
    return tmp_path


def test_every_command_says_what_it_wrote_and_what_is_next(folder: Path, capsys) -> None:
    capsys.readouterr()
    for line, wrote, figure, following in ROWS:
        command = line.split()[0]
        code = main(shlex.split(line))
        printed = capsys.readouterr()
        told = printed.out + printed.err
        assert code == 0 or (code == 1 and command in MAY_FIND_FAULTS), f"{line}\n{told}"
        assert re.search(figure, told), f"{line}\n{told}"
        last = printed.err.strip().splitlines()[-1]
        assert last.startswith("next: ") and following in last, f"{line}\n{last}"
        if last.startswith("next: eva02-at "):
            assert last.split()[2] in COMMANDS
        for name in filter(None, wrote.split(", ")):
            assert (folder / name).exists() and name in told, f"{line}: {name}\n{told}"
    assert {line.split()[0] for line, *_ in ROWS} | {"demo"} == set(COMMANDS)  # demo: its own test
