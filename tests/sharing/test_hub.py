"""Checkpoints from and to the Hub, against a server on loopback that speaks its API."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx2
import pytest
import torch
from hub_server import HubServer, Repository
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from lightning_modules.checkpoints import hub as hub_module
from lightning_modules.checkpoints.conversion import save_model
from lightning_modules.checkpoints.hub import HubAddress, fetch
from lightning_modules.checkpoints.sharing import model_card, push_model
from lightning_modules.checkpoints.source import find_checkpoint
from lightning_modules.cli.main import main
from lightning_modules.models import (
    DualEncoder,
    DualEncoderConfig,
    TextConfig,
    VisionConfig,
)
from lightning_modules.sweep.discovery import find_checkpoints, plan_cells

TOKEN = "hf_ThisMustNeverBeSeenAnywhere"
LOGIN = "`hf auth login`, or HF_TOKEN, where it is private or yours to write"
CONFIG = DualEncoderConfig(
    VisionConfig(image_size=16, patch_size=8, width=32, depth=2, num_heads=2, mlp_hidden=40),
    TextConfig(width=16, depth=2, num_heads=2),
    embed_dim=12,
)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The stand-in in the place of the Hub, for this process; a cache of its own."""
    with HubServer(TOKEN) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    """`eva02-at WORDS` here; every log of every library is kept, and holds no token."""
    caplog.set_level(logging.DEBUG)

    def command(*words: str) -> Done:
        caplog.clear()
        code = main(list(words))
        printed = capfd.readouterr()
        everything = printed.out + printed.err + caplog.text
        assert TOKEN not in everything
        return Done(code, printed.out, printed.err, caplog.text)

    return command


@dataclass
class Done:
    """What a command did."""

    code: int
    out: str
    err: str
    log: str


def model(seed: int = 0) -> DualEncoder:
    torch.manual_seed(seed)
    made = DualEncoder(CONFIG)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.2)
    return made.eval()


def assert_same(path: Path, expected: DualEncoder) -> None:
    from safetensors.torch import load_file

    found = load_file(path)
    assert set(found) == set(expected.state_dict())
    for key, value in expected.state_dict().items():
        assert torch.equal(found[key], value), key


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, bytes]:
    """What `DualEncoder.save_pretrained` writes."""
    model().save_pretrained(tmp_path / "saved")
    return {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}


def push(run, folder: Path, *more: str):
    """Convert a model and push it as `lab/model`."""
    save_file(model().state_dict(), folder / "in.safetensors")
    (folder / "in.json").write_text(json.dumps({"model": json.loads(_json())}))
    words = ["convert", "--input", str(folder / "in.safetensors"), "--output"]
    words += [str(folder / "out.safetensors"), "--push", "lab/model", "--licence", "mit"]
    done = run(*words, *more)
    assert done.code == 0, done.err
    return done


def test_pushed_then_converted(hub: HubServer, run, tmp_path: Path) -> None:
    """A second commit, and a pinned revision."""
    results = tmp_path / "mir.json"
    per_query = {"map": {"v2t": [0.25, 0.5, 0.75], "t2v": [0.5, 0.5]}}
    figures = {"map": {"v2t": 50.0, "t2v": 50.0, "avg": 50.0}, "per_query": per_query}
    results.write_text(json.dumps({"benchmark": "ek100_mir", "protocol": "4 frames", **figures}))
    done = push(run, tmp_path, "--results", str(results))
    (first,) = hub.repositories["lab/model"].commits
    assert f"pushed to {hub.url}/lab/model/commit/{first}" in done.out
    assert hub.messages == ["Converted by eva02-at"] and not hub.private
    files = hub.repositories["lab/model"].commits[first]
    assert set(files) >= {"model.safetensors", "config.json", "README.md"}
    card = files["README.md"].decode()
    assert card.startswith("---\nlicense: mit\n")
    assert "| ek100_mir | 4 frames | map.v2t | 50.00 [" in card

    other = model(seed=1)
    other.save_pretrained(tmp_path / "other")
    changed = (tmp_path / "other" / "model.safetensors").read_bytes()
    hub.repositories["lab/model"].commit({"model.safetensors": changed})
    for address, expected in ((f"lab/model@{first}", model()), ("lab/model", other)):
        output = str(tmp_path / "again.safetensors")
        done = run("convert", "--input", f"hf:{address}", "--output", output)
        assert done.code == 0, done.err
        assert_same(tmp_path / "again.safetensors", expected)


def test_pushed_again_privately_or_not_at_all(hub: HubServer, run, tmp_path: Path) -> None:
    push(run, tmp_path, "--private")
    assert hub.private == {"lab/model"}
    before = set(hub.repositories["lab/model"].commits)
    (tmp_path / "out.safetensors").unlink()
    push(run, tmp_path)
    assert len(set(hub.repositories["lab/model"].commits) - before) == 1
    hub.failure = 403
    with pytest.raises(ValueError) as caught:
        push_model("lab/model", tmp_path / "out.safetensors", "card", private=False)
    assert str(caught.value) == f"hf:lab/model: the Hub answers HTTP 403; {LOGIN}"


