"""What torch pickled is read as tensors and plain data, or refused in words: no code runs."""

from __future__ import annotations

import argparse
import errno
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lightning_modules.checkpoints import plain_data
from lightning_modules.checkpoints.loading import read_checkpoint
from lightning_modules.checkpoints.plain_data import foreign_content, load_plain, plain_data_only
from lightning_modules.checkpoints.zero import consolidate

FORCE, FORCE_NOT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
NO_CODE = "a pickle can run any code"
NOT_TORCHS = (
    "is no file that torch.save writes (Expected input to be a checkpoint returned by torch.save)"
)


class Evil:
    """Makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("evil",)


WRITERS = {
    "zip": torch.save,
    "legacy": lambda c, path: torch.save(c, path, _use_new_zipfile_serialization=False),
    "pickle": lambda c, path: path.write_bytes(pickle.dumps(c, protocol=2)),
}


def of_deepspeed(path: Path) -> dict:
    """Stage 0's folder, whose module's state lies in one file."""
    folder = path.parent / "global_step1"
    folder.mkdir(exist_ok=True)
    path.rename(folder / "mp_rank_00_model_states.pt")
    return consolidate(folder)


READERS = {"read_checkpoint": read_checkpoint, "load_plain": load_plain, "deepspeed": of_deepspeed}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (FORCE, FORCE_NOT):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.mark.parametrize("said", [None, FORCE, FORCE_NOT])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("reader", READERS)
def test_no_code_runs_whatever_the_environment_says(
    here: Path, monkeypatch: pytest.MonkeyPatch, reader: str, writer: str, said: str | None
) -> None:
    path = here / "a.pt"
    WRITERS[writer]({"module": {"a": torch.ones(2)}, "x": Evil()}, path)
    if said is not None:
        monkeypatch.setenv(said, "1")
    with pytest.raises(ValueError, match=NO_CODE) as caught:
        READERS[reader](path)
    told = "holds posix.mkdir" if writer == "zip" else NOT_TORCHS
    assert told in str(caught.value)
    assert "weights_only" not in str(caught.value)  # torch's own words advise to read it unsafely
    assert not Path("evil").exists()
    assert [os.environ.get(name) for name in (FORCE, FORCE_NOT)] == [
        "1" if said == name else None for name in (FORCE, FORCE_NOT)
    ]


@pytest.mark.parametrize("writer", ["zip", "legacy"])
def test_the_trap_is_set(here: Path, writer: str) -> None:
    """So that the test above can fail."""
    WRITERS[writer]({"x": Evil()}, here / "a.pt")
    torch.load(here / "a.pt", weights_only=False)
    assert Path("evil").is_dir()


@pytest.mark.parametrize("reader", READERS)
def test_what_a_gpu_wrote_is_read_on_the_cpu(
    here: Path, monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    content = {"module": {"a": torch.arange(3.0)}, "step": 7, "names": ["x"]}
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(content, here / "a.pt")
    found = READERS[reader](here / "a.pt")
    weights = found["a"] if reader == "deepspeed" else found["module"]["a"]
    assert weights.device.type == "cpu" and weights.tolist() == [0, 1, 2]
    assert reader == "deepspeed" or (found["step"], found["names"]) == (7, ["x"])


@pytest.mark.parametrize("force", [None, "0", "1"])
@pytest.mark.parametrize("force_not", [None, "1"])
def test_inside_nothing_foreign_is_loaded_and_the_environment_comes_back(
    here: Path, monkeypatch: pytest.MonkeyPatch, force: str | None, force_not: str | None
) -> None:
    torch.save({"x": Evil()}, here / "a.pt")
    torch.save({"x": 3}, here / "b.pt")
    before = {FORCE: force, FORCE_NOT: force_not}
    for name, value in before.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(pickle.UnpicklingError), plain_data_only():
        assert torch.load(here / "b.pt", weights_only=False) == {"x": 3}
        torch.load(here / "a.pt", weights_only=False)
    assert {name: os.environ.get(name) for name in before} == before
    assert not Path("evil").exists()


def test_deepspeeds_three_classes_are_admitted_by_name_and_only_there(here: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    content = [LossScaler(8), ZeroStageEnum(2), fragment_address(numel=3, start=4)]
    torch.save(content, here / "a.pt")
    names = (
        "holds deepspeed.runtime.fp16.loss_scaler.LossScaler, "
        "deepspeed.runtime.zero.config.ZeroStageEnum, "
        "deepspeed.utils.tensor_fragment.fragment_address"
    )
    for _ in range(2):
        assert foreign_content(here / "a.pt") == names
        with plain_data_only(), pytest.raises(pickle.UnpicklingError):
            torch.load(here / "a.pt")
        with plain_data_only(deepspeed=True):
            assert foreign_content(here / "a.pt") is None
            scaler, *rest = torch.load(here / "a.pt")
        assert scaler.loss_scale == 8 and rest == content[1:]


@pytest.mark.parametrize(
    ("said", "gpu", "then"),
    [(None, False, "cpu"), ("", False, "cpu"), (None, True, None), ("cuda", False, "cuda")],
)
def test_the_accelerator_is_named_where_there_is_none(monkeypatch, said, gpu, then) -> None:
    import deepspeed  # noqa: F401  (it reads the variable when it is imported)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setenv("DS_ACCELERATOR", "put back afterwards")
    del os.environ["DS_ACCELERATOR"]
    if said is not None:
        os.environ["DS_ACCELERATOR"] = said
    with plain_data_only(deepspeed=True):
        assert os.environ.get("DS_ACCELERATOR") == then


NO_ZIP = b"no checkpoint"
ASKED = (
    "; it is not unpickled, because a pickle can run any code. If you trust where it comes from, "
    "save its state dict alone with torch.save or safetensors."
)
MENDED = (
    "; only tensors and plain data are read from a checkpoint, because a pickle can run any code. "
    "Mend: start from its weights, as safetensors, with model.init_checkpoint"
)
CUT_SHORT = ". It may be cut short: compare its size with the publisher's."
RANKS = ". A rank's file may be missing or cut short."
TORCHSCRIPT = (
    "cannot be read: it is a TorchScript program (OpenAI's original files are), which is not run "
    'here. If you trust where it comes from, take its weights out once: python -c "import torch; '
    "torch.save(torch.jit.load('{path}', 'cpu').state_dict(), 'weights.pt')\""
)


@pytest.mark.parametrize(
    ("read", "content", "told"),
    [
        (read_checkpoint, {"x": Evil(), "y": argparse.Namespace}, "{name} holds {two}" + ASKED),
        (read_checkpoint, b"", "{name} cannot be read: EOFError" + CUT_SHORT),
        (read_checkpoint, "script", "{name} " + TORCHSCRIPT),
        (load_plain, {"x": Evil(), "y": argparse.Namespace}, "{path} holds {two}" + MENDED),
        (load_plain, b"", "{path} " + NOT_TORCHS + MENDED),
        (of_deepspeed, {"x": Evil()}, "{folder}: {file} holds posix.mkdir; {unpickled}"),
        (of_deepspeed, b"", "{folder} cannot be joined: EOFError" + RANKS),
        (of_deepspeed, {"x": 1}, "{folder} cannot be joined: 'module'" + RANKS),
        (of_deepspeed, {"module": 1}, "{folder} cannot be joined: 'int' object has no attribute "
         "'items'" + RANKS),
    ],
)  # fmt: skip
def test_a_refusal_says_what_the_file_holds_and_what_to_do(here, read, content, told) -> None:
    path = here / "a.pt"
    if content == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError) as caught:
        read(path)
    assert str(caught.value) == told.format(
        path=path,
        name=f"checkpoint {path}",
        folder=f"DeepSpeed checkpoint {here / 'global_step1'}",
        file="mp_rank_00_model_states.pt",
        two="argparse.Namespace, posix.mkdir",
        unpickled="it is not unpickled, because a pickle can run any code",
    )


def test_of_a_folder_what_is_foreign_is_named_and_deepspeeds_classes_are_not(here: Path) -> None:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    content = {"module": {"a": torch.ones(1)}, "optimizer": LossScaler(8)}
    torch.save(content, here / "a.pt")
    assert list(of_deepspeed(here / "a.pt")) == ["a"]
    torch.save({**content, "x": Evil()}, here / "a.pt")
    with pytest.raises(
        ValueError, match=r"model_states\.pt holds posix\.mkdir; it is not unpickled"
    ):
        of_deepspeed(here / "a.pt")


@pytest.mark.parametrize(
    ("reader", "error", "told"),
    [
        ("load_plain", RuntimeError("why\nmore"), "{path} cannot be read (why)" + MENDED),
        ("read_checkpoint", pickle.UnpicklingError("x"), "checkpoint {path} is damaged" + ASKED),
        ("deepspeed", pickle.UnpicklingError("x"), "DeepSpeed checkpoint {folder}: a file is "
         "damaged; it is not unpickled, because a pickle can run any code"),
    ],
)  # fmt: skip
def test_plain_data_that_cannot_be_read_is_damaged(here, monkeypatch, reader, error, told) -> None:
    torch.save({"a": torch.ones(1)}, here / "a.pt")

    def fails(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(ValueError) as caught:
        READERS[reader](here / "a.pt")
    assert str(caught.value) == told.format(path=here / "a.pt", folder=here / "global_step1")


@pytest.mark.parametrize("content", [b"to do: sleep\n", b"no checkpoint", b".", b"{}", b"(", b"R"])
def test_other_bytes_are_no_deepspeed_checkpoint(here: Path, content: bytes) -> None:
    (here / "a.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"DeepSpeed checkpoint .*global_step1"):
        of_deepspeed(here / "a.pt")


@pytest.mark.parametrize("reader", READERS)
def test_a_failing_storage_is_no_damaged_file(here, monkeypatch, reader: str) -> None:
    torch.save({"module": {}}, here / "a.pt")

    def fails(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(torch, "load", fails)
    with pytest.raises(OSError, match="Stale"):
        READERS[reader](here / "a.pt")


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), MemoryError()])
def test_what_fails_while_a_files_table_is_read_is_told_as_it_is(here, monkeypatch, error) -> None:
    def fails(_: object) -> None:
        raise error

    monkeypatch.setattr(torch.serialization, "get_unsafe_globals_in_checkpoint", fails)
    with pytest.raises(type(error)):
        foreign_content(here / "a.pt")


def test_suffixes_decide_how_a_file_is_read(here: Path) -> None:
    save_file({"a": torch.ones(2)}, here / "a.safetensors")
    assert read_checkpoint(here / "a.safetensors")["a"].tolist() == [1, 1]
    torch.save({"a": torch.ones(2)}, here / "a.SAFETENSORS.bin")
    assert read_checkpoint(str(here / "a.SAFETENSORS.bin"))["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one\ntwo"), "one"),
        (EOFError(), "EOFError"),
        (ValueError("  "), "ValueError"),
    ],
)
def test_an_error_in_one_line(error: Exception, line: str) -> None:
    assert plain_data.first_line(error) == line
