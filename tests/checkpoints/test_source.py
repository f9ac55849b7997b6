"""What a path given as a checkpoint is, and what its contents are called."""

from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import pytest

from lightning_modules.checkpoints import source as source_module
from lightning_modules.checkpoints.loading import _some
from lightning_modules.checkpoints.model_config import config_to_json
from lightning_modules.checkpoints.source import (
    CheckpointSource,
    complete_checkpoints,
    find_checkpoint,
)
from lightning_modules.models import PRESETS
from lightning_modules.training.run.checkpoint_store import (
    STATE,
    CheckpointFolder,
    FileRecord,
    Manifest,
    checkpoint_name,
    file_record,
)


def deepspeed_folder(folder: Path, content: str = "w") -> Path:
    folder.mkdir(parents=True)
    (folder / "mp_rank_00_model_states.pt").write_text(content)
    (folder / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_text("o")
    (folder / "notes.txt").write_text(str(folder))
    return folder


def run_with(folder: Path, states: dict[int, str]) -> Path:
    store = CheckpointFolder(folder / "checkpoints")
    for step, content in states.items():
        temporary = store.begin(checkpoint_name(step))
        (temporary / STATE).write_text(content)
        record = file_record(temporary, temporary / STATE)
        store.commit(checkpoint_name(step), Manifest(step, 0, 1, "plain", files=[record]))
    return folder


def digest(*parts: str) -> str:
    """SHA-256 over the parts' own."""
    inner = b"".join(hashlib.sha256(part.encode()).digest() for part in parts)
    return hashlib.sha256(inner).hexdigest()


def test_contents_have_one_name_wherever_they_lie(tmp_path):
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).write_text("weights")
    assert find_checkpoint(tmp_path / "a.pt").content_hash() == digest("weights")
    assert find_checkpoint(tmp_path / "b.pt").content_hash() == digest("weights")
    shares = deepspeed_folder(tmp_path / "shares")
    assert find_checkpoint(shares).content_hash() == digest("w", "o")  # by name; notes apart
    first, second = (run_with(tmp_path / name, {3: "same"}) for name in ("one", "two"))
    named = {find_checkpoint(run).content_hash() for run in (first, second)}
    assert named == {find_checkpoint(first / "checkpoints" / checkpoint_name(3)).content_hash()}
    other = run_with(tmp_path / "three", {3: "else"})
    assert find_checkpoint(other).content_hash() not in named
    expected = json.dumps({STATE: hashlib.sha256(b"same").hexdigest()}).encode()
    assert named == {hashlib.sha256(expected).hexdigest()}


def test_a_deepspeed_folder_is_itself_or_what_latest_names_or_the_only_one(tmp_path):
    outer = tmp_path / "outer"
    (outer / "logs").mkdir(parents=True)
    first = deepspeed_folder(outer / "global_step1")
    assert find_checkpoint(first).data == first
    found = find_checkpoint(outer)
    assert (found.path, found.data, found.step) == (outer, first, None)
    deepspeed_folder(outer / "global_step2")
    told = r"several DeepSpeed checkpoints and no `latest`: name one of global_step1, global_step2"
    with pytest.raises(ValueError, match=told):
        find_checkpoint(outer)
    (outer / "latest").write_text("global_step2\n")
    assert find_checkpoint(outer).data == outer / "global_step2"
    (outer / "latest").write_text("global_step3")
    with pytest.raises(ValueError, match=r"is no checkpoint: expected a file, a run's folder"):
        find_checkpoint(outer)
    (outer / "latest").unlink()
    (outer / "step-00000004").mkdir()
    with pytest.raises(ValueError, match=r"step-00000004 has no manifest\.json: .*never completed"):
        find_checkpoint(outer / "step-00000004")
    with pytest.raises(FileNotFoundError, match="absent: no such file or folder"):
        find_checkpoint(tmp_path / "absent")


def test_the_newest_complete_one_is_taken_and_the_others_are_told_of(tmp_path, caplog):
    run = run_with(tmp_path / "run", {1: "one", 3: "three", 20: "twenty"})
    checkpoints = run / "checkpoints"
    assert find_checkpoint(run).step == 20
    (checkpoints / checkpoint_name(20) / STATE).write_text("cut")
    assert find_checkpoint(run).step == find_checkpoint(checkpoints).step == 3
    told = [record.getMessage() for record in caplog.records]
    assert told and all(line.startswith("checkpoint skipped: ") for line in told)
    assert checkpoint_name(20) in told[0]
    found, damaged = complete_checkpoints(run)
    assert [source.step for source in found] == [1, 3]
    assert damaged == {str(checkpoints / checkpoint_name(20)): told[0].partition(": ")[2]}
    assert [s.step for s in complete_checkpoints(checkpoints)[0]] == [1, 3]
    for step in (1, 3):
        (checkpoints / checkpoint_name(step) / STATE).unlink()
    with pytest.raises(ValueError, match=r"no complete checkpoint in .*: .*; .*; ") as caught:
        find_checkpoint(run)
    complaints = list(complete_checkpoints(run)[1].values())
    assert len(complaints) == 3
    told = f"no complete checkpoint in {checkpoints}: {'; '.join(reversed(complaints))}"
    assert str(caught.value) == told


def test_storage_that_fails_is_no_reason_to_take_an_older_one(tmp_path, monkeypatch):
    run = run_with(tmp_path / "run", {1: "one", 3: "three"})

    def fails(folder, manifest):
        raise ValueError("unreadable") from OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(source_module, "check_sizes", fails)
    with pytest.raises(ValueError, match=r"^unreadable$"):
        find_checkpoint(run)


def test_a_manifests_files_count_in_the_order_of_their_names(tmp_path):
    records = [FileRecord(name, 1, name * 3) for name in ("b", "a")]
    source = CheckpointSource(tmp_path, tmp_path, Manifest(1, 0, 1, "plain", files=records))
    expected = json.dumps({"a": "aaa", "b": "bbb"}).encode()
    assert source.content_hash() == hashlib.sha256(expected).hexdigest()


def test_long_lists_are_cut():
    names = list("abcdefgh")
    assert _some(names[:6]) == "a, b, c, d, e, f"
    assert _some(names) == "a, b, c, d, e, f, and 2 more"
    assert _some(names, "; ", limit=7) == "a; b; c; d; e; f; g; and 1 more"


def test_a_description_says_its_format_and_all_that_it_is_given():
    text = config_to_json(PRESETS["eva02_at_tiny"], step=3, source=None)
    content = json.loads(text)
    assert list(content) == ["format", "model", "step", "source"]
    assert content["format"] == "eva02-at model" and (content["step"], content["source"]) == (
        3,
        None,
    )
    assert content["model"]["vision"]["patch_size"] == PRESETS["eva02_at_tiny"].vision.patch_size
    assert text.splitlines()[1].startswith('  "format"')  # for people, too
