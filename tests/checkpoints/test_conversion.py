"""What is loaded as which model, what lies between two, and in which words the rest is refused."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lightning_modules.checkpoints.conversion import (
    LoadedClassifier,
    LoadedModel,
    _check_nothing_is_random,
    load_model,
    load_trained,
    save_model,
)
from lightning_modules.checkpoints.interpolation import interpolate
from lightning_modules.checkpoints.loading import LoadReport
from lightning_modules.checkpoints.model_config import (
    config_to_json,
    describes_classifier,
    describes_reranker,
    for_inference,
    has_model_section,
    is_description,
    read_config,
)
from lightning_modules.checkpoints.source import CheckpointSource
from lightning_modules.models import (
    PRESETS,
    DualEncoder,
    DualEncoderConfig,
    ModelConfig,
    TextConfig,
    VideoClassifier,
    VisionConfig,
)

CONFIG = DualEncoderConfig(
    VisionConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2, mlp_hidden=40),
    TextConfig(width=16, depth=2, num_heads=2, vocab_size=50, context_length=8),
    embed_dim=12,
)


def filled(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def refusal(call, *arguments: object, **more: object) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments, **more)
    return str(caught.value)


def write(folder: Path, state: dict, config: DualEncoderConfig = CONFIG, **about: object) -> Path:
    save_file(state, folder / "m.safetensors")
    (folder / "m.json").write_text(config_to_json(config, **about))
    return folder / "m.safetensors"


def test_a_classifier_is_loaded_written_and_loaded_again(tmp_path: Path) -> None:
    model = filled(VideoClassifier(CONFIG, 5))
    path = write(tmp_path, model.state_dict(), num_classes=5)
    for _ in range(2):
        loaded = load_trained(path)
        assert type(loaded) is LoadedClassifier and not loaded.model.training
        assert loaded.model.num_classes == 5 and loaded.config == CONFIG
        torch.testing.assert_close(loaded.model.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert refusal(load_model, path) == (
            f"checkpoint {path} names one of 5 classes and keeps no text tower: it has no "
            "embeddings. Its figures: `eva02-at evaluate --benchmark ek100_cls`."
        )
        path = tmp_path / "again.safetensors"
        save_model(loaded, path)
        assert json.loads(path.with_suffix(".json").read_text())["num_classes"] == 5
    state = {k: v for k, v in model.state_dict().items() if k != "visual.head.weight"}
    told = refusal(load_trained, write(tmp_path, state, num_classes=5))
    assert told == "the checkpoint of a classifier lacks its head (visual.head.weight)"


def test_a_run_of_recognition_is_a_classifier(tmp_path: Path) -> None:
    model = filled(VideoClassifier(PRESETS["eva02_at_tiny"], 3))
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"pytorch-lightning_version": "2", "state_dict": state}, tmp_path / "a.ckpt")
    write_recipe(tmp_path, "recognition.RecognitionModule", {"preset": "eva02_at_tiny"})
    loaded = load_trained(tmp_path / "a.ckpt")
    assert type(loaded) is LoadedClassifier and loaded.model.num_classes == 3


def write_recipe(folder: Path, module: str, model: object) -> Path:
    section = {"class_path": f"lightning_modules.{module}", "init_args": {"model": model}}
    (folder / "config.yaml").write_text(yaml.dump({"model": section}))
    return folder / "config.yaml"


def test_what_no_file_holds_is_known(tmp_path: Path) -> None:
    state = filled(DualEncoder(CONFIG)).state_dict()
    for name in ("visual.temporal_embed", "logit_scale"):
        del state[name]
    loaded = load_model(write(tmp_path, state))
    assert loaded.model.logit_scale.item() == pytest.approx(math.log(1 / 0.07))
    assert not loaded.model.visual.temporal_embed.any()
    assert sorted(loaded.report.missing) == ["logit_scale", "visual.temporal_embed"]


STARTS = (
    ", which would stay random. A file to start training from goes into a recipe as "
    "model.init_args.init_checkpoint."
)


def test_what_would_stay_random_is_named(tmp_path: Path) -> None:
    state = filled(DualEncoder(CONFIG)).state_dict()
    text = [name for name in state if name.startswith("text.")]
    kept = {name: tensor for name, tensor in state.items() if name not in text}
    path = write(tmp_path, kept)
    shown = ", ".join(text[:4])
    assert refusal(load_model, path) == (
        f"checkpoint {path} lacks {shown} and {len(text) - 4} more{STARTS}"
    )
    heads = ("text.head.weight", "visual.head.weight", "visual.head.bias")
    for count in (1, 2, 3):
        kept = {name: tensor for name, tensor in state.items() if name not in heads[:count]}
        told = refusal(load_model, write(tmp_path, kept))
        assert told.endswith(STARTS) and "more" not in told
        names = told.removeprefix(f"checkpoint {path} lacks ").removesuffix(STARTS).split(", ")
        assert sorted(names) == sorted(heads[:count])


def test_four_are_named_and_five_are_cut(tmp_path: Path) -> None:
    for names, shown in (("abcd", "a, b, c, d"), ("abcde", "a, b, c, d and 1 more")):
        report = LoadReport(missing=list(names[:2]), reinitialised=list(names[2:]))
        told = refusal(_check_nothing_is_random, report, tmp_path)
        assert told == f"checkpoint {tmp_path} lacks {shown}{STARTS}"


def test_refusals_name_the_file(tmp_path: Path) -> None:
    state = filled(DualEncoder(CONFIG)).state_dict()
    path = write(tmp_path, state)
    told = refusal(load_model, path, settings=["vision.depth=1"])
    assert told == (
        f"checkpoint {path}: its visual tower has blocks 0..1, the model's 0..0; build the preset "
        "this checkpoint belongs to"
    )
    (tmp_path / "m.json").unlink()
    told = refusal(load_model, path)
    assert told.startswith(f"checkpoint {path}: no preset has its size (architecture eva02, patch")
    assert told.endswith(
        "); name its configuration with --config (a run's config.yaml, or a JSON as `eva02-at "
        "convert` writes it)"
    )
    recipe = write_recipe(tmp_path, "rerank.RerankModule", {"preset": "eva02_at_tiny"})
    assert refusal(load_model, path) == (
        f"{path} is a re-ranker, which is no model by itself: give its dual encoder as the "
        "checkpoint, and this with `evaluate --rerank`"
    )
    recipe.unlink()
    divided = {"blocks.0.timeattn.qkv.weight": torch.ones(1), "blocks.0.norm3.bias": torch.ones(1)}
    path = write(tmp_path, state | {f"visual.{key}": value for key, value in divided.items()})
    first = next(key for key in load_file(path) if "timeattn" in key or "norm3" in key)
    assert refusal(load_model, path) == (
        f"checkpoint {path} is a TimeSformer with divided attention over time and space "
        f"({first}), which the encoders here cannot compute. --drop-time-attention reads its image "
        "and text weights as a point to start from; features differ from LaViLa's."
    )


def loaded_of(model: torch.nn.Module, name: str, config: DualEncoderConfig = CONFIG) -> LoadedModel:
    return LoadedModel(model, config, CheckpointSource(Path(name), Path(name)), LoadReport())


DIFFER = (
    "a and b are different models ({}): there is nothing between them. --set reads both with one "
    "value of a field where that is possible (--set vision.num_frames=16)"
)


def other(**vision: object) -> DualEncoderConfig:
    return replace(CONFIG, vision=replace(CONFIG.vision, **vision))


@pytest.mark.parametrize(
    ("one", "two", "config", "told"),
    [
        (VideoClassifier(CONFIG, 5), DualEncoder(CONFIG), CONFIG,
         "kind VideoClassifier and DualEncoder"),
        (VideoClassifier(CONFIG, 5), DualEncoder(CONFIG), other(num_frames=2),
         "kind VideoClassifier and DualEncoder, vision.num_frames 4 and 2"),
        (VideoClassifier(CONFIG, 5), VideoClassifier(CONFIG, 6), CONFIG,
         "visual.head.weight (5, 32) and (6, 32), visual.head.bias (5,) and (6,)"),
        (VideoClassifier(CONFIG, 5), DualEncoder(CONFIG),
         other(num_frames=2, image_size=24, width=48, depth=3, num_heads=3),
         "kind VideoClassifier and DualEncoder, vision.image_size 16 and 24, vision.width 32 and "
         "48, vision.depth 2 and 3"),
    ],
)  # fmt: skip
def test_different_models_have_nothing_between_them(one, two, config, told) -> None:
    parts = [loaded_of(one, "a"), loaded_of(two, "b", config)]
    assert refusal(interpolate, parts) == DIFFER.format(told)


def test_a_parameter_on_one_side_only_is_a_difference() -> None:
    one, two = DualEncoder(CONFIG), DualEncoder(CONFIG)
    two.extra = torch.nn.Parameter(torch.ones(3))
    for parts, told in (((one, two), "extra None and (3,)"), ((two, one), "extra (3,) and None")):
        both = [loaded_of(part, name) for part, name in zip(parts, "ab", strict=True)]
        assert refusal(interpolate, both) == DIFFER.format(told)


@pytest.mark.parametrize("weights", [[-1.0, 1.0], [math.inf, 1.0], [math.nan, 1.0], [0.0, 0.0]])
def test_weights_without_a_mean_are_refused(weights: list[float]) -> None:
    parts = [loaded_of(DualEncoder(CONFIG), name) for name in "ab"]
    told = f"weights {weights} given; none may be negative, and not all of them 0"
    assert refusal(interpolate, parts, weights) == told
    assert refusal(interpolate, parts, [1.0]) == (
        "2 checkpoints and 1 weights given; interpolation needs two checkpoints at least, and a "
        "weight for each"
    )


def test_the_mean_says_where_it_lies() -> None:
    parts = [loaded_of(filled(DualEncoder(CONFIG), seed), name) for seed, name in enumerate("ab")]
    mean = interpolate(parts, [1.0, 3.0])
    assert mean.parts == [
        {"source": "a", "step": None, "weight": 0.25},
        {"source": "b", "step": None, "weight": 0.75},
    ]


TOWERS = {"vision": {}, "text": {}}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("m.json", "[1", "{} is no model description (JSONDecodeError("),
        ("m.json", "3", "{} is no model description (it has no `vision` and `text`)"),
        ("m.json", {"vision": {}}, "{} is no model description (it has no `vision` and `text`)"),
        ("m.json", {**TOWERS, "x": 1}, "{}: unknown field 'x'"),
        ("m.json", {**TOWERS, "vision": {"widht": 1}},
         "{}: unknown field 'widht'; did you mean 'width'?"),
        ("m.json", {**TOWERS, "vision": 3},
         "{}: 3 given, where fields with values are expected"),
        ("m.json", {**TOWERS, "text": None},
         "{}: None given, where fields with values are expected"),
        ("m.json", {**TOWERS, "vision": {"width": 33}},
         "{}: width 33 is no multiple of num_heads 12"),
        ("c.yaml", "model: {init_args: {model: {widht: 3}}}", "{}: unknown field 'widht'"),
        ("c.yaml", "model: {init_args: {model: '${x}'}}", "recipe {} cannot be read: Interpol"),
        ("c.yaml", "model: [", "recipe {} cannot be read: while parsing"),
        *(("c.yaml", text, "{} has no section model.init_args.model; give a run's config.yaml, a "
           "recipe, or the JSON that `eva02-at convert` writes")
          for text in ("", "model: 3", *(f"model: {{init_args: {{model: {v}}}}}"
                                         for v in ("3", "[1]", "name", "null")))),
    ],
)  # fmt: skip
def test_what_describes_no_model_is_refused(tmp_path: Path, name, content, told) -> None:
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    whole = told.format(path)
    found = refusal(read_config, path)
    is_start = whole.endswith(("(", "Interpol", "parsing"))
    assert found.startswith(whole) if is_start else found == whole
    assert has_model_section(path) == ("model: {widht: 3}" in str(content))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (TOWERS, (True, False)),
        ({"model": TOWERS}, (True, False)),
        ({"model": TOWERS, "num_classes": 3}, (True, True)),
        ({"vision": {}, "num_classes": 3}, (False, True)),
        ({"model": {"num_classes": 3}}, (False, False)),
    ],
)
def test_kinds_of_descriptions(tmp_path: Path, content: dict, kind: tuple[bool, bool]) -> None:
    path = tmp_path / "m.json"
    path.write_text(json.dumps(content))
    assert (is_description(path), describes_classifier(path)) == kind
    assert not describes_reranker(path)
    assert not is_description(tmp_path / "absent.json")
    assert not describes_classifier(None) and not describes_reranker(None)


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        ("recognition.RecognitionModule", (True, False)),
        ("rerank.RerankModule", (False, True)),
        ("pretrain.PretrainModule", (False, False)),
    ],
)
def test_kinds_of_recipes(tmp_path: Path, module: str, kind: tuple[bool, bool]) -> None:
    path = write_recipe(tmp_path, module, {"preset": "eva02_at_tiny"})
    assert (describes_classifier(path), describes_reranker(path)) == kind
    assert has_model_section(path)
    assert read_config(path) == ModelConfig(preset="eva02_at_tiny").resolve()


def test_a_model_at_work_has_nothing_of_training() -> None:
    trained = replace(
        other(patch_dropout=0.5, drop_path=0.2),
        attention_backend="math",
        activation_checkpointing=True,
    )
    assert for_inference(trained) == CONFIG


def test_names_beside_the_parameters_of_a_model_change_its_hash() -> None:
    one, two = (loaded_of(filled(DualEncoder(CONFIG)), name) for name in "ab")
    assert one.model_hash() == two.model_hash() and re.fullmatch("[0-9a-f]{64}", one.model_hash())
    two.config = other(num_frames=2)
    assert one.model_hash() != two.model_hash()
    three = loaded_of(filled(DualEncoder(CONFIG), 1), "c")
    assert one.model_hash() != three.model_hash()
