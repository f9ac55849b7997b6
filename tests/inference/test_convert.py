"""`eva02-at convert`: every format in, a file that rebuilds the same model out."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import published_layouts as published
import pytest
import torch
from published_layouts import EVA, VIT, example, random_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_modules.checkpoints import load_clip_checkpoint
from lightning_modules.checkpoints.conversion import load_model, save_model
from lightning_modules.checkpoints.model_config import (
    config_to_json,
    guess_config,
    read_config,
    with_settings,
)
from lightning_modules.checkpoints.source import complete_checkpoints, find_checkpoint
from lightning_modules.cli.main import main
from lightning_modules.inference.embedding import Embedder, EmbedOptions
from lightning_modules.models import PRESETS, DualEncoder, DualEncoderConfig
from lightning_modules.training.run.checkpoint_store import (
    STATE,
    CheckpointFolder,
    Manifest,
    checkpoint_name,
    file_record,
)


def describe(config: DualEncoderConfig, folder: Path) -> Path:
    path = folder / "described.json"
    path.write_text(config_to_json(config))
    return path


def features(model: DualEncoder) -> tuple[torch.Tensor, torch.Tensor]:
    video, tokens = example()
    with torch.inference_mode():
        return model.encode_video(video), model.encode_text(tokens)


def assert_same_features(a: DualEncoder, b: DualEncoder) -> None:
    for one, other in zip(features(a), features(b), strict=True):
        assert torch.equal(one, other)


def without_time(model: DualEncoder) -> DualEncoder:
    torch.nn.init.zeros_(model.visual.temporal_embed)
    return model


@pytest.mark.parametrize(
    ("layout", "config", "has_time"),
    [
        (published.baai, EVA, False),
        (published.open_clip, EVA, False),
        (published.openai, VIT, False),
        (published.avion, VIT, True),
    ],
    ids=["baai", "open_clip", "openai", "avion"],
)
def test_published_formats_round_trip(tmp_path: Path, layout, config, has_time: bool) -> None:
    model = random_model(config)
    torch.save(layout(model), tmp_path / "published.pt")
    output = tmp_path / "out" / "model.safetensors"
    words = ["--input", str(tmp_path / "published.pt"), "--output", str(output)]
    words += ["--config", str(describe(config, tmp_path))]
    assert main(["convert", *words]) == 0
    expected = model if has_time else without_time(model)
    assert_same_features(load_model(output).model, expected)
    again = random_model(config, seed=2)
    report = load_clip_checkpoint(output, again)
    assert report.missing == [] and report.ignored == []
    assert_same_features(again, expected)


def test_lavila_is_refused_then_read_without_its_attention_over_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = random_model(VIT)
    torch.save(published.lavila(model), tmp_path / "lavila.pth")
    words = ["--input", str(tmp_path / "lavila.pth"), "--output", str(tmp_path / "m.safetensors")]
    words += ["--config", str(describe(VIT, tmp_path))]
    assert main(["convert", *words]) == 2
    assert "divided attention" in capsys.readouterr().err
    assert main(["convert", *words, "--drop-time-attention"]) == 0
    assert_same_features(load_model(tmp_path / "m.safetensors").model, model)


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("where", ["beside", "within"])
def test_a_pickle_with_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    monkeypatch.chdir(tmp_path)
    state = random_model(EVA).state_dict()
    content = {"state_dict": state, "x": _Evil()} if where == "beside" else {**state, "x": _Evil()}
    torch.save(content, "evil.pt")
    assert main(["convert", "--input", "evil.pt", "--output", "out.safetensors"]) == 2
    error = capsys.readouterr().err
    assert "evil.pt" in error and "run any code" in error and "Traceback" not in error
    assert not Path("evil").exists() and not Path("out.safetensors").exists()


def lightning_content(model: DualEncoder) -> dict:
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    # what else a LightningModule may carry: names that would be mistaken for a tower's
    state |= {"loss.weight": torch.ones(3), "head.weight": torch.ones(5, 12)}
    return {"pytorch-lightning_version": "2.6.6", "global_step": 7, "state_dict": state}


def write_run(run: Path, models: dict[int, DualEncoder], config: str) -> CheckpointFolder:
    """A run as training leaves it: its recipe, and a complete checkpoint for each step."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(config)
    folder = CheckpointFolder(run / "checkpoints")
    for step, model in models.items():
        name = checkpoint_name(step)
        temporary = folder.begin(name)
        torch.save(lightning_content(model), temporary / STATE)
        average = {f"model.{k}": v + 1 for k, v in model.state_dict().items()}
        save_file(average, temporary / "ema.safetensors")
        files = [file_record(temporary, temporary / f) for f in (STATE, "ema.safetensors")]
        folder.commit(name, Manifest(step, 0, 1, "plain", files=files))
    return folder


