"""The strategy files: each composes with a recipe and gives the settings it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from lightning_modules.training.recipe import build_cli
from lightning_modules.training.run.strategies import ZeroStrategy, bucket_elements

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


@pytest.mark.parametrize("given", ["fp32", "bf16"])
def test_gradients_are_summed_in_the_type_that_is_named(recipe, given):
    words = ["--config", str(recipe), "--config", str(FOLDER / "zero2.yaml")]
    words += ["--trainer.logger=false"]
    if given != "fp32":  # the default, as DDP does
        words += [f"--trainer.strategy.init_args.communication_data_type={given}"]
    strategy = build_cli(words).trainer.strategy
    assert strategy.config["communication_data_type"] == given


def test_buckets_hold_a_part_of_the_model():
    """Whole models in one bucket are reduced when the backward pass is over."""
    assert bucket_elements(149_553_665) == 18_694_210  # B/16: eight of them
    assert bucket_elements(428_000_000) == 50_000_000
    assert bucket_elements(3) == 2


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [1, 2])
def test_gradients_are_reduced_while_the_backward_pass_goes_on(tmp_path, stage):
    """In Lightning's buckets, which hold the whole model, none is: one reduction after the pass."""
    program = Path(__file__).with_name("zero_buckets.py")
    command = [sys.executable, str(program), str(tmp_path), str(stage)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == {"during": 7, "after": 1, "type": "torch.float32"}