def test_pushed_then_read_by_the_mixin(hub: HubServer, run, tmp_path: Path) -> None:
    push(run, tmp_path)
    (first,) = hub.repositories["lab/model"].commits
    code = (
        "import sys, torch; from lightning_modules.models import DualEncoder;"
        f"m = DualEncoder.from_pretrained('lab/model', revision='{first}');"
        "m.save_pretrained(sys.argv[1]); assert not m.training"
    )
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    start = [sys.executable, "-c", code, str(tmp_path / "mixin")]
    subprocess.run(start, env={**os.environ, **settings}, check=True)
    assert_same(tmp_path / "mixin" / "model.safetensors", model())


def _json() -> str:
    from lightning_modules.checkpoints.model_config import config_to_json

    return json.dumps(json.loads(config_to_json(CONFIG))["model"])


def test_offline_the_cache_serves(
    hub: HubServer, run, tmp_path: Path, weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["lab/model"] = Repository()
    hub.repositories["lab/model"].commit(weights)
    words = ["convert", "--input", "hf:lab/model", "--output", str(tmp_path / "o.safetensors")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused = run(*words)
    assert refused.code == 2 and "not in the Hub's cache" in refused.err
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert run(*words).code == 0
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    done = run(*words)
    assert done.code == 0, done.err
    assert_same(tmp_path / "o.safetensors", model())
    assert len(hub.requests) == asked
    told = "hf:lab/model: the Hub cannot be asked (OfflineModeIsEnabled); the cache is used"
    assert f" {told}\n" in done.log


def test_the_cache_knows_repositories_and_revisions_apart(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    commits = []
    for name, file in (("lab/one", "one.pt"), ("lab/two", "two.pt"), ("lab/two", "new.pt")):
        repository = hub.repositories.setdefault(name, Repository())
        commits.append(repository.commit({file: name.encode(), "notes.md": b"#"}))
        if file != "new.pt":
            assert fetch(f"hf:{name}").read_bytes() == name.encode()
    assert fetch(f"hf:lab/two@{commits[1]}").name == "two.pt"  # the newest has two files
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, revision, file in (
        ("lab/one", "", "one.pt"),
        ("lab/two", "", "two.pt"),
        ("lab/two", f"@{commits[1]}", "two.pt"),
    ):
        found = fetch(f"hf:{name}{revision}")
        assert found.name == file and found.read_bytes() == name.encode()
    for address in ("lab/three", f"lab/two@{commits[2]}", f"lab/one@{commits[1]}"):
        with pytest.raises(ValueError, match=f"^hf:{address} is not in the Hub's cache, and the"):
            fetch(f"hf:{address}")


def answered(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    request = httpx2.Request("GET", "http://hub/secret")
    return kind("secret", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            answered(errors.GatedRepoError, 403),
            f": its owner gives access on request; ask, then {LOGIN}",
        ),
        (answered(errors.RevisionNotFoundError, 404), ": the repository has no such revision"),
        (
            answered(errors.RepositoryNotFoundError, 404),
            f": no such repository on the Hub, or no access: {LOGIN}",
        ),
        (errors.HFValidationError("'a--b' is no name"), ": 'a--b' is no name"),
        *(
            (
                error,
                " is not in the Hub's cache, and the Hub cannot be reached (HF_HUB_OFFLINE, or no "
                "network). Fetch it once where there is one, with the same HF_HOME",
            )
            for error in (
                errors.LocalEntryNotFoundError("secret"),
                errors.OfflineModeIsEnabled("secret"),
            )
        ),
        (errors.EntryNotFoundError("secret"), ": the repository has no such file"),
        (answered(errors.HfHubHTTPError, 503), f": the Hub answers HTTP 503; {LOGIN}"),
        (httpx2.ReadTimeout("secret"), f": the Hub answers ReadTimeout; {LOGIN}"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_what_the_hub_answers_is_told_without_its_words(monkeypatch, error, told: str) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(hub_module, "snapshot_download", refuse)
    with pytest.raises(ValueError) as caught:
        fetch("hf:lab/model/w/a.pt@v1")
    assert str(caught.value) == f"hf:lab/model/w/a.pt@v1{told}"


def test_what_describes_a_file_is_fetched_beside_it(hub: HubServer) -> None:
    files = ("w/a.pt", "w/a.json", "config.json", "w/b.pt", "w/b.json", "notes.md")
    hub.repositories["lab/model"] = Repository()
    hub.repositories["lab/model"].commit({name: name.encode() for name in files})
    path = fetch("hf:lab/model/w/a.pt")
    root = path.parents[1]
    brought = {str(found.relative_to(root)) for found in root.rglob("*.*")}
    assert brought == {"w/a.pt", "w/a.json", "config.json"} and path.read_bytes() == b"w/a.pt"


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ("model.safetensors a.pt", "model.safetensors"),
        ("x.json a.pth", "a.pth"),
        ("x.bin", "x.bin"),
        ("x.ckpt y.txt", "x.ckpt"),
        ("x.safetensors", "x.safetensors"),
        (
            "j.pt i.pt h.pt g.pt f.pt e.pt d.pt c.pt b.pt",
            "it has several: name one, as hf:lab/model/FILE: "
            "b.pt, c.pt, d.pt, e.pt, f.pt, g.pt, h.pt, i.pt",
        ),
        ("x.json", "the repository holds no weights"),
    ],
)
def test_the_only_weights_of_a_repository(hub: HubServer, names: str, found: str) -> None:
    hub.repositories["lab/model"] = Repository()
    hub.repositories["lab/model"].commit(dict.fromkeys(names.split(), b"."))
    if " " not in found:
        assert fetch("hf:lab/model").name == found
        return
    with pytest.raises(ValueError) as caught:
        fetch("hf:lab/model")
    assert str(caught.value) == f"hf:lab/model: {found}"


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("hf:lab/absent", "no such repository"),
        ("hf:lab/model@nosuch", "no such revision"),
        ("hf:lab/model/absent.pt", "no file 'absent.pt'"),
        ("hf:lab/several", "name one, as hf:lab/several/FILE: a.pt, b.bin"),
        ("hf:lab/none", "holds no weights"),
        ("hf:model", "write hf:ORG/NAME"),
    ],
)
def test_a_mistake_is_one_line(
    hub: HubServer, run, tmp_path: Path, weights, address: str, told: str
) -> None:
    for name, files in (
        ("lab/model", weights),
        ("lab/several", {"a.pt": b"1", "b.bin": b"2"}),
        ("lab/none", {"README.md": b"#"}),
    ):
        hub.repositories[name] = Repository()
        hub.repositories[name].commit(files)
    output = str(tmp_path / "o.safetensors")
    done = run("convert", "--input", address, "--output", output)
    assert done.code == 2
    (line,) = [text for text in done.err.splitlines() if "eva02-at: error" in text]
    assert told in line


def test_a_private_repository_needs_the_token_and_a_fault_does_not_tell_it(
    hub: HubServer, run, tmp_path: Path, weights, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["lab/model"] = Repository()
    hub.repositories["lab/model"].commit(weights)
    hub.private.add("lab/model")
    words = ["convert", "--input", "hf:lab/model", "--output", str(tmp_path / "o.safetensors")]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "no access" in run(*words).err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert run(*words).code == 0
    assert any(authorization == f"Bearer {TOKEN}" for *_, authorization in hub.requests)
    hub.failure = 403
    push = [*words, "--push", "lab/model", "--licence", "mit"]
    push[2] = str(tmp_path / "o.safetensors")
    push[4] = str(tmp_path / "p.safetensors")
    done = run(*push)
    assert done.code == 2 and "HTTP 403" in done.err


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf:a/b", ("a/b", None, None)),
        ("hf:a-1/b.c@v1.0", ("a-1/b.c", None, "v1.0")),
        ("hf:a/b/c/d.pt@refs/pr/1", ("a/b", "c/d.pt", "refs/pr/1")),
    ],
)
def test_addresses(text: str, parts: tuple[str, str | None, str | None]) -> None:
    found = HubAddress.parse(text)
    assert (found.repo, found.file, found.revision) == parts
    assert str(found) == text


