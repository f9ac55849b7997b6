"""Storage that fails under a run: waited for, else the run stops with a checkpoint.

The real loader, files and trainer; what fails is the call of the file system, in the worker.
"""

import errno
import os
import shutil

import pytest
from cluster_runs import losses_of

from datamodules.stream.reader import Corpus, SampleReader
from datamodules.stream.retry import Retry, StorageUnavailable
from datamodules.video.decode import DamagedSample
from lightning_modules.cli.main import main

QUICK = Retry(patience_s=0.3, first_s=0.05, longest_s=0.1)


@pytest.fixture
def shards(recipe, tmp_path):
    return shutil.copytree(recipe.parent / "shards", tmp_path / "shards")


def failing(monkeypatch, name: str, number: int, times: int):
    """Make the first calls of `os.NAME` fail; the count of calls."""
    real, calls = getattr(os, name), []

    def call(*args, **kwargs):
        calls.append(args)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, call)
    return calls


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT])
@pytest.mark.parametrize("name", ["pread", "open"])
def test_a_fault_that_passes_costs_no_sample(shards, monkeypatch, number, name):
    whole = SampleReader(Corpus.load([str(shards)])).read(1, 3)
    reader = SampleReader(Corpus.load([str(shards)]), retry=QUICK)
    calls = failing(monkeypatch, name, number, times=2)
    assert reader.read(1, 3) == whole
    assert len(calls) >= 3


def test_a_fault_that_stays_is_the_storages_and_no_damage(shards, monkeypatch):
    reader = SampleReader(Corpus.load([str(shards)]), retry=QUICK)
    failing(monkeypatch, "pread", errno.EIO, times=10**6)
    with pytest.raises(StorageUnavailable, match=r"shard-000001\.tar: no answer in \d+ tries"):
        reader.read(1, 3)


@pytest.mark.parametrize("gone", ["folder", "contents"])
def test_a_mount_that_is_gone_is_waited_for_and_a_missing_shard_is_damage(shards, gone):
    corpus = Corpus.load([str(shards)])
    reader = SampleReader(corpus, retry=QUICK)
    (shards / "shard-000002.tar").unlink()
    with pytest.raises(DamagedSample, match="No such file"):
        reader.read(2, 0)
    shards.rename(shards.with_name("elsewhere"))
    if gone == "contents":
        shards.mkdir()
    with pytest.raises(StorageUnavailable, match="not mounted"):
        reader.read(1, 0)
    if gone == "contents":
        shards.rmdir()
    shards.with_name("elsewhere").rename(shards)
    assert reader.read(1, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_whose_storage_stays_away_stops_with_a_checkpoint_and_goes_on_exactly(
    recipe, tmp_path, shards, monkeypatch, capfd, workers
):
    """Its shards are taken away under it after some reads, and are back for the next start."""
    file = tmp_path / "recipe.yaml"
    text = recipe.read_text().replace(str(recipe.parent / "shards"), str(shards))
    file.write_text(text.replace("checkpoints: {every_n_steps: 4}", ""))
    words = ["fit", "--config", str(file), "--trainer.devices=1", "--trainer.max_epochs=2"]
    words += [f"--data.num_workers={workers}", "--data.storage_patience_s=0.5"]
    assert main([*words, f"--run_dir={tmp_path / 'whole'}"]) == 0
    real, count = os.pread, [0]

    def stale_from_the_twentieth_on(*args):
        count[0] += 1
        if count[0] > 20:
            raise OSError(errno.ESTALE, "Stale file handle")
        return real(*args)

    part = [*words, f"--run_dir={tmp_path / 'part'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", stale_from_the_twentieth_on)
        capfd.readouterr()
        assert main(part) == 75
    told = capfd.readouterr().err
    assert "Traceback" not in told
    assert "Stale file handle" in told.splitlines()[-1]
    assert "Stopped after step 2, with a checkpoint" in told.splitlines()[-1]
    assert (tmp_path / "part" / "checkpoints" / "latest").read_text() == "step-00000002\n"
    assert "damaged" not in told
    assert main(part) == 0
    assert losses_of(tmp_path / "part") == losses_of(tmp_path / "whole")


def test_one_missing_shard_of_many_ends_nothing_and_is_told_once(
    recipe, tmp_path, shards, capfd, caplog
):
    """A quarter of the data here; half of it is too much, whichever rank reads it."""
    (shards / "shard-000001.tar").unlink()
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.read_text().replace(str(recipe.parent / "shards"), str(shards)))
    words = ["fit", "--config", str(file), "--trainer.devices=1", f"--run_dir={tmp_path / 'run'}"]
    words += ["--data.num_workers=1", "--data.val=null"]
    for epochs, rate, code, told in ((2, 0.3, 0, 1), (4, 0.3, 0, 0), (6, 0.1, 1, 0)):
        caplog.clear()
        more = [f"--trainer.max_epochs={epochs}", f"--data.max_fault_rate={rate}"]
        assert main([*words, *more]) == code
        lines = [r.getMessage() for r in caplog.records if "cannot be used" in r.getMessage()]
        assert len(lines) == told, lines  # once in the life of the run
        if told:
            assert "shard-000001.tar cannot be used: its 8 samples are replaced" in lines[0]
        captured = capfd.readouterr().err
        assert "damaged sample" not in captured
        assert ("max_fault_rate=0.1" in captured) == (code == 1)
