"""Everything that a recipe lacks is named at once, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_modules.cli.main import main
from lightning_modules.training.inputs import check_inputs
from lightning_modules.training.recipe import build_cli

HERE = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.strategy=auto"]
RECIPE = "pretrain/eva02_at_base_egoclip"
TINY = ["--model.model.preset=eva02_at_tiny", "--data.image_size=64"]


def test_all_that_is_missing_is_named_with_its_mend(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["fit", "--config", RECIPE, f"--data_dir={tmp_path / 'no'}", f"--run_dir={tmp_path}/r"]
    assert main([*words, *HERE, *TINY]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    for text in (
        "no checkpoint at checkpoints/EVA02_CLIP_B_psz16_s8B.pt (where public weights come from",
        f"no manifest at {tmp_path}/no/egoclip/manifest.json",
        f"no validation manifest at {tmp_path}/no/ek100_mir_test/manifest.json",
        "no validation annotations at",
        "--data.init_args.val=null",
    ):
        assert text in told, told
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_what_is_there_or_elsewhere_or_not_needed_is_not_missing(tmp_path: Path) -> None:
    (tmp_path / "egoclip").mkdir()
    (tmp_path / "egoclip" / "manifest.json").write_text("{}")
    words = [
        "--config",
        RECIPE,
        f"--data_dir={tmp_path}",
        "--data.init_args.val=null",
        *HERE,
        *TINY,
    ]
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        cli = build_cli(words)
        check_inputs(cli.model, cli.datamodule, resumes=False)
    check_inputs(cli.model, cli.datamodule, resumes=True)
    for weights in ("null", "hf:ORG/NAME@main"):
        cli = build_cli([*words, f"--model.init_args.init_checkpoint={weights}"])
        check_inputs(cli.model, cli.datamodule, resumes=False)
    cli = build_cli(
        [*words, "--model.init_args.init_checkpoint=null", "--data.train=[s3://b/manifest.json]",
         f"--data.cache_dir={tmp_path}"]
    )  # fmt: skip
    check_inputs(cli.model, cli.datamodule, resumes=False)
