"""`eva02-at fit` on real shards over two ranks: stopped by a signal, it goes on exactly."""

import csv
import json
import math

import pytest
from cluster_runs import losses_of, run_stopped_once

from lightning_modules.checkpoints.conversion import load_model
from lightning_modules.checkpoints.source import find_checkpoint
from lightning_modules.training.recipe import build_cli


def words(recipe, folder, strategy):
    files = [str(recipe), f"configs/strategy/{strategy}.yaml"]
    precision = "32-true" if strategy == "ddp" else "bf16-mixed"
    configs = [word for file in files for word in ("--config", file)]
    return [
        "fit",
        *configs,
        f"--run_dir={folder}",
        "--trainer.devices=2",
        f"--trainer.precision={precision}",
    ]


def rows(folder):
    with (folder / "logs" / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if v} for row in csv.DictReader(file)]


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "optimizer"),
    [
        ("zero2", "adamw"),
        ("ddp", "muon"),
        *(pytest.param(s, "adamw", marks=pytest.mark.slow) for s in ("ddp", "zero1", "zero3")),
    ],
)
def test_a_recipe_that_is_stopped_goes_on_exactly(zygote, tmp_path, recipe, strategy, optimizer):
    whole, parts = tmp_path / "whole", tmp_path / "parts"

    def argv(folder):
        return [*words(recipe, folder, strategy), f"--model.optimizer.name={optimizer}"]

    done = zygote.start(tmp_path / "whole.txt", world=2, argv=argv(whole))
    assert done.wait() == [0, 0], done.text()
    assert len(losses_of(whole)) == 12

    stopped_at = run_stopped_once(zygote, parts, argv(parts))
    assert 0 < stopped_at < 12
    assert losses_of(parts) == losses_of(whole)
    last = json.loads((parts / "checkpoints" / "step-00000012" / "manifest.json").read_text())
    assert last["metrics"]["val/map_avg"] > 0
    speeds = [row for row in rows(parts) if "speed/clips_per_s" in row]
    assert len(speeds) == 12
    assert all(float(row["speed/clips_per_s"]) > 0 for row in speeds)
    assert all(0 <= float(row["speed/data_wait"]) <= 1 for row in speeds)
    assert float(speeds[-1]["speed/lr"]) < float(speeds[5]["speed/lr"])  # the cosine falls


def learnt(folder):
    """What SigLIP's loss has learnt by the newest checkpoint; the model that is read lacks it."""
    state = find_checkpoint(folder).read_module()
    assert not [key for key in load_model(folder).model.state_dict() if key == "bias"]
    return state["loss.log_scale"].item(), state["loss.bias"].item()


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_a_loss_that_learns_goes_on_where_it_was(zygote, tmp_path, recipe, strategy):
    """A stop after the first checkpoint, and SigLIP's t and b end where they would have."""
    siglip = "--model.loss=lightning_modules.losses.SigLIPLoss"
    exact = [siglip, "--trainer.precision=32-true", "--trainer.max_epochs=2"]
    exact += ["--model.optimizer.schedule=constant"]  # the cosine ends where the first part does
    whole = zygote.start(
        tmp_path / "whole.txt", world=2, argv=[*words(recipe, tmp_path / "whole", strategy), *exact]
    )
    assert whole.wait() == [0, 0], whole.text()
    expected = learnt(tmp_path / "whole")
    assert expected[0] != pytest.approx(math.log(10), abs=1e-4)
    assert expected[1] != pytest.approx(-10, abs=1e-4)

    argv = [*words(recipe, tmp_path / "parts", strategy), *exact]
    first = zygote.start(tmp_path / "parts.txt", world=2, argv=[*argv, "--trainer.max_steps=4"])
    assert first.wait() == [0, 0], first.text()
    halfway = learnt(tmp_path / "parts")
    assert halfway != expected
    second = zygote.start(tmp_path / "parts.txt", world=2, argv=argv)
    assert second.wait() == [0, 0], second.text()
    assert learnt(tmp_path / "parts") == expected
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")


