"""The strategy files: each composes with a recipe and gives the settings it promises."""

from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_modules.training.recipe import build_cli
from lightning_modules.training.run.strategies import ZeroStrategy

FOLDER = Path(__file__).parents[2] / "configs" / "strategy"
ZERO = {
    "zero1": (1, None, None),
    "zero2": (2, None, None),
    "zero3": (3, None, None),
    "zero2_offload": (2, "cpu", None),
    "zero3_offload": (3, "cpu", "cpu"),
    "zero3_nvme": (3, "nvme", "nvme"),
    "cpu": (2, None, None),
}


def build(recipe, name):
    words = ["--config", str(recipe), "--config", str(FOLDER / f"{name}.yaml")]
    return build_cli([*words, "--trainer.logger=false"]).trainer.strategy


def test_every_file_is_known_here():
    assert {path.stem for path in FOLDER.glob("*")} == {*ZERO, "single", "ddp"}


@pytest.mark.parametrize("name", ZERO)
def test_a_zero_file(recipe, name):
    strategy = build(recipe, name)
    stage, optimizer, parameters = ZERO[name]
    assert isinstance(strategy, ZeroStrategy)
    zero = strategy.config["zero_optimization"]
    assert (strategy.stage, zero["stage"]) == (stage, stage)
    assert zero.get("offload_optimizer", {}).get("device") == optimizer
    assert zero.get("offload_param", {}).get("device") == parameters


def test_the_plain_files(recipe):
    assert isinstance(build(recipe, "ddp"), DDPStrategy)
    assert isinstance(build(recipe, "single"), SingleDeviceStrategy)