TINY_RECIPE = """
tower: eva02_at_tiny
model:
  class_path: lightning_modules.pretrain.PretrainModule
  init_args:
    model: {preset: "${tower}", embed_dim: 24, num_frames: 3, temporal: split}
"""


@pytest.fixture(scope="module")
def tiny() -> DualEncoder:
    return random_model(
        with_settings(
            PRESETS["eva02_at_tiny"],
            ["vision.num_frames=3", "embed_dim=24", "vision.temporal=split"],
        )
    )


def test_a_run_says_itself_which_model_it_is(tmp_path: Path, tiny: DualEncoder) -> None:
    write_run(tmp_path / "run", {5: tiny}, TINY_RECIPE)
    for path in ("run", "run/checkpoints", "run/checkpoints/step-00000005"):
        loaded = load_model(tmp_path / path)
        assert loaded.config.vision.temporal == "split" and loaded.config.embed_dim == 24
        assert loaded.assumed == [] and loaded.source.step == 5
        assert loaded.report.ignored == []
        torch.testing.assert_close(loaded.model.state_dict(), tiny.state_dict(), rtol=0, atol=0)
    average = load_model(tmp_path / "run", average=True).model.state_dict()
    assert torch.equal(average["text.head.weight"], tiny.state_dict()["text.head.weight"] + 1)


def test_a_converted_model_says_where_it_came_from(tmp_path: Path, tiny: DualEncoder) -> None:
    write_run(tmp_path / "run", {5: tiny}, TINY_RECIPE)
    loaded = load_model(tmp_path / "run")
    description = save_model(loaded, tmp_path / "out.safetensors")
    assert description == tmp_path / "out.json" and description.read_text().endswith("}\n")
    content = json.loads(description.read_text())
    about = {key: content[key] for key in content if key not in ("format", "model")}
    assert about == {"source": "step-00000005", "step": 5, "assumed": []}
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(tiny.state_dict())
    with pytest.raises(ValueError, match=r"output .*out\.pt must end in \.safetensors$"):
        save_model(loaded, tmp_path / "out.pt")


def test_lightning_file_beside_its_recipe(tmp_path: Path, tiny: DualEncoder) -> None:
    (tmp_path / "config.yaml").write_text(TINY_RECIPE)
    (tmp_path / "logs").mkdir()
    torch.save(lightning_content(tiny), tmp_path / "logs" / "last.ckpt")
    loaded = load_model(tmp_path / "logs" / "last.ckpt")
    torch.testing.assert_close(loaded.model.state_dict(), tiny.state_dict(), rtol=0, atol=0)


def test_damaged_and_unfinished_checkpoints_are_passed_over_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = random_model(EVA)
    folder = write_run(tmp_path / "run", dict.fromkeys((1, 2, 3), model), TINY_RECIPE)
    (folder.root / "step-00000003" / STATE).write_bytes(b"cut")
    (folder.root / "step-00000004").mkdir()
    assert find_checkpoint(tmp_path / "run").step == 2
    assert "step-00000003" in caplog.text
    complete, damaged = complete_checkpoints(tmp_path / "run")
    assert [source.step for source in complete] == [1, 2]
    assert sorted(Path(name).name for name in damaged) == ["step-00000003", "step-00000004"]
    state = folder.root / "step-00000002" / STATE
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)
    with pytest.raises(ValueError, match=r"step-00000002: the contents of state have changed"):
        find_checkpoint(tmp_path / "run").read()


def test_hash_follows_the_weights(tmp_path: Path) -> None:
    models = {1: random_model(EVA, seed=1), 2: random_model(EVA, seed=2)}
    write_run(tmp_path / "a", models, TINY_RECIPE)
    write_run(tmp_path / "b", models, TINY_RECIPE)
    hashes = [[s.content_hash() for s in complete_checkpoints(tmp_path / r)[0]] for r in "ab"]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == 2


def test_frames_resolution_and_shared_dimension_come_from_the_file() -> None:
    config = with_settings(
        PRESETS["eva02_at_tiny"],
        ["vision.num_frames=6", "vision.image_size=96", "embed_dim=7", "text.context_length=9"],
    )
    with torch.device("meta"):
        model = DualEncoder(config)
    assert guess_config(model.state_dict())[0] == config
    with pytest.raises(ValueError, match=r"no preset has its size.*width 32.*--config"):
        guess_config(random_model(EVA).state_dict())
    visual = {k: v for k, v in model.state_dict().items() if k.startswith("visual")}
    with pytest.raises(ValueError, match=r"lacks text\.token_embedding"):
        guess_config(visual)


