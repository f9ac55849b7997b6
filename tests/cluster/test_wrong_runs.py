"""Wrong uses of `fit` and `test`: one line with what was given and the mend, exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_modules.cli.main import main

LOSS = "--model.loss=lightning_modules.losses."
OWN = """
import torch
class OfClipsAlone(torch.nn.Module):
    def forward(self, video, *, even=False):
        return video.sum()
"""
# what is added to a recipe that runs, and what the answer names
FIT = [
    ("--trainer.accelerator=gpu", "say --trainer.accelerator=cpu"),
    ("--trainer.devices=two", "trainer.devices is 'two'; it must be a number of 1 or more"),
    ("--trainer.devices=0", "trainer.devices is '0'; it must be a number of 1 or more"),
    ("--trainer.devices=-3", "trainer.devices is '-3'; it must be"),
    ("--trainer.devices=6400", "6400 processes on"),
    ("--trainer.num_nodes=0", "must be a positive integer, but got 0"),
    ("--trainer.num_nodes=2", "the run is to be on 2 nodes, but nothing has started"),
    ("--model.init_checkpoint=HERE/notes.pt", "notes.pt"),
    (f"{LOSS}MaxMarginLoss", "model.loss is MaxMarginLoss"),
    (
        "--model.loss=own_losses_of_wrong_runs.OfClipsAlone",
        "model.loss is OfClipsAlone, whose forward cannot be called",
    ),
    ("--data.num_frames=4", "data.num_frames is 4 and model.model.num_frames is 2; give both"),
    ("--data.image_size=64", "data.image_size is 64 and model.model.image_size is 32"),
    ("--data.num_workers=-1", "data.num_workers is -1; it must be at least 0"),
    ("--data.prefetch=0", "data.prefetch is 0; it must be at least 1"),
    ("--data.prefetch_shards=-1", "data.prefetch_shards is -1; it must be at least 0"),
    ("--data.cache_gb=0", "data.cache_gb is 0.0; it must be above 0"),
    ("--data.global_batch_size=0", "data.global_batch_size is 0; it must be at least 1"),
    ("--watchdog.stall_s=0", "stall_s is 0.0; it must be above 0"),
    ("--config HERE/empty.yaml", "empty.yaml is empty; a recipe is a mapping"),
    ("--config HERE/list.yaml", "list.yaml is a list; a recipe is a mapping"),
    ("--config HERE/binary.yaml", "binary.yaml is no text"),
    ("--ckpt_path=HERE/notes.pt", "notes.pt is no file that torch.save writes"),
    ("--ckpt_path=HERE/absent", "no complete checkpoint in HERE/absent"),
]
TEST = [
    ("", "there is nothing to evaluate: no checkpoint in"),
    ("--ckpt_path=HERE/notes.pt", "notes.pt cannot be read"),
    ("--ckpt_path=HERE/absent", "absent: no such file or folder"),
    ("CKPT --model.model.num_frames=4 --data.num_frames=4", "of another model than the recipe's"),
    ("CKPT --model.model.embed_dim=16", "is of another model than the recipe's"),
    ("CKPT --model.loss.temperature=0.07", None),  # no figure of `test` depends on it
    ("CKPT --trainer.accelerator=gpu", "say --trainer.accelerator=cpu"),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "own_losses_of_wrong_runs.py").write_text(OWN)
    (folder / "empty.yaml").write_text("# nothing yet\n")
    (folder / "list.yaml").write_text("- model\n- data\n")
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "notes.pt").write_text("to do: sleep\n")
    return folder


def words_of(verb: str, added: str, recipe: Path, here: Path, run_dir: Path) -> list[str]:
    base = f"{verb} --config {recipe} --run_dir={run_dir} --trainer.devices=1 --data.num_workers=0"
    return f"{base} {added}".replace("HERE", str(here)).split()


def answer(verb, added, recipe, here, run_dir, capfd, monkeypatch) -> tuple[int, list[str]]:
    monkeypatch.chdir(here)  # where own classes are found
    code = main(words_of(verb, added, recipe, here, run_dir))
    error = capfd.readouterr().err
    assert "Traceback" not in error and "weights_only" not in error, error
    return code, [line for line in error.splitlines() if line.startswith("eva02-at: ")]


@pytest.mark.parametrize(("added", "told"), FIT)
def test_a_wrong_fit_is_answered_in_one_line(
    recipe, here, tmp_path, capfd, monkeypatch, added, told
):
    code, lines = answer("fit", added, recipe, here, tmp_path / "run", capfd, monkeypatch)
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("eva02-at: error: ")
    assert told.replace("HERE", str(here)) in lines[0]
    assert not list(tmp_path.glob("run/checkpoints/step-*"))


@pytest.fixture(scope="module")
def trained(recipe, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    words = ["--trainer.max_epochs=1", "--data.val=null", "--trainer.logger=false"]
    assert main([*words_of("fit", "", recipe, Path(), run_dir), *words]) == 0
    return run_dir / "checkpoints"


@pytest.mark.parametrize(("added", "told"), TEST)
def test_a_wrong_test_is_answered_in_one_line(
    recipe, here, trained, tmp_path, capfd, monkeypatch, added, told
):
    added = f"{added.replace('CKPT', f'--ckpt_path={trained}')} --data.test.manifest="
    added += str(recipe.parent / "shards" / "manifest.json")
    code, lines = answer("test", added, recipe, here, tmp_path / "run", capfd, monkeypatch)
    if told is None:
        assert code == 0
        return
    assert code == 2 and len(lines) == 1, lines
    assert told in lines[0]
    assert not (tmp_path / "run" / "test.json").exists()


def test_a_pretraining_checkpoint_gives_a_retrieval_run_its_weights_alone(
    recipe, here, trained, tmp_path, capfd, monkeypatch
):
    """With a loss of relevance on the same clips, nothing else would tell the two apart."""
    added = f"{LOSS}MaxMarginLoss --model=lightning_modules.retrieval.RetrievalModule "
    added += f"{LOSS}MaxMarginLoss --data.val=null --ckpt_path={trained}"
    code, lines = answer("fit", added, recipe, here, tmp_path / "run", capfd, monkeypatch)
    assert code == 2 and len(lines) == 1, lines
    assert "another training's (module PretrainModule -> RetrievalModule" in lines[0]
    assert "model.init_checkpoint" in lines[0]


@pytest.mark.distributed
@pytest.mark.parametrize("added", ["--data.num_frames=4", "--ckpt_path=HERE/notes.pt"])
def test_of_two_ranks_one_speaks(zygote, recipe, here, tmp_path, added):
    words = [*words_of("fit", added, recipe, here, tmp_path / "run"), "--trainer.devices=2"]
    launched = zygote.start(tmp_path / "log.txt", world=2, argv=words)
    assert launched.wait() == [2, 2], launched.text()
    assert launched.text().count("eva02-at: error: ") == 1, launched.text()