def hard_negatives(folder) -> list[str]:
    """EgoNCE++ with false captions, and clips backwards, of which each rank has another number."""
    verbs, nouns = [["move"], ["leave"], ["hold"]], [[f"thing {k}"] for k in range(32)]
    (folder / "v.json").write_text(json.dumps({"verbs": verbs, "nouns": nouns}))
    hard = {"vocabulary": str(folder / "v.json"), "num_verbs": 1, "num_nouns": 2}
    hard |= {"inverse_verbs": [["move", "leave"]], "reversed_share": 0.7}
    loss = "--model.loss=lightning_modules.losses.EgoNCEPlusPlusLoss"
    return [loss, f"--data.hard_negatives={json.dumps(hard)}"]


@pytest.mark.distributed
def test_micro_batches_of_uneven_ranks_are_refused_under_zero_3(zygote, tmp_path, recipe):
    """Each gathers weights on all ranks: one with fewer would leave the others waiting."""
    argv = [*words(recipe, tmp_path / "run", "zero3"), *hard_negatives(tmp_path)]
    done = zygote.start(tmp_path / "log.txt", world=2, argv=[*argv, "--model.micro_batch=2"])
    assert done.wait() == [2, 2], done.text()
    assert "set model.micro_batch to null, or use ZeRO 2" in done.text().replace("\n", " ")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_hard_negatives_go_on_exactly(zygote, tmp_path, recipe, strategy):
    """The losses of a stopped run are those of a whole one, on ranks of different sizes."""
    more = [*hard_negatives(tmp_path), "--model.optimizer.schedule=constant"]
    more += ["--trainer.precision=32-true", "--trainer.max_epochs=2"]
    whole = [*words(recipe, tmp_path / "whole", strategy), *more]
    parts = [*words(recipe, tmp_path / "parts", strategy), *more]
    for argv in (whole, [*parts, "--trainer.max_steps=3"], parts):
        done = zygote.start(tmp_path / "log.txt", world=2, argv=argv)
        assert done.wait() == [0, 0], done.text()
    assert losses_of(tmp_path / "parts") == losses_of(tmp_path / "whole")
    shares = {float(r["train/negatives"]) for r in rows(tmp_path / "whole") if "train/loss" in r}
    assert min(shares) > 0.6 and max(shares) < 1  # a caption of verb 1 or 2 says "moves"


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("strategy", "option"),
    [
        ("zero2", "--model.micro_batch=2"),  # GradCache
        *(
            pytest.param(strategy, option, marks=pytest.mark.slow)
            for strategy, option in (
                ("ddp", "--model.micro_batch=2"),
                ("zero1", "--model.micro_batch=2"),
                ("zero3", "--model.micro_batch=2"),
                ("zero2", "--config=configs/strategy/zero2_offload.yaml"),
                ("zero3", "--config=configs/strategy/zero3_offload.yaml"),
                ("zero3", "--model.model.activation_checkpointing=true"),
            )
        ),
    ],
)
def test_what_saves_memory_changes_no_loss(zygote, tmp_path, recipe, strategy, option):
    exact = ["--trainer.precision=32-true", "--model.model.patch_dropout=0"]
    for name, more in (("plain", []), ("saving", [option])):
        argv = [*words(recipe, tmp_path / name, strategy), *exact, *more]
        done = zygote.start(tmp_path / f"{name}.txt", world=2, argv=argv)
        assert done.wait() == [0, 0], done.text()
    plain, saving = losses_of(tmp_path / "plain"), losses_of(tmp_path / "saving")
    assert len(plain) == 12
    for (step, loss), (same, other) in zip(plain, saving, strict=True):
        # sums in another order; Adam makes a whole step of a gradient that is all rounding
        assert step == same and float(loss) == pytest.approx(float(other), abs=1e-4)


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ([], ["AppendingCSVLogger", "TolerantTensorBoardLogger"]),
        (["--trainer.logger=true"], ["AppendingCSVLogger", "TolerantTensorBoardLogger"]),
        (
            ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=x"],
            ["AppendingCSVLogger", "CSVLogger"],
        ),
        (["--trainer.logger=false"], []),
    ],
)
def test_the_csv_is_always_written(recipe, tmp_path, given, kinds):
    cli = build_cli(["--config", str(recipe), f"--run_dir={tmp_path}", *given])
    assert [type(logger).__name__ for logger in cli.trainer.loggers] == kinds