def test_nothing_stays_random(tmp_path: Path) -> None:
    state = {k: v for k, v in random_model(EVA).state_dict().items() if k.startswith("visual")}
    torch.save(state, tmp_path / "tower.pt")
    with pytest.raises(ValueError, match=r"tower\.pt lacks text\..*stay random.*init_checkpoint"):
        load_model(tmp_path / "tower.pt", config=describe(EVA, tmp_path))
    torch.save(random_model(EVA).state_dict(), tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"lacks visual\.head.*stay random"):
        load_model(tmp_path / "whole.pt", config=describe(EVA, tmp_path), settings=["embed_dim=5"])


def test_settings_and_descriptions_are_typed(tmp_path: Path) -> None:
    changed = with_settings(EVA, ["vision.temporal=rotary", "vision.reference_frames=4"])
    assert changed.vision.temporal == "rotary" and changed.vision.reference_frames == 4
    for setting, message in [
        ("vision.temporl=rotary", "did you mean 'temporal'"),
        ("vision.temporal=sideways", "one of: none, learnable"),
        ("vision.depth=two", "no number"),
        ("vision", "FIELD=VALUE"),
        ("vision.depth.x=2", "unknown field"),
        ("vision.qqqq=2", r"unknown field 'qqqq' Fields lie under"),  # nothing near to suggest
    ]:
        with pytest.raises(ValueError, match=message):
            with_settings(EVA, [setting])
    path = describe(EVA, tmp_path)
    assert read_config(path) == EVA
    content = json.loads(path.read_text())
    content["model"]["vision"]["widht"] = 3
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"unknown field 'widht'; did you mean 'width'"):
        read_config(path)
    path.write_text("[1")
    with pytest.raises(ValueError, match="no model description"):
        read_config(path)


