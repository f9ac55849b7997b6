"""`search --rerank`: the first hits in the order of cosine + W p, each against a pair by itself."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from small_videos import write_video

from datamodules.video.windows import read_windows
from lightning_modules.checkpoints.model_config import config_to_json
from lightning_modules.cli.main import main
from lightning_modules.inference.embedding import Embedder, EmbedOptions
from lightning_modules.inference.search_index import SearchIndex
from lightning_modules.inference.second_look import SecondLook
from lightning_modules.models import build_dual_encoder
from lightning_modules.models.rerank import RerankConfig, ReRanker, fingerprint, words_of

HEAD = {"width": 24, "depth": 2, "num_heads": 3, "window": 2, "dropout": 0.0}


def models():
    torch.manual_seed(0)
    dual = build_dual_encoder("eva02_at_tiny", num_frames=2).eval()
    with torch.no_grad():
        for parameter in dual.visual.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    head = ReRanker(RerankConfig(**HEAD), dual.config).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        head.fingerprint.copy_(fingerprint(dual))
    return dual, head


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("library")
    for n in range(4):
        write_video(folder / "v" / f"{n}.mp4", 20, first=11 * n)
    dual, head = models()
    torch.save(dual.state_dict(), folder / "m.pt")
    (folder / "m.json").write_text(config_to_json(dual.config))
    state = {f"model.{name}": tensor for name, tensor in head.state_dict().items()}
    (folder / "rerank").mkdir()
    file = folder / "rerank" / "state.ckpt"
    torch.save({"pytorch-lightning_version": "2", "state_dict": state}, file)
    arguments = {"model": {"preset": "eva02_at_tiny", "num_frames": 2}, "reranker": HEAD}
    section = {"class_path": "lightning_modules.rerank.RerankModule", "init_args": arguments}
    (folder / "rerank" / "config.yaml").write_text(yaml.dump({"model": section}))
    return folder


@torch.no_grad()
@pytest.mark.parametrize("top", [3, 4])
def test_the_first_hits_are_looked_at_again(library: Path, tmp_path: Path, top: int) -> None:
    dual, head = models()
    embedder = Embedder(dual, EmbedOptions(rate=0.5))
    index = SearchIndex(library / "v", "key")
    index.update(embedder, tmp_path / "index")
    (text,) = embedder.texts(["opens the fridge"])
    hits = index.search(text, 10)
    assert len(hits) == 4
    look = SecondLook(embedder, head, top, 50.0)
    again = look.again("opens the fridge", hits)

    told = {}
    for hit in hits[:top]:  # each window by itself
        ((_, clips, _),) = read_windows([hit.window], 2, 64, 1, 1, EmbedOptions().limits)
        _, patches = dual.encode_video_with_patches(clips)
        tokens = embedder.tokenizer(["opens the fridge"])
        _, words = dual.encode_text_with_words(tokens)
        pair = head.words(words), words_of(tokens), torch.zeros(1).long()
        told[hit.window] = hit.score + 50.0 * float(head(head.places(patches), *pair).sigmoid())
    expected = sorted(told, key=lambda window: -told[window])
    assert [hit.window for hit in again] == [*expected, *(hit.window for hit in hits[top:])]
    assert top < 4 or expected != [hit.window for hit in hits]
    for hit in again[:top]:
        # float32 sums of another batch, fifty times
        assert hit.score == pytest.approx(told[hit.window], abs=1e-3)
    assert again[top:] == hits[top:] and {hit.z for hit in again} == {hit.z for hit in hits}


def search(library: Path, *words: str | Path) -> int:
    read = ["--checkpoint", library / "m.pt", "--config", library / "m.json", "--workers", "2"]
    return main(
        [*map(str, ["search", "opens the fridge", "--videos", library / "v", *read, *words])]
    )


def test_the_command_takes_a_reranker(library: Path, capsys) -> None:
    answers = []
    for words in ([], ["--rerank", library / "rerank" / "state.ckpt", "--blend", "50"]):
        assert search(library, *words) == 0
        told = capsys.readouterr().out
        answers.append(re.findall(r"^ +\d+ +(-?\d+\.\d+) .* (\S+\.mp4)$", told, re.MULTILINE))
    plain, second = answers
    assert len(plain) == len(second) == 4
    assert [name for _, name in plain] != [name for _, name in second]
    assert float(second[0][0]) > 1 > float(plain[0][0])


def test_mistakes_are_told_in_words(library: Path, capsys) -> None:
    two = ["--rerank", library / "rerank", "--checkpoint", library / "m.pt"]
    for words, told in (
        (two, "--rerank belongs to one --checkpoint"),
        (["--rerank", library / "m.pt"], "is no re-ranker"),
        (["--rerank", library / "rerank" / "state.ckpt", "--blend", "-1"], "both are at least 0"),
    ):
        assert search(library, *words) == 2
        assert told in capsys.readouterr().err
