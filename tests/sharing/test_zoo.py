"""The zoo: a table without holes where a command relies on it, and files that are compared."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from lightning_modules.checkpoints import zoo as zoo_module
from lightning_modules.checkpoints.hub import HubAddress
from lightning_modules.checkpoints.model_config import with_settings
from lightning_modules.checkpoints.zoo import ZooEntry, checkpoint_of, find_entry, zoo
from lightning_modules.cli.evaluate_options import BENCHMARKS
from lightning_modules.cli.main import main
from lightning_modules.cli.zoo import markdown
from lightning_modules.models import PRESETS

PAGE = Path(__file__).parents[2] / "docs" / "zoo.md"


@pytest.mark.parametrize("entry", zoo().values(), ids=lambda entry: entry.name)
def test_an_entry_is_well_formed(entry: ZooEntry) -> None:
    assert entry.source and entry.by and entry.read in ("yes", "start", "no")
    if entry.read != "no":
        assert entry.address.startswith(("hf:", "https://"))
    if entry.address.startswith("hf:"):
        assert HubAddress.parse(entry.address).file
    if entry.hash:
        assert re.fullmatch(r"sha256:[0-9a-f]{64}|md5:[0-9a-f]{6}", entry.hash)
    assert entry.benchmark in ("", *BENCHMARKS)
    is_vit = not entry.name.startswith(("eva02", "open_clip_eva02"))
    preset = PRESETS["clip_vit_base_16" if is_vit else "eva02_at_base_16"]
    with_settings(preset, entry.settings)  # refuses what is no field


def test_the_page_holds_the_table() -> None:
    assert markdown() in PAGE.read_text(), "write `eva02-at zoo --markdown` into docs/zoo.md"


def test_listing_and_showing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in zoo()) and "none has been checked" in listed
    assert main(["zoo", "avion_b_mir"]) == 0
    shown = capsys.readouterr().out
    assert "evaluate --zoo avion_b_mir --benchmark ek100_mir" in shown and "never run" in shown
    assert main(["zoo", "avion_b_mirr"]) == 2
    assert "did you mean 'avion_b_mir'" in capsys.readouterr().err


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A file on loopback; entry(hash) is the zoo's word about it."""
    folder = tmp_path / "served"
    folder.mkdir()
    torch.save({"weight": torch.ones(3)}, folder / "model.pt")
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("EVA02_AT_CACHE", str(tmp_path / "cache"))

    def entry(told: str) -> ZooEntry:
        address = f"http://127.0.0.1:{server.server_port}/model.pt"
        return ZooEntry("made_here", "us", "this test", "yes", address, told)

    yield entry, (folder / "model.pt").read_bytes()
    server.shutdown()
    server.server_close()


def test_the_cache_lies_at_home_and_what_is_fetched_is_told(
    served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    entry, content = served
    monkeypatch.delenv("EVA02_AT_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".cache" / "eva02-at" / "zoo" / "made_here.pt"
    assert checkpoint_of(entry("")) == str(path)
    assert path.read_bytes() == content
    assert capsys.readouterr().out == f"fetching {entry('').address} to {path}\n"


def test_what_is_not_fetched_is_told(served, tmp_path: Path) -> None:
    entry, content = served
    on_the_hub = ZooEntry("there", "us", "this test", "yes", "hf:lab/model/a.pt")
    assert checkpoint_of(on_the_hub) == "hf:lab/model/a.pt"
    absent = replace(entry(""), address=entry("").address.replace("model.pt", "absent.pt"))
    with pytest.raises(ValueError) as caught:
        checkpoint_of(absent)
    assert str(caught.value) == (
        f"{absent.address} cannot be fetched (HTTP Error 404: File not found); fetch it by hand "
        "and give --checkpoint"
    )
    found = hashlib.md5(content).hexdigest()
    with pytest.raises(ValueError) as caught:
        checkpoint_of(entry("md5:000000"))
    address = entry("").address
    assert str(caught.value) == f"{address} is not what was published: md5 {found}, not 000000"
    assert not list((tmp_path / "cache").rglob("*.*"))


@pytest.mark.parametrize(
    ("name", "hint"), [("avion_b_mirr", "; did you mean 'avion_b_mir'?"), ("qqqq", "")]
)
def test_an_unknown_name_is_told_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(ValueError) as caught:
        find_entry(name)
    assert str(caught.value) == f"the zoo has no {name!r} (`eva02-at zoo` lists them){hint}"


@pytest.mark.parametrize("kind", ["sha256", "md5"])
def test_a_file_is_fetched_once_and_compared(served, kind: str) -> None:
    entry, content = served
    digest = hashlib.new(kind, content).hexdigest()
    told = entry(f"{kind}:{digest if kind == 'sha256' else digest[:6]}")
    path = Path(checkpoint_of(told))
    assert path.read_bytes() == content
    path.write_bytes(b"kept")
    assert Path(checkpoint_of(told)).read_bytes() == b"kept"


def test_evaluate_takes_the_entrys_file_and_settings(
    served, monkeypatch: pytest.MonkeyPatch, capsys, tmp_path: Path
) -> None:
    """It gets as far as the benchmark's own files, which the words do not name."""
    entry, _ = served
    table = {"made_here": entry("")}
    monkeypatch.setattr(zoo_module, "zoo", lambda: table)
    words = ["evaluate", "--zoo", "made_here", "--benchmark", "ek100_mir"]
    assert main([*words, "--shards", str(tmp_path / "absent")]) == 2
    assert (tmp_path / "cache" / "zoo" / "made_here.pt").is_file()
    assert main([*words, "--checkpoint", "x", "--shards", "y"]) == 2
    assert "not allowed with" in capsys.readouterr().err


def test_what_cannot_be_read_says_why() -> None:
    with pytest.raises(ValueError, match="another architecture"):
        checkpoint_of(zoo()["egovlp"])