@pytest.mark.parametrize(
    ("temporal", "trained", "settings", "more", "told"),
    [
        ("both", 4, ["vision.num_frames=8"], None, "of 4 frames gets 8 at frame indices"),
        ("rotary", 4, [], 6, "of 4 frames gets 6 at frame indices"),  # features --frames
        ("split", 4, ["vision.num_frames=2"], None, "of 4 frames gets 2"),
        ("both", 4, [], 4, None),
        ("both", 4, ["vision.num_frames=8", "vision.reference_frames=4"], None, None),
        ("learnable", 4, ["vision.num_frames=8"], None, None),  # P_t is resampled
        ("both", 1, ["vision.num_frames=8"], None, None),  # an image model
    ],
)
def test_frame_indices_beyond_the_training_are_told(
    tmp_path: Path, caplog, temporal, trained, settings, more, told
) -> None:
    vision = dataclasses.replace(
        EVA.vision, temporal=temporal, num_frames=trained, width=64, num_heads=4
    )
    config = dataclasses.replace(EVA, vision=vision)
    torch.save(DualEncoder(config).state_dict(), tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt", config=describe(config, tmp_path), settings=settings)
    Embedder(loaded, EmbedOptions(num_frames=more))
    found = [record.getMessage() for record in caplog.records if "frames" in record.getMessage()]
    assert [told in message for message in found] == ([True] if told else [])


def test_training_knobs_do_not_reach_the_inference_file(tmp_path: Path) -> None:
    vision = dataclasses.replace(EVA.vision, patch_dropout=0.5, drop_path=0.2)
    config = dataclasses.replace(EVA, vision=vision, activation_checkpointing=True)
    torch.save(random_model(EVA).state_dict(), tmp_path / "m.pt")
    loaded = load_model(tmp_path / "m.pt", config=describe(config, tmp_path))
    save_model(loaded, tmp_path / "m.safetensors")
    assert read_config(tmp_path / "m.json") == EVA
    assert not load_model(tmp_path / "m.safetensors").model.training
    assert load_file(tmp_path / "m.safetensors").keys() == loaded.model.state_dict().keys()


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "step-00000003").mkdir()
    torch.save(random_model(EVA).state_dict(), tmp_path / "m.pt")
    described = ["--config", str(describe(EVA, tmp_path))]
    for words, message in [
        (["--input", str(tmp_path / "absent.pt")], "no such file or folder"),
        (["--input", str(tmp_path / "empty")], "is no checkpoint"),
        (["--input", str(tmp_path / "step-00000003")], "never completed"),
        (["--input", str(tmp_path / "m.pt"), "--average", *described], "no moving average"),
        (["--input", "x", "--inptu", "x"], "unrecognized arguments: --inptu"),
        ([], "--input"),
    ]:
        output = ["--output", str(tmp_path / "out.safetensors")]
        assert main(["convert", *words, *output]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
    words = ["--input", str(tmp_path / "m.pt"), "--output", str(tmp_path / "out.pt"), *described]
    assert main(["convert", *words]) == 2
    assert "must end in .safetensors" in capsys.readouterr().err


@pytest.fixture
def two_models(tmp_path: Path) -> list[Path]:
    paths = []
    for seed in (0, 1):
        model = random_model(EVA, seed=seed)
        path = tmp_path / f"{seed}.safetensors"
        save_file(model.state_dict(), path)
        path.with_suffix(".json").write_text(config_to_json(EVA))
        paths.append(path)
    return paths


def interpolated(output: Path, *words: str | Path) -> dict[str, torch.Tensor]:
    assert main(["convert", "--output", str(output), "--interpolate", *map(str, words)]) == 0
    return load_file(output)


@pytest.mark.parametrize("weights", [[], ["0.3", "0.7"], ["1", "3"], ["1e-3", "0.7"]])
def test_a_model_with_itself_is_itself_to_the_bit(tmp_path, two_models, weights):
    words = ["--weights", *weights] if weights else []
    mean = interpolated(tmp_path / "mean.safetensors", two_models[0], two_models[0], *words)
    expected = load_file(two_models[0])
    assert mean.keys() == expected.keys()
    assert all(torch.equal(mean[name], expected[name]) for name in mean)


@pytest.mark.parametrize(
    ("weights", "share"), [([], 0.5), (["0.3", "0.7"], 0.7), (["3", "1"], 0.25), (["0", "2"], 1.0)]
)
def test_between_two_models_lies_the_arithmetic_mean(tmp_path, two_models, weights, share):
    words = ["--weights", *weights] if weights else []
    mean = interpolated(tmp_path / "mean.safetensors", *two_models, *words)
    one, two = map(load_file, two_models)
    assert not torch.equal(one["visual.pos_embed"], two["visual.pos_embed"])
    for name, tensor in mean.items():
        exact = (1 - share) * one[name].double() + share * two[name].double()
        # one rounding to fp32, and fp64's own in another order
        torch.testing.assert_close(tensor.double(), exact, rtol=2**-23, atol=1e-14)
    told = json.loads((tmp_path / "mean.json").read_text())["parts"]
    assert [part["weight"] for part in told] == pytest.approx([1 - share, share])
    assert [part["source"] for part in told] == [str(path) for path in two_models]
    load_model(tmp_path / "mean.safetensors")


def test_models_that_differ_are_refused_by_name(tmp_path, two_models, capsys):
    other = dataclasses.replace(EVA, vision=dataclasses.replace(EVA.vision, num_frames=3))
    save_file(random_model(other).state_dict(), tmp_path / "other.safetensors")
    (tmp_path / "other.json").write_text(config_to_json(other))
    output = ["--output", str(tmp_path / "o.safetensors")]
    paths = [str(two_models[0]), str(tmp_path / "other.safetensors")]
    assert main(["convert", *output, "--interpolate", *paths]) == 2
    told = capsys.readouterr().err
    assert f"vision.num_frames {EVA.vision.num_frames} and 3" in told
    assert not (tmp_path / "o.safetensors").exists()
    assert main(["convert", *output, "--interpolate", *paths, "--set=vision.num_frames=3"]) == 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--interpolate", "0"], "two checkpoints at least"),
        (["--interpolate", "0", "1", "--weights", "1"], "2 checkpoints and 1 weights given"),
        (["--interpolate", "0", "1", "--weights", "0", "0"], "not all of them 0"),
        (["--interpolate", "0", "1", "--weights", "nan", "1"], "none may be negative"),
        (["--input", "0", "--weights", "1"], "--weights goes with --interpolate"),
        (["--average", "0", "1"], "--input --interpolate"),
    ],
)
def test_what_cannot_be_interpolated_is_refused(tmp_path, two_models, capsys, words, told):
    known = {"0": str(two_models[0]), "1": str(two_models[1])}
    split = words.index("--weights") if "--weights" in words else len(words)
    words = [known.get(word, word) for word in words[:split]] + words[split:]
    assert main(["convert", "--output", str(tmp_path / "o.safetensors"), *words]) == 2
    assert told in capsys.readouterr().err
