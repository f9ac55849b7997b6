"""Wrong values in a recipe: which key, what was given, what it must be, in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lightning_modules.training.recipe import build_cli

RECIPE = """
model:
  class_path: lightning_modules.pretrain.PretrainModule
  init_args:
    model: {preset: eva02_at_tiny, embed_dim: 32, num_frames: 2}
    loss: {class_path: lightning_modules.losses.InfoNCELoss}
    optimizer: {lr: 1.0e-3}
data:
  class_path: datamodules.pretrain.PretrainDataModule
  init_args: {train: [absent/manifest.json], num_frames: 2}
trainer: {accelerator: cpu, logger: false}
"""


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("--trainer.max_epochs=abc", "trainer.max_epochs is 'abc'; it must be a whole number"),
        ("--trainer.precision=foo", "it must be a whole number or one of transformer-engine"),
        ("--data.num_workers=x", "data.num_workers is 'x'; it must be a whole number"),
        ("--data.crop_scale=0.5", "data.crop_scale is '0.5'; it must be a list, such as [a, b]"),
        ("--model.optimizer.betas=[0.9]", "model.optimizer.betas is '[0.9]'; it must be a list of"),
        ("--model.optimizer.lr=fast", "model.optimizer.lr is 'fast'; it must be a number"),
        ("--model.model.num_frames=1.5", "model.model.num_frames is '1.5'; it must be a whole"),
        ("--model.loss=SMS", "model.loss is 'SMS'; it must be its keys, or the path of a class"),
        ("--checkpoints.mode=best", "checkpoints.mode is 'best'; it must be one of max, min"),
        ("--trainer.enable_checkpointing=perhaps", "it must be true or false"),
        ("--data.nope=3", "data: Option 'nope' is not accepted"),
        ("--data.global_batch_siez=3", "Did you mean `global_batch_size`?"),
        ("--data.train=5", "data.train is '5'; it must be a list, such as [a, b]"),
    ],
)
def test_a_wrong_value_is_told_in_words(tmp_path, word: str, told: str):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    with pytest.raises(ValueError) as caught:
        build_cli(["--config", str(recipe), f"--run_dir={tmp_path}", word])
    message = str(caught.value)
    assert told in message
    assert "\n" not in message and "class '" not in message and "typing" not in message


def test_a_class_beside_the_recipe_is_found_by_the_console_script(tmp_path):
    """A console script's own folder is on the path, the user's is not."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "own_losses_of_this_test.py").write_text(
        "from lightning_modules.losses import InfoNCELoss\n\n\nclass Mine(InfoNCELoss):\n    pass\n"
    )
    recipe = tmp_path / "mine" / "recipe.yaml"
    own = RECIPE.replace("lightning_modules.losses.InfoNCELoss", "own_losses_of_this_test.Mine")
    recipe.write_text(own)
    script = Path(sys.executable).with_name("eva02-at")
    words = ["fit", "--config", str(recipe), "--print_config"]
    done = subprocess.run([script, *words], capture_output=True, text=True, cwd="/", timeout=120)
    assert done.returncode == 0, done.stderr
    assert "own_losses_of_this_test.Mine" in done.stdout
