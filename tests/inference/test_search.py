"""`eva02-at search`: the index follows the folder, and answers are the nearest windows."""

from __future__ import annotations

import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from published_layouts import EVA, random_model
from small_videos import write_video

from datamodules.video.windows import Window
from lightning_modules.checkpoints.model_config import config_to_json
from lightning_modules.cli.main import main
from lightning_modules.inference.calibration import Background
from lightning_modules.inference.embedding import Embedder, EmbedOptions
from lightning_modules.inference.search_index import Hit, IndexedVideo, Part, SearchIndex
from lightning_modules.inference.search_page import Answer, clock, search_page


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos of 2 s, one of 5 s, one damaged; and two models."""
    folder = tmp_path_factory.mktemp("library")
    for n in range(3):
        write_video(folder / "v" / f"{n}.mp4", 20, first=11 * n)
    write_video(folder / "v" / "long" / "x.mp4", 50, first=40)
    (folder / "v" / "bad.mp4").write_bytes(b"nothing")
    for seed in (1, 2):
        model = random_model(EVA, seed)
        torch.save(model.state_dict(), folder / f"m{seed}.pt")
    (folder / "m.json").write_text(config_to_json(EVA))
    return folder


@pytest.fixture
def copied(library: Path, tmp_path: Path) -> Path:
    shutil.copytree(library, tmp_path / "library")
    return tmp_path / "library"


def search(folder: Path, *words: str | Path, model: int = 1) -> int:
    read = ["--checkpoint", folder / f"m{model}.pt", "--config", folder / "m.json"]
    return main([*map(str, ["search", *words, "--videos", folder / "v", *read]), "--workers", "2"])


def indexed(told: str) -> tuple[int, int, int]:
    """windows, videos, read now"""
    found = re.search(r"index: (\d+) windows of (\d+) videos, (\d+) read now", told)
    assert found, told
    return tuple(map(int, found.groups()))  # type: ignore[return-value]


def test_answers_are_the_nearest_windows(library: Path) -> None:
    embedder = Embedder(random_model(EVA), EmbedOptions(rate=0.5))
    index = SearchIndex(library / "v", "key")
    index.update(embedder, library / "index")
    # 1 + 1 + 1 windows, and 3 of the long one
    assert len(index) == 6
    query = embedder.texts(["opens the fridge"])[0]
    hits = index.search(query, 10)
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True) and len(hits) == 6
    for hit in hits:  # each score is that of the window it names
        alone = embedder.windows([hit.window]).embeddings[0]
        # stored in half precision: at most 2^-11 of each product
        assert hit.score == pytest.approx(float(alone @ query), abs=5e-4)
    assert index.search(query, 2) == hits[:2]
    again = SearchIndex.load(library / "index", library / "v", "key")
    assert again.search(query, 10) == hits
    assert again.videos == index.videos
    assert len(SearchIndex.load(library / "index", library / "v", "other").videos) == 0


def test_overlapping_windows_of_one_video_answer_once() -> None:
    spans = torch.tensor([[0.0, 2], [1, 3], [2, 4], [0, 2]], dtype=torch.float64)
    vectors = torch.nn.functional.normalize(torch.tensor([[3.0, 1], [3, 0], [2, 1], [1, 1]]), dim=1)
    videos = [IndexedVideo(name, 0, 0) for name in ("a", "b")]
    background = Background.of(torch.eye(2), [vectors])
    part = Part(videos, torch.tensor([0, 0, 0, 1]), spans, vectors.half(), background)
    index = SearchIndex(Path("f"), "k", [part])
    hits = index.search(torch.tensor([1.0, 0]), 5)
    # the best is 1-3 s of a, which 0-2 and 2-4 overlap; b stands by itself
    assert [(hit.window.video.name, hit.window.start_s) for hit in hits] == [("a", 1), ("b", 0)]


def test_only_what_changed_is_read_again(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search(copied, "a", "b") == 0
    told = capsys.readouterr()
    assert indexed(told.out) == (6, 5, 5)
    assert "bad.mp4" in told.err and "1 unreadable in 1 videos" in told.err
    assert search(copied, "a") == 0
    told = capsys.readouterr()
    assert indexed(told.out) == (6, 5, 0) and "bad.mp4" in told.err  # named every time
    # one changed, one repaired, one gone, one new
    write_video(copied / "v" / "0.mp4", 40, first=3)
    write_video(copied / "v" / "bad.mp4", 20, first=9)
    (copied / "v" / "1.mp4").unlink()
    write_video(copied / "v" / "new.mp4", 20)
    assert search(copied) == 0
    assert indexed(capsys.readouterr().out) == (8, 5, 3)
    # touched: it may have changed
    os.utime(copied / "v" / "2.mp4", (1, 1))
    assert search(copied) == 0
    assert indexed(capsys.readouterr().out) == (8, 5, 1)
    # another model, or other windows, read everything, and the first index stays
    assert search(copied, model=2) == 0
    assert indexed(capsys.readouterr().out) == (8, 5, 5)
    assert search(copied, "--rate", "1") == 0
    assert indexed(capsys.readouterr().out)[2] == 5
    assert search(copied) == 0
    assert indexed(capsys.readouterr().out) == (8, 5, 0)


def test_the_index_equals_one_made_anew(copied: Path) -> None:
    embedder = Embedder(random_model(EVA), EmbedOptions(rate=0.5))
    path = copied / "i"
    index = SearchIndex(copied / "v", "k")
    index.update(embedder, path)
    (copied / "v" / "0.mp4").unlink()
    write_video(copied / "v" / "2.mp4", 33, first=2)
    index = SearchIndex.load(path, copied / "v", "k")
    index.update(embedder, path)
    anew = SearchIndex(copied / "v", "k")
    anew.update(embedder, copied / "j")
    query = embedder.texts(["x"])[0]
    ours, theirs = index.search(query, 9), anew.search(query, 9)
    assert [hit.window for hit in ours] == [hit.window for hit in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert a.score == pytest.approx(b.score, abs=1e-5)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.sources: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes) -> None:
        self.tags.append(tag)
        values = dict(attributes)
        self.links += [values["href"]] if tag == "a" else []
        self.sources += [values[k] for k in ("src", "srcset") if k in values]
        if tag in ("script", "link", "iframe"):
            raise AssertionError(f"the page is not self-contained: {tag}")


def test_page_shows_frames_and_times_and_nothing_from_outside(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = copied / "out" / "page.html"
    assert search(copied, "<b>fridge</b> & co", "two", "--html", page, "--top", "3") == 0
    told = capsys.readouterr().out
    assert "answered in" in told and "page in" in told
    text = page.read_text()
    found = Page(text)
    assert len(found.sources) == 2 * 3 * 3  # queries, hits, frames
    assert all(source.startswith("data:image/jpeg;base64,") for source in found.sources)
    assert "b" not in found.tags and "&lt;b&gt;fridge" in text
    assert len(found.links) == 6
    assert all(re.match(r"file:///.*\.mp4#t=[\d.]+,[\d.]+$", link) for link in found.links)
    assert "bad.mp4" in text and "http" not in text


def test_page_says_where_a_video_has_gone(tmp_path: Path) -> None:
    hit = Hit(Window(tmp_path / "gone.mp4", 0.0, 2.0), 0.5)
    text = search_page([Answer("q", [hit])], tmp_path, "", [], 1)
    assert "No such file" in text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0, "0:00.0"), (9.96, "0:10.0"), (73.25, "1:13.2"), (59.97, "1:00.0"), (3673, "1:01:13.0")],
)
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_a_damaged_index_is_named(library: Path, tmp_path: Path) -> None:
    (tmp_path / "part-1.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"part-1\.safetensors is no part of .*remove it"):
        SearchIndex.load(tmp_path, library, "k")
    with pytest.raises(ValueError, match="is a file; name a folder"):
        SearchIndex.load(tmp_path / "part-1.safetensors", library, "k")


def test_mistakes_are_one_line(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in [
        (["q", "--top", "0"], "at least one"),
        (["q", "--template", "C does"], "no {} for the query"),
        (["--html", "x.html"], "needs a query"),
        (["q", "--index", "/proc/x/i"], "cannot be written"),
    ]:
        assert search(copied, *words) == 2
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, error
    read = ["--checkpoint", str(copied / "m1.pt"), "--config", str(copied / "m.json")]
    assert main(["search", "q", "--videos", str(copied / "nowhere"), *read]) == 2
    assert "is no folder" in capsys.readouterr().err
    for path in (copied / "v").rglob("*.mp4"):
        path.write_bytes(b"x")
    assert search(copied, "q") == 2
    assert "could be read" in capsys.readouterr().err
