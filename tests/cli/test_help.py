"""Help answers at once: no command imports torch to say what it does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lightning_modules.cli import recipe_help
from lightning_modules.cli.main import COMMANDS, main

VERBS = ("fit", "validate", "test", "predict")
# What a help may not import: a second of start-up, or more.
HEAVY = ("torch", "lightning", "numpy", "av", "deepspeed")
STILL_HEAVY = {"submit", "plan"}


@pytest.mark.parametrize("command", sorted(set(COMMANDS) - STILL_HEAVY))
def test_help_needs_nothing_heavy(command: str):
    program = (
        "import sys\n"
        "from lightning_modules.cli.main import main\n"
        "try:\n    code = main([sys.argv[1], '--help'])\n"
        "except SystemExit as stop:\n    code = stop.code or 0\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])\n"
        "sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, command], capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout
    assert result.stdout.splitlines()[-1] == "heavy: []"


def test_the_recipes_help_fits_a_screen_or_two_and_names_the_rest(capsys):
    assert main(["fit", "--help"]) == 0
    told = capsys.readouterr().out
    assert len(told.splitlines()) < 100
    assert all(f"--help.{topic}" in told for topic in recipe_help.TOPICS)
    assert "--data.global_batch_size" in told and "(30.0)" in told


def test_each_topic_lists_every_key_of_its_classes(capsys):
    assert main(["fit", "--help.data"]) == 0
    told = capsys.readouterr().out
    assert all(f"--data.{name} " in told for name in ("train", "min_relevance", "prefetch"))
    assert main(["fit", "--help.nonsense"]) == 2
    assert "no help on 'nonsense'" in capsys.readouterr().err


def test_every_key_in_the_help_is_one_the_parser_takes():
    """The help is read from the sources; the parser from the classes. They must not part."""
    import inspect

    from datamodules.module import StreamDataModule
    from datamodules.pretrain import PretrainDataModule
    from datamodules.retrieval import RetrievalDataModule
    from lightning_modules.base import DualEncoderModule
    from lightning_modules.models import ModelConfig
    from lightning_modules.recognition import RecognitionModule
    from lightning_modules.training.optim.optimizers import OptimizerConfig
    from lightning_modules.training.recipe import RUN_CALLBACKS

    classes = {
        "model": (DualEncoderModule, RecognitionModule),
        "the encoders": (ModelConfig,),
        "optimiser": (OptimizerConfig,),
        "data": (StreamDataModule, PretrainDataModule, RetrievalDataModule),
    }
    sections = [section for group in recipe_help.SECTIONS.values() for section in group]
    for section in recipe_help.SECTIONS["run"]:
        classes[section.title] = (RUN_CALLBACKS[section.prefix.strip("-.")],)
    assert {section.title for section in sections} == set(classes)
    for section in sections:
        taken = {
            name
            for owner in classes[section.title]
            for name, parameter in inspect.signature(owner).parameters.items()
            if parameter.kind is not parameter.VAR_KEYWORD
        }
        assert {key.name for key in recipe_help.keys_of(section)} == taken, section.title
    told = {section.prefix.strip("-.") for section in recipe_help.SECTIONS["run"]}
    silent = {"random", "throughput"}  # a seed of its own, and nothing to set
    assert told == set(RUN_CALLBACKS) - silent
