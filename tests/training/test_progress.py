"""What a run says of itself: lines in a file, one line on a terminal, silence on request."""

from __future__ import annotations

import io
import json
import re
import sys

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_modules.training.monitor.progress import RunProgress
from lightning_modules.training.runs import ENDED


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Model(BoringModel):
    def validation_step(self, batch, batch_idx):
        self.log("val/map_avg", float(batch_idx))


def told_by(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, tmp_path, every_s=1e-9, **given):
    monkeypatch.setattr(sys, "stderr", stream)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=2,
        limit_train_batches=3,
        limit_val_batches=1,
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path / "run",
        callbacks=[RunProgress(every_s)],
        **given,
    )
    trainer.fit(Model())
    return stream.getvalue()


def test_a_file_gets_whole_lines(monkeypatch, tmp_path):
    told = told_by(monkeypatch, io.StringIO(), tmp_path)
    assert "\r" not in told and "\033" not in told
    lines = [line for line in told.splitlines() if line.startswith("step ")]
    assert [re.match(r"step (\d+)/6 \(\d+%\), epoch (\d)", line).groups() for line in lines] == [
        (str(step), str((step + 2) // 3)) for step in range(1, 7)
    ]
    assert all(line.endswith("left") for line in lines)
    assert "run: Model, 0.0 M parameters, 1 process on cpu" in told
    assert "validated after step 3" in told and "val/map_avg 0.00" in told
    assert f"--run_dir={tmp_path / 'run'}" in told.splitlines()[-1]
    ended = json.loads((tmp_path / "run" / ENDED).read_text())
    assert ended == {"step": 6, "max_steps": -1, "max_epochs": 2}


def test_steps_count_as_the_optimiser_does(monkeypatch, tmp_path):
    told = told_by(monkeypatch, io.StringIO(), tmp_path, accumulate_grad_batches=2, max_steps=3)
    assert "3 steps, from the start" in told and "step 3/3 (100%)" in told
    told = told_by(monkeypatch, io.StringIO(), tmp_path, accumulate_grad_batches=2)
    assert "4 steps" in told and "step 4/4 (100%)" in told  # a short last batch counts


def test_a_terminal_has_one_line_that_fits(monkeypatch, tmp_path):
    monkeypatch.setattr("time.monotonic", iter(range(10**6)).__next__)
    monkeypatch.setenv("COLUMNS", "24")
    told = told_by(monkeypatch, Terminal(), tmp_path)
    assert told.count("\r\033[Kstep ") >= 1
    open_lines = re.findall(r"(?:^|\n|\033\[K)(step [^\r\n]*)", told)
    assert len(open_lines) == 6 and all(len(line) <= 23 for line in open_lines)


def test_nothing_is_said_where_nothing_is_wanted(monkeypatch, tmp_path):
    assert "step" not in told_by(monkeypatch, io.StringIO(), tmp_path, every_s=0)


def test_a_run_that_ends_badly_says_how_to_go_on(monkeypatch, tmp_path):
    def broken(self, batch, batch_idx):
        raise RuntimeError("a fault")

    monkeypatch.setattr(Model, "validation_step", broken)
    stream = io.StringIO()
    with pytest.raises(RuntimeError, match="a fault"):
        told_by(monkeypatch, stream, tmp_path, num_sanity_val_steps=0)
    assert re.search(r"ended at step \d; the same command goes on", stream.getvalue())


def test_a_run_that_never_began_says_nothing(monkeypatch, tmp_path):
    def broken(self):
        raise RuntimeError("a fault")

    monkeypatch.setattr(Model, "train_dataloader", broken)
    stream = io.StringIO()
    with pytest.raises(RuntimeError, match="a fault"):
        told_by(monkeypatch, stream, tmp_path, num_sanity_val_steps=0)
    assert "goes on" not in stream.getvalue()


def test_a_negative_interval_is_refused():
    with pytest.raises(ValueError, match=r"progress.every_s is -1"):
        RunProgress(-1)
