"""DeepSpeed directories of every ZeRO stage, written by two real ranks, through `convert`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from published_layouts import EVA

from lightning_modules.checkpoints.conversion import load_model
from lightning_modules.checkpoints.model_config import config_to_json
from lightning_modules.checkpoints.source import find_checkpoint
from lightning_modules.cli.main import main

pytestmark = pytest.mark.distributed
CASES = ["0-fp32", "0-bf16", "1-fp32", "1-bf16", "2-fp32", "2-bf16", "3-fp32", "3-bf16"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    (folder / "model.json").write_text(config_to_json(EVA))
    script = Path(__file__).with_name("zero_ranks.py")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(script), str(folder), str(folder / "model.json")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_every_stage_is_joined_exactly(written: Path, tmp_path: Path, case: str) -> None:
    output = tmp_path / "model.safetensors"
    words = ["--input", str(written / case), "--config", str(written / "model.json")]
    assert main(["convert", *words, "--output", str(output)]) == 0
    expected = torch.load(written / f"{case}.pt", weights_only=True)
    got = load_model(output).model.state_dict()
    assert got.keys() == expected.keys()
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def copy_of(written: Path, tmp_path: Path, case: str) -> Path:
    shutil.copytree(written / case, tmp_path / case)
    return tmp_path / case / "checkpoint"


@pytest.mark.parametrize("latest", [None, "another"])
def test_the_folder_with_the_files_may_be_named_itself(
    written: Path, tmp_path: Path, latest: str | None
) -> None:
    folder = copy_of(written, tmp_path, "2-fp32")
    (folder.parent / "latest").unlink()
    if latest:
        (folder.parent / "latest").write_text(latest)
    assert find_checkpoint(folder).read()


def test_a_missing_rank_is_an_error(written: Path, tmp_path: Path) -> None:
    folder = copy_of(written, tmp_path, "2-fp32")
    next(folder.glob("*rank_1*optim*")).unlink()
    with pytest.raises(ValueError, match=r"2-fp32/checkpoint cannot be joined.*missing"):
        find_checkpoint(tmp_path / "2-fp32").read()


def test_a_truncated_file_is_an_error(written: Path, tmp_path: Path) -> None:
    folder = copy_of(written, tmp_path, "3-fp32")
    path = next(folder.glob("*rank_1*optim*"))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"3-fp32/checkpoint (cannot be joined|holds more)"):
        find_checkpoint(tmp_path / "3-fp32").read()


class _Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("pattern", ["*model_states.pt", "*rank_1*optim_states.pt"])
def test_code_in_a_ranks_file_is_refused(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copy_of(written, tmp_path, "1-fp32")
    path = next(folder.glob(pattern))
    content = torch.load(path, weights_only=False)
    torch.save({**content, "x": _Evil()}, path)
    with zipfile.ZipFile(path) as archive:  # the trap is set
        assert any(b"mkdir" in archive.read(name) for name in archive.namelist() if "pkl" in name)
    with pytest.raises(ValueError, match="run any code"):
        find_checkpoint(tmp_path / "1-fp32").read()
    assert not Path("evil").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
