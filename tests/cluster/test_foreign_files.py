"""No code in a run's folder ever runs: a hostile pickle in each file, for each reader of it."""

import hashlib
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
from cluster_runs import run
from tiny_run import steps

from lightning_modules.checkpoints.plain_data import load_plain, plain_data_only
from lightning_modules.checkpoints.source import find_checkpoint


class Hostile:
    """Unpickled, it makes a folder: `os.mkdir(path)`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def plant(file: Path, mark: Path, legacy: bool = False) -> None:
    """Put a hostile object into a torch file in place of its table (or write a bare pickle)."""
    if legacy or not zipfile.is_zipfile(file):
        file.write_bytes(pickle.dumps(Hostile(mark)))
        return
    other = file.with_suffix(".other")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(other, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = pickle.dumps({"state_dict": Hostile(mark), "module": 0}, protocol=2)
            new.writestr(entry, content)
    other.replace(file)


def sign(folder: Path) -> None:
    """Write the hashes of the files as they are: a manifest is no signature."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for record in manifest["files"]:
        content = (folder / record["path"]).read_bytes()
        record.update(size=len(content), sha256=hashlib.sha256(content).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def stopped(zygote, tmp_path_factory):
    """A strategy's run that was stopped after two steps; under ZeRO with its universal form."""
    known = {}

    def folder_of(strategy):
        if strategy not in known:
            folder = known[strategy] = tmp_path_factory.mktemp(strategy)
            world = 1 if strategy == "ddp" else 2
            trouble = {"at": 1, "where": "train"}
            options = {"strategy": strategy, "ema": True, "checkpoints": {"keep_last": 1}}
            assert set(run(zygote, folder, world=world, trouble=trouble, **options).codes) == {85}
            if world == 2:
                spare = folder.with_name(f"{folder.name}-spare")
                shutil.copytree(folder, spare)
                keep_all = {**options, "checkpoints": {"keep_last": 0}}
                assert run(zygote, spare, world=1, epochs=1, **keep_all).codes == [0]
                universal = Path("checkpoints") / "step-00000002" / "universal"
                shutil.copytree(spare / universal, folder / universal)
        return known[strategy]

    return folder_of


def pickles(checkpoint: Path) -> list[str]:
    """One file of each kind."""
    found = {}
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file()):
        if path.suffix not in (".json", ".safetensors", ".yaml"):
            found.setdefault(path.name.replace("_1_", "_0_"), str(path.relative_to(checkpoint)))
    return list(found.values())


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_a_hostile_checkpoint_is_not_resumed_and_runs_nothing(zygote, tmp_path, stopped, strategy):
    world = 1 if strategy == "ddp" else 2
    kinds = pickles(stopped(strategy) / "checkpoints" / "step-00000002")
    assert len(kinds) >= {"ddp": 1, "zero2": 5, "zero3": 5}[strategy]
    kinds = (
        kinds[:1]
        if world == 1
        else [k for k in kinds if k.startswith("state")]
        + [
            next(k for k in kinds if k.startswith("universal")),
            next(k for k in kinds if k.endswith("exp_avg.pt")),
        ]
    )
    for number, kind in enumerate(kinds):
        for legacy in (False, True)[: 2 if number == 0 else 1]:
            folder, mark = tmp_path / f"{number}{legacy}", tmp_path / "ran"
            shutil.copytree(stopped(strategy), folder)
            checkpoint = folder / "checkpoints" / "step-00000002"
            universal = kind.startswith("universal")
            plant(checkpoint / kind, mark, legacy)
            sign(checkpoint / "universal" if universal else checkpoint)
            done = run(
                zygote,
                folder,
                world=1 if universal else world,
                strategy=strategy,
                epochs=1,
                ema=True,
            )
            assert not mark.exists(), kind
            if universal:  # made again from the files that were written
                assert done.codes == [0] and "converting" in done.text()
                assert len(steps(folder)) == 5
            else:
                assert all(code not in (0, 85) for code in done.codes), done.text()
                assert "can run any code" in done.text()


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_hostile_checkpoint_is_not_converted(tmp_path, stopped, strategy):
    folder, mark = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(stopped(strategy), folder)
    checkpoint = folder / "checkpoints" / "step-00000002"
    for kind in [k for k in pickles(checkpoint) if k.startswith("state")]:
        plant(checkpoint / kind, mark)
        sign(checkpoint)
        with pytest.raises(ValueError, match=r"can run any code|not unpickled"):
            find_checkpoint(checkpoint).read()
        assert not mark.exists()


def test_the_plant_bites_where_nothing_guards(tmp_path, stopped):
    """So that the tests above can fail."""
    import torch

    folder, mark = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(stopped("ddp"), folder)
    state = folder / "checkpoints" / "step-00000002" / "state"
    plant(state, mark)
    with plain_data_only(), pytest.raises(pickle.UnpicklingError):
        torch.load(state, weights_only=False)
    with pytest.raises(ValueError, match=r"holds posix\.mkdir"):
        load_plain(state)
    assert not mark.exists()
    torch.load(state, weights_only=False)
    assert mark.is_dir()
