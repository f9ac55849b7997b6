"""A run's folder belongs to its training: what the other verbs, trials and changed recipes do."""

import csv
import json
import shutil

import pytest
import yaml

SLOW = pytest.mark.slow
CONSTANT = ["--model.optimizer.schedule=constant", "--model.optimizer.warmup_epochs=0"]


@pytest.fixture(scope="module")
def command(zygote, recipe):
    """Run a verb of the small recipe in a process of its own: (exit code, what it said)."""

    def run(verb, folder, *words, world=1, recipe=recipe):
        log = folder.parent / f"{folder.name}.txt"
        log.unlink(missing_ok=True)
        argv = [verb, "--config", str(recipe), f"--run_dir={folder}", *words]
        done = zygote.start(
            log, world=world, argv=[*argv, f"--trainer.devices={world}", "--data.num_workers=0"]
        )
        codes = done.wait()
        assert len(set(codes)) == 1, done.text()
        return codes[0], done.text()

    return run


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """A run of one epoch at a constant rate, and another untouched one of three."""
    short, whole = (tmp_path_factory.mktemp("finished") / name for name in ("short", "whole"))
    for folder, epochs in ((short, 1), (whole, 3)):
        code, told = command("fit", folder, *CONSTANT, f"--trainer.max_epochs={epochs}")
        assert code == 0, told
    return short, whole


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "run")


