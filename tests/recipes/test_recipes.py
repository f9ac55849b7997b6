"""Every recipe in configs/ parses, builds its full-size model, and trains a step when reduced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from datamodules.batch import ClipBatch
from lightning_modules.checkpoints.model_config import config_to_json
from lightning_modules.cli.main import main
from lightning_modules.models import DualEncoder, ModelConfig
from lightning_modules.training.recipe import RecipeCLI, build_cli

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    path
    for room in ("pretrain", "mir", "charades_ego")
    for path in (ROOT / "configs" / room).glob("*")
)
RERANKERS = [*sorted((ROOT / "configs" / "rerank").glob("*")), ROOT / "configs/demo/rerank.yaml"]
OVERLAYS = sorted((ROOT / "configs" / "temporal").glob("*"))
HERE = ["--trainer.accelerator=cpu", "--trainer.logger=false", "--trainer.precision=32"]
SMALL = ["--model.init_checkpoint=null", "--model.model.preset=eva02_at_tiny"]


def parse(*files: Path, words: list[str] | None = None) -> RecipeCLI:
    configs = [word for file in files for word in ("--config", str(file))]
    return build_cli([*configs, *HERE, *(words or [])])


def random_batch(num_frames: int, image_size: int) -> ClipBatch:
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3, num_frames, image_size, image_size)
    classes = torch.tensor([[0], [0], [1], [2]])
    return ClipBatch(
        video=torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8),
        tokens=torch.tensor([[49406, word, 49407] + [0] * 74 for word in (320, 518, 997, 1237)]),
        clip_index=torch.arange(4),
        text_index=torch.arange(4),
        sample_index=torch.arange(4),
        mask=torch.ones(4, dtype=torch.bool),
        verb_classes=classes,
        noun_classes=classes + 1,
        text_verb_classes=classes,
        text_noun_classes=classes + 1,
        keys=list("abcd"),
        negative_tokens=torch.tensor(
            [[[49406, word, 49407] + [0] * 74] for word in range(900, 904)]
        ),
    )


def test_the_recipes_are_found():
    assert len(RECIPES) >= 18 and len(OVERLAYS) == 5 and len(RERANKERS) == 2


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_the_full_size_model_of_a_recipe(recipe: Path):
    with torch.device("meta"):
        cli = parse(recipe)
    written = yaml.safe_load(recipe.read_text())
    settings = written["model"]["init_args"]
    config = cli.model.model.config
    assert config.embed_dim == 256
    assert config.vision.num_frames == settings["model"]["num_frames"]
    assert cli.datamodule.clip_options.num_frames == config.vision.num_frames
    assert cli.datamodule.clip_options.image_size == config.vision.image_size
    assert cli.datamodule.global_batch_size == written["data"]["init_args"]["global_batch_size"]
    millions = sum(p.numel() for p in cli.model.model.visual.parameters()) / 1e6
    # the towers of the paper: 86 M and 304 M, the projection to 256 and T*D positions aside
    assert millions == pytest.approx(304 if "large" in recipe.stem else 86, abs=0.6)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_step_of_a_recipe_at_reduced_size(recipe: Path):
    cli = parse(recipe, words=[*SMALL, "--data.image_size=64", "--model.model.num_frames=2"])
    module = cli.model
    module.log = lambda *args, **kwargs: None  # no Trainer is attached
    loss = module.training_step(random_batch(2, 64), 0)
    loss.backward()
    assert torch.isfinite(loss)
    gradients = {name: p.grad for name, p in module.model.named_parameters()}
    assert [name for name, g in gradients.items() if g is None or not g.isfinite().all()] == []
    moving = sum(bool(g.abs().sum() > 0) for g in gradients.values())
    assert moving > len(gradients) * 0.9  # all but the temperature of fixed-temperature losses


def tiny_dual(path: Path) -> None:
    model = DualEncoder(ModelConfig("eva02_at_tiny", embed_dim=16, num_frames=2).resolve())
    save_file(model.state_dict(), path)
    path.with_suffix(".json").write_text(config_to_json(model.config))


@pytest.mark.parametrize("recipe", RERANKERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_step_of_a_reranker_at_reduced_size(recipe: Path, tmp_path: Path):
    tiny_dual(tmp_path / "dual.safetensors")
    small = ["--model.model.preset=eva02_at_tiny", "--model.model.embed_dim=16"]
    small += ["--model.model.num_frames=2", "--data.image_size=64"]
    small += [f"--model.dual_checkpoint={tmp_path / 'dual.safetensors'}"]
    module = parse(recipe, words=[*small, "--model.reranker.width=32"]).model
    module.log = lambda *args, **kwargs: None
    module.setup("fit")
    module.training_step(random_batch(2, 64), 0).backward()
    gradients = {name: p.grad for name, p in module.model.named_parameters()}
    assert [name for name, g in gradients.items() if g is None or not g.isfinite().all()] == []
    assert all(g.abs().sum() > 0 for g in gradients.values())
    assert not any(p.requires_grad for p in module.dual.parameters())


def test_a_dual_encoder_of_another_shape_is_named(tmp_path: Path):
    tiny_dual(tmp_path / "dual.safetensors")
    recipe, given = RERANKERS[0], f"--model.dual_checkpoint={tmp_path / 'dual.safetensors'}"
    module = parse(recipe, words=["--model.model.preset=eva02_at_tiny", given]).model
    with pytest.raises(ValueError, match=r"recipe's model has vision.num_frames \d+, and the dual"):
        module.setup("fit")


def test_false_captions_in_micro_batches_and_without():
    recipe = ROOT / "configs" / "pretrain" / "eva02_at_base_egoclip_egonce_plus_plus.yaml"
    batch = random_batch(2, 64)
    batch.negative_tokens[3] = 0  # this caption has none
    found = []
    for micro in ("null", "3"):
        words = [*SMALL, "--data.image_size=64", "--model.model.num_frames=2"]
        module = parse(recipe, words=[*words, f"--model.micro_batch={micro}"]).model
        logged = {}
        module.log = lambda name, value, logged=logged, **_: logged.update({name: float(value)})
        loss = module.training_step(batch, 0)
        loss.backward()
        assert logged["train/negatives"] == 0.75
        found.append((loss.detach(), module.model.text.head.weight.grad))
    # fp32: the same sums, embedded three and one at a time
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    batch.negative_tokens = None
    with pytest.raises(ValueError, match=r"set data.hard_negatives"):
        module.training_step(batch, 0)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_temporal_overlays_reach_the_model(overlay: Path):
    base = ROOT / "configs" / "pretrain" / "eva02_at_base_egoclip.yaml"
    with torch.device("meta"):
        cli = parse(base, overlay)
    assert cli.model.model.config.vision.temporal == overlay.stem


def test_a_later_override_reaches_every_interpolation():
    recipe = ROOT / "configs" / "mir" / "eva02_at_base_sms.yaml"
    with torch.device("meta"):
        cli = parse(recipe, words=["--data_dir=/elsewhere", "--model.model.num_frames=8"])
    assert cli.datamodule.train_split.manifest == "/elsewhere/ek100_mir_train/manifest.json"
    assert cli.datamodule.clip_options.num_frames == 8


@pytest.mark.parametrize(
    ("word", "named"),
    [
        ("--trainer.max_epoch=3", "trainer.max_epochs"),
        ("--model.optimizer.lrr=3", "optimizer.lr"),
        ("--data.num_frame=3", "num_frames"),
        ("--model.loss.marg=3", "marg"),
        ("--model.model.num_frames=four", "four"),
        ("--run_dirr=x", "run_dir"),
    ],
)
def test_a_mistyped_key_is_named_with_the_nearest(word: str, named: str):
    with pytest.raises(ValueError) as error:
        parse(ROOT / "configs" / "mir" / "eva02_at_base_sms.yaml", words=[word])
    assert named in str(error.value)
    assert len(str(error.value)) < 400  # the cause, not the whole usage


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--model.model.preset=eva02", "unknown preset 'eva02'; one of: "),
        ("--model.micro_batch=0", "micro_batch is 0; "),
    ],
)
def test_a_value_that_a_class_refuses_is_one_line(word: str, told: str):
    with pytest.raises(ValueError) as error:
        parse(ROOT / "configs" / "mir" / "eva02_at_base_sms.yaml", words=[word])
    assert str(error.value).startswith(told) and "\n" not in str(error.value)


def test_what_a_reranker_lacks_is_named(tmp_path: Path, capsys: pytest.CaptureFixture):
    words = ["--config=rerank/eva02_at_base_sms", "--trainer.accelerator=cpu"]
    assert main(["fit", *words, f"--run_dir={tmp_path}", "--trainer.precision=32"]) == 2
    assert "no dual encoder at runs/eva02_at_base_sms/checkpoints" in capsys.readouterr().err
    assert main(["plan", "--config=rerank/eva02_at_base_sms"]) == 2
    assert "this recipe trains a re-ranker" in capsys.readouterr().err
