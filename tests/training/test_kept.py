"""What a run keeps of its recipe: no secrets; one W&B run over all its starts."""

from pathlib import Path

import yaml
from jsonargparse import Namespace

from lightning_modules.training.kept import one_wandb_run, with_references
from lightning_modules.training.recipe import build_cli


def test_a_reference_to_the_environment_is_kept_as_one(tmp_path, monkeypatch):
    """Named in a file, on the command line, within a longer value, or through another key."""
    monkeypatch.setenv("DATA_ROOT", "/secret/place")
    monkeypatch.setenv("OWN_SEED", "7")
    extra = tmp_path / "extra.yaml"
    extra.write_text("data_dir: ${oc.env:DATA_ROOT}\n")
    words = ["--config=demo/pretrain", "--config", str(extra), "--trainer.accelerator=cpu"]
    words += ["--ckpt_path=${oc.env:DATA_ROOT}/run", f"--run_dir={tmp_path}"]
    kept = build_cli(words).kept()
    assert "/secret/place" not in kept
    content = yaml.safe_load(kept)
    assert content["data_dir"] == "${oc.env:DATA_ROOT}"
    assert content["ckpt_path"] == "${oc.env:DATA_ROOT}/run"
    assert "${oc.env:DATA_ROOT}/" in str(content["data"])  # by ${data_dir}
    again = tmp_path / "kept.yaml"
    again.write_text(kept)
    assert build_cli(["--config", str(again)]).config.data_dir == "/secret/place"


def test_short_values_are_put_back_only_where_they_are_the_whole(monkeypatch):
    monkeypatch.setenv("LEVEL", "at")
    text = "a: at\nb: data\nc: 3\n"
    found = yaml.safe_load(with_references(text, ["--a=${oc.env:LEVEL}"]))
    assert found == {"a": "${oc.env:LEVEL}", "b": "data", "c": 3}


def test_a_recipe_without_references_is_kept_letter_for_letter():
    text = "a: 1.0e-3  # as it was\n"
    assert with_references(text, ["--config=nowhere.yaml", "--a=0.001"]) == text


def logger(kind: str, **given) -> Namespace:
    path = f"lightning.pytorch.loggers.{kind}"
    return Namespace(class_path=path, init_args=Namespace(**given))


def test_wandb_has_one_run_however_often_it_starts(tmp_path):
    first, second, other = (
        one_wandb_run(logger("WandbLogger", save_dir=".", id=None), str(tmp_path / name)).init_args
        for name in ("run", "run", "other")
    )
    assert first.id == second.id != other.id
    assert first.save_dir == str(tmp_path / "run")
    assert first.resume == "allow"
    assert Path(tmp_path / "run" / "wandb-id").read_text() == first.id


def test_a_wandb_run_that_is_named_and_other_loggers_stay_as_they_are(tmp_path):
    named = one_wandb_run(logger("WandbLogger", save_dir="/elsewhere", id="mine"), str(tmp_path))
    assert (named.init_args.id, named.init_args.save_dir) == ("mine", "/elsewhere")
    assert one_wandb_run(True, str(tmp_path)) is True
    assert not list(tmp_path.iterdir())