def logged(folder, name="train/loss"):
    with (folder / "logs" / "metrics.csv").open() as file:
        return [(int(row["step"]), row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.parametrize(
    "more",
    [
        ["--trainer.max_steps=6"],
        pytest.param(["--trainer.max_epochs=3", "--trainer.max_steps=12"], marks=SLOW),
        pytest.param(["--trainer.max_steps=12", "--trainer.max_epochs=-1"], marks=SLOW),
    ],
    ids=" ".join,
)
def test_a_finished_run_is_extended_twice(command, finished, tmp_path, more):
    folder = copy_of(finished[0], tmp_path)
    for words in (more, ["--trainer.max_epochs=3"]):
        code, told = command("fit", folder, *CONSTANT, *words)
        assert code == 0, told
    assert logged(folder) == logged(finished[1])
    assert logged(folder, "val/map_avg") == logged(finished[1], "val/map_avg")


def test_an_evaluation_scores_the_newest_weights_and_leaves_the_run_as_it_is(
    command, finished, tmp_path
):
    """Also with another seed and batch, and without the training data."""
    folder = copy_of(finished[0], tmp_path)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    other = ["--data.seed=9", "--data.global_batch_size=4", "--data.train=[gone/manifest.json]"]
    for words in ([], [f"--ckpt_path={folder}/checkpoints"], other):
        code, told = command("test", folder, *words, "--model.optimizer.lr=9")
        assert code == 0, told
        assert "step-00000004" in told
    assert {p: p.read_bytes() for p in before} == before
    new = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p not in before}
    assert new == {"test.json", "test.yaml"}
    result = json.loads((folder / "test.json").read_text())
    manifest = json.loads((folder / "checkpoints/step-00000004/manifest.json").read_text())
    assert result["test/map_avg"] == pytest.approx(manifest["metrics"]["val/map_avg"])
    assert result["weights"]["step"] == 4 and len(result["weights"]["sha256"]) == 64
    assert result["protocol"]["num_frames"] == 2


def test_results_are_not_overwritten_by_other_weights(command, finished, tmp_path):
    short = copy_of(finished[0], tmp_path)
    assert command("test", short)[0] == 0
    held = (short / "test.json").read_text()
    code, told = command("test", short, f"--ckpt_path={finished[1]}/checkpoints")
    assert code == 0, told
    assert (short / "test.json").read_text() == held
    (other,) = short.glob("test-step-00000012-*.json")
    assert json.loads(other.read_text())["weights"]["step"] == 12
    assert command("test", short)[0] == 0  # the same again
    assert len(list(short.glob("test*.json"))) == 2


def test_where_nothing_was_trained_there_is_nothing_to_evaluate(command, finished, tmp_path):
    code, told = command("test", tmp_path / "empty")
    assert code == 2
    assert "nothing to evaluate" in told and "Traceback" not in told
    code, told = command(
        "test", tmp_path / "start", f"--model.init_checkpoint={finished[0]}/checkpoints"
    )
    assert code == 0, told
    assert json.loads((tmp_path / "start" / "test.json").read_text())["weights"]["step"] == 4


def test_weights_of_another_model_are_refused_in_one_line(command, finished, tmp_path):
    code, told = command(
        "test", tmp_path / "run", f"--ckpt_path={finished[0]}", "--model.model.embed_dim=16"
    )
    assert code == 2 and "another model" in told and "Traceback" not in told
    assert not (tmp_path / "run").exists()


def test_each_checkpoint_has_the_recipe_that_it_was_trained_with(command, finished, tmp_path):
    from lightning_modules.checkpoints.source import find_checkpoint

    folder = copy_of(finished[0], tmp_path)
    kept = folder / "checkpoints" / "step-00000004" / "config.yaml"
    assert kept.read_text() == (finished[0] / "config.yaml").read_text()
    (folder / "config.yaml").write_text("model: {}\n")
    assert find_checkpoint(folder).config == kept
    code, told = command("fit", folder, *CONSTANT, "--model.optimizer.lr=1e-9")
    assert code == 2 and "lr 0.001 -> 1e-09" in told, told
    assert (folder / "config.yaml").read_text() == "model: {}\n"  # a fit that trains nothing


@pytest.mark.parametrize(
    "words",
    [["--trainer.fast_dev_run=2"], pytest.param(["--trainer.overfit_batches=1"], marks=SLOW)],
)
def test_a_trial_leaves_nothing(command, finished, tmp_path, words):
    folder = tmp_path / "new"
    code, told = command("fit", folder, *words)  # with the cosine and its warm-up
    assert code == 0, told
    assert not [p for p in folder.rglob("*") if p.is_file()]
    used = copy_of(finished[0], tmp_path)
    before = {p: p.read_bytes() for p in used.rglob("*") if p.is_file()}
    assert command("fit", used, *words)[0] == 0
    assert {p: p.read_bytes() for p in used.rglob("*") if p.is_file()} == before


CHANGES = {
    "lr": (["--model.optimizer.lr=5.0e-4"], "lr 0.001 -> 0.0005"),
    "weight decay": (["--model.optimizer.weight_decay=0.2"], "weight_decay 0.0/0.01 -> 0.0/0.2"),
    "betas": (["--model.optimizer.betas=[0.8,0.9]"], "betas (0.9, 0.999) -> (0.8, 0.9)"),
    "schedule": (["--model.optimizer.schedule=cosine"], "schedule constant -> cosine"),
    "epoch": (["--trainer.limit_train_batches=2"], "steps_per_epoch 4 -> 2"),
    "optimizer": (["--model.optimizer.name=lamb"], "optimizer AdamW -> Lamb"),
    "muon": (["--model.optimizer.name=muon"], "optimizer AdamW -> Muon"),
}


@pytest.mark.parametrize(
    "change", [name if name == "lr" else pytest.param(name, marks=SLOW) for name in CHANGES]
)
def test_a_changed_setting_is_named_and_refused(command, finished, tmp_path, change):
    folder = copy_of(finished[0], tmp_path)
    words, named = CHANGES[change]
    code, told = command("fit", folder, *CONSTANT, "--trainer.max_epochs=2", *words)
    assert code == 2
    assert named in told and "Traceback" not in told
    assert len(logged(folder)) == 4


def speeds(folder):
    return [float(value) for _, value in logged(folder, "speed/lr")]


@pytest.mark.distributed
@pytest.mark.parametrize(
    "strategy", ["plain", pytest.param("zero2", marks=SLOW), pytest.param("zero3", marks=SLOW)]
)
def test_a_changed_setting_is_kept_or_applied(command, tmp_path, strategy):
    extra = [] if strategy == "plain" else [f"--config=configs/strategy/{strategy}.yaml"]
    extra += [*CONSTANT, "--trainer.precision=32-true"]
    first = tmp_path / "first"
    assert command("fit", first, *extra, "--trainer.max_epochs=1")[0] == 0
    change = ["--model.optimizer.lr=5.0e-4", "--model.optimizer.weight_decay=0.2"]
    for option, rate, decay in (("keep", 1e-3, 0.01), ("apply", 5e-4, 0.2)):
        folder = shutil.copytree(first, tmp_path / option)
        words = [*extra, *change, "--trainer.max_epochs=2", f"--settings.on_change={option}"]
        code, told = command("fit", folder, *words)
        assert code == 0, told
        assert "lr 0.001 -> 0.0005" in told
        assert speeds(folder) == pytest.approx([1e-3] * 4 + [rate] * 4, rel=1e-6)  # an fp32 log
        kept = folder / "checkpoints" / "step-00000008" / "config.yaml"
        for config in (folder / "config.yaml", kept):  # says what was done
            optimizer = yaml.safe_load(config.read_text())["model"]["init_args"]["optimizer"]
            assert (optimizer["lr"], optimizer["weight_decay"]) == (rate, decay)
    assert logged(tmp_path / "keep")[4:] != logged(tmp_path / "apply")[4:]


def test_a_finished_cosine_that_is_extended_says_what_its_rate_becomes(command, tmp_path):
    first = tmp_path / "first"
    assert command("fit", first, "--trainer.max_epochs=1")[0] == 0
    for option, code_due in (("extend", 0), ("keep", 0), ("refuse", 2)):
        folder = shutil.copytree(first, tmp_path / option)
        words = ["--trainer.max_epochs=2", f"--settings.on_change={option}"]
        code, told = command("fit", folder, *words)
        assert code == code_due, told
        assert "total_steps 4 -> 8" in told
    assert speeds(tmp_path / "keep")[4:] == [0.0] * 4
    assert "learning rate of the next step: 0 -> 0.0007" in (tmp_path / "extend.txt").read_text()
    assert speeds(tmp_path / "extend")[4] == pytest.approx(0.00075, rel=0.1)


def test_the_rate_that_is_logged_is_the_steps_own(command, tmp_path):
    """Also where gradients accumulate: the rates of the same steps without."""
    plain, halves = tmp_path / "plain", tmp_path / "halves"
    assert command("fit", plain, "--trainer.log_every_n_steps=2")[0] == 0
    words = ["--trainer.log_every_n_steps=2", "--trainer.accumulate_grad_batches=2"]
    code, told = command("fit", halves, *words)
    assert code == 0, told
    rates = logged(plain, "speed/lr")
    assert [step for step, _ in rates] == [1, 3, 5, 7, 9, 11]
    assert float(rates[0][1]) == pytest.approx(0.5e-3)  # the second of two steps of warm-up
    assert logged(halves, "speed/lr") == rates


def test_an_unknown_monitor_is_named_after_the_first_validation(command, tmp_path):
    words = ["--checkpoints.monitor=val/map_agv", "--trainer.max_epochs=1"]
    code, told = command("fit", tmp_path / "run", *words)
    assert code == 0, told
    assert "checkpoints.monitor is 'val/map_agv', which this run does not log" in told
    assert "val/map_avg" in told