@pytest.mark.parametrize("text", ["hf:", "hf:a", "hf:a/", "hf:/a/b", "hf:a/b@", "hf:a b/c"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="hf:ORG/NAME"):
        HubAddress.parse(text)


def test_a_card_tells_the_recipe_and_no_secret(tmp_path: Path) -> None:
    from lightning_modules.checkpoints.conversion import load_model

    (tmp_path / "checkpoints").mkdir()
    torch.save({"state_dict": model().state_dict()}, tmp_path / "checkpoints" / "last.ckpt")
    (tmp_path / "config.yaml").write_text(
        "model: {init_args: {model: {preset: eva02_at_tiny}, api_key: sesame}}\n"
        "data: {init_args: {train: [/home/me/data/egoclip/manifest.json]}}\n"
        "trainer: {logger: {token: sesame}}\n"
    )
    described = tmp_path / "described.json"
    described.write_text(_json())
    loaded = load_model(tmp_path / "checkpoints" / "last.ckpt", config=described)
    save_model(loaded, tmp_path / "x.safetensors")
    card = model_card("lab/model", loaded, "cc-by-nc-4.0")
    assert "- `egoclip`" in card and "preset: eva02_at_tiny" in card
    assert "sesame" not in card and "/home/me" not in card
    assert "None was given" in card


def test_a_sweep_takes_addresses(hub: HubServer, weights, tmp_path: Path, monkeypatch) -> None:
    """Its cells name the snapshot's file: the cache's own are links, without the suffix."""
    monkeypatch.chdir(tmp_path)
    hub.repositories["lab/model"] = Repository()
    hub.repositories["lab/model"].commit(weights)
    sources, damaged = find_checkpoints(["hf:lab/model"])
    (cell,) = plan_cells(sources, [("egomcq",)])
    assert not damaged and Path(cell.checkpoint).name == "model.safetensors"
    again = find_checkpoint(cell.checkpoint)
    assert again.config is not None and again.config.name == "config.json"
    assert again.content_hash() == cell.content
