"""Which re-rankers are read for a dual encoder, and in which words the others are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from small_world import tiny_model

from lightning_modules.checkpoints.model_config import read_rerank_config
from lightning_modules.checkpoints.rerank import (
    check_architecture,
    check_same_encoder,
    load_reranker,
)
from lightning_modules.models import PRESETS
from lightning_modules.models.rerank import RerankConfig, ReRanker, fingerprint

HEAD = {"width": 24, "depth": 2, "num_heads": 3, "window": 2, "dropout": 0.0}
NO_RERANKER = (
    " is no re-ranker: give a run of a recipe of configs/rerank, or one of its checkpoints"
)
ANOTHERS = (
    "the re-ranker was trained on the dual encoder 01020304..., and {where} is {own}...: other "
    "weights, whose patches and words it cannot read. Give the checkpoint that its recipe names as "
    "dual_checkpoint (that very step), or train a re-ranker on this one"
)


def write(folder: Path, reranker: ReRanker, head: dict) -> Path:
    state = {f"model.{name}": tensor for name, tensor in reranker.state_dict().items()}
    torch.save({"pytorch-lightning_version": "2", "state_dict": state}, folder / "state.ckpt")
    arguments = {"model": {"preset": "eva02_at_tiny", "num_frames": 2}, "reranker": head}
    section = {"class_path": "lightning_modules.rerank.RerankModule", "init_args": arguments}
    (folder / "config.yaml").write_text(yaml.dump({"model": section}))
    return folder / "state.ckpt"


def refusal(call, *arguments: object) -> str:
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    return str(caught.value)


def test_a_head_of_this_encoder_is_read_and_any_other_file_is_not(tmp_path: Path) -> None:
    dual = tiny_model()
    made = ReRanker(RerankConfig(**HEAD), dual.config)
    made.fingerprint.copy_(fingerprint(dual))
    path = write(tmp_path, made, HEAD)
    found = load_reranker(path, dual)
    assert not found.training
    torch.testing.assert_close(found.state_dict(), made.state_dict(), rtol=0, atol=0)

    made.fingerprint[:4] = torch.tensor([1, 2, 3, 4])
    write(tmp_path, made, HEAD)
    own = bytes(fingerprint(dual)[:4].tolist()).hex()
    told = refusal(load_reranker, path, dual)
    assert told == ANOTHERS.format(where="the checkpoint to evaluate", own=own)

    write(tmp_path, made, {**HEAD, "depth": 1})
    told = refusal(load_reranker, path, dual)
    start = f"re-ranker {path} does not fit the dual encoder or its own config.yaml: Unexpected key"
    assert told.startswith(start) and "\n" not in told and "  " not in told

    text = (tmp_path / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("RerankModule", "OtherModule"))
    assert refusal(load_reranker, path, dual) == f"{path}{NO_RERANKER}"
    (tmp_path / "config.yaml").unlink()
    assert refusal(load_reranker, path, dual) == f"{path}{NO_RERANKER}"


def test_all_bytes_of_a_fingerprint_count() -> None:
    made = ReRanker(RerankConfig(**HEAD), PRESETS["eva02_at_tiny"])
    made.fingerprint.copy_(torch.arange(1, 33))
    own = torch.arange(1, 33, dtype=torch.uint8)
    check_same_encoder(made, own, "run/x")
    for place in (0, 31):
        other = own.clone()
        other[place] = 0xAB
        start = bytes(other[:4].tolist()).hex()
        told = refusal(check_same_encoder, made, other, "run/x")
        assert told == ANOTHERS.format(where="run/x", own=start)


@pytest.mark.parametrize(
    ("part", "name", "value"), [("vision", "num_frames", 7), ("text", "depth", 1)]
)
def test_the_field_that_differs_is_named(part: str, name: str, value: int) -> None:
    recipes = PRESETS["eva02_at_tiny"]
    found = replace(recipes, **{part: replace(getattr(recipes, part), **{name: value})})
    assert refusal(check_architecture, recipes, found, "run/x") == (
        f"the recipe's model has {part}.{name} {getattr(getattr(recipes, part), name)}, and the "
        f"dual encoder of run/x has {value}; its own recipe says what to set in "
        "model.init_args.model"
    )


def test_what_only_matters_in_training_may_differ() -> None:
    recipes = PRESETS["eva02_at_tiny"]
    vision = replace(recipes.vision, patch_dropout=0.5, drop_path=0.2)
    check_architecture(recipes, replace(recipes, vision=vision), "run/x")


def test_the_head_is_what_its_recipe_says(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("wide: 24\nmodel: {init_args: {reranker: {width: '${wide}', num_heads: 3}}}")
    assert read_rerank_config(path) == RerankConfig(width=24, num_heads=3)
    path.write_text("model: {init_args: {}}")
    assert read_rerank_config(path) == RerankConfig()
    path.write_text("model: {init_args: {reranker: {widht: 24}}}")
    told = refusal(read_rerank_config, path)
    assert told == f"{path}: unknown field 'widht'; did you mean 'width'?"
