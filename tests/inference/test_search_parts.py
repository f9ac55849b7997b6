"""An index that grows in parts, against one made anew, over random changes of a folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch.nn.functional import normalize

from datamodules.video.windows import Window
from lightning_modules.inference import search_index
from lightning_modules.inference.calibration import BANK, Background, Moments
from lightning_modules.inference.embedding import Embedded
from lightning_modules.inference.search_index import SearchIndex

WIDTH = 8


def vector(text: str) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)), dim=0)


class ContentEmbedder:
    """Embeds by a file's content: as many windows as it has bytes. Stands for model and decoder,
    which are not what is tested here; counts what it reads."""

    def __init__(self) -> None:
        self.read: list[str] = []

    def texts(self, texts):
        return torch.stack([vector(text) for text in texts])

    def windows_of(self, videos):
        return [Window(v, float(k), k + 1.0) for v in videos for k in range(len(v.read_text()))], []

    def windows(self, windows):
        self.read += {window.video.name: None for window in windows}
        rows = [vector(f"{w.video.read_text()} {w.start_s}") for w in windows]
        return Embedded(list(windows), torch.stack(rows) if rows else torch.empty(0, WIDTH))


NAMES = st.sampled_from(["a.mp4", "b.mp4", "c.mp4", "d.mp4"])
CONTENTS = st.sampled_from(["x", "yy", "zzz", ""])


class GrowingIndex(RuleBasedStateMachine):
    """Videos come, change, go and come back; the process ends and starts; parts are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.folder = self.root / "v"
        self.folder.mkdir()
        (self.folder / "always.mp4").write_text("w")
        self.index = SearchIndex(self.folder, "k")
        self.clock = 1
        self.past: dict[str, list[tuple[str, int]]] = {}
        self.joined, search_index._MOST_SMALL = search_index._MOST_SMALL, 1

    def teardown(self) -> None:
        search_index._MOST_SMALL = self.joined
        shutil.rmtree(self.root)

    def put(self, name: str, content: str, mtime: int) -> None:
        path = self.folder / name
        path.write_text(content)
        os.utime(path, ns=(mtime, mtime))
        self.past.setdefault(name, []).append((content, mtime))

    @rule(name=NAMES, content=CONTENTS)
    def write(self, name: str, content: str) -> None:
        self.clock += 1
        self.put(name, content, self.clock)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)

    @rule(name=NAMES)
    def restore(self, name: str) -> None:
        """As `cp -p` of a backup does: an earlier content with its time."""
        if self.past.get(name):
            self.put(name, *self.past[name][0])

    @rule()
    def start_anew(self) -> None:
        self.index = SearchIndex.load(self.root / "i", self.folder, "k")

    @rule()
    def update(self) -> None:
        embedder = ContentEmbedder()
        self.index.update(embedder, self.root / "i")
        again = ContentEmbedder()
        assert self.index.update(again, self.root / "i") == 0 and again.read == []
        anew = SearchIndex(self.folder, "k")
        anew.update(ContentEmbedder(), self.root / "anew")
        query = vector("query")
        found, wanted = (
            {(hit.window.video.name, hit.window.start_s): hit for hit in i.search(query, 99)}
            for i in (self.index, anew)
        )
        assert found.keys() == wanted.keys()
        for key, hit in found.items():
            assert hit.score == pytest.approx(wanted[key].score, abs=1e-6)
            assert hit.z == pytest.approx(wanted[key].z, abs=1e-3)
        assert len(self.index) == len(anew)
        assert {v.path for v in self.index.videos} == {v.path for v in anew.videos}
        shutil.rmtree(self.root / "anew")

    @invariant()
    def there_are_few_parts(self) -> None:
        assert len(list((self.root / "i").glob("*"))) <= 2


TestGrowingIndex = GrowingIndex.TestCase
TestGrowingIndex.settings = settings(max_examples=25, stateful_step_count=15, deadline=None)


def test_what_is_there_is_not_written_again(tmp_path: Path) -> None:
    folder, path = tmp_path / "v", tmp_path / "i"
    folder.mkdir()
    (folder / "a.mp4").write_text("xyz")
    SearchIndex(folder, "k").update(ContentEmbedder(), path)
    (first,) = path.iterdir()
    before = first.stat()
    (folder / "b.mp4").write_text("abc")
    embedder = ContentEmbedder()
    SearchIndex.load(path, folder, "k").update(embedder, path)
    assert embedder.read == ["b.mp4"] and len(list(path.iterdir())) == 2
    assert (first.stat().st_mtime_ns, first.stat().st_ino) == (before.st_mtime_ns, before.st_ino)


def test_the_background_of_parts_is_that_of_all_rows() -> None:
    bank, rows = normalize(torch.randn(9, 5), dim=1), normalize(torch.randn(40, 5), dim=1)
    whole = Background.of(bank, [rows])
    parts = Background.joined([Background.of(bank, [rows[:13]]), Background.of(bank, [rows[13:]])])
    scores = (bank @ rows.T).double()
    wanted = ((scores.amax(1) - scores.mean(1)) / scores.std(1, correction=0)).sort().values
    torch.testing.assert_close(whole.best_z(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.best_z(), wanted, rtol=1e-6, atol=1e-6)
    assert whole.surer_than(float(wanted[4]) + 1e-9) == pytest.approx(5 / 9)
    assert Background.joined([]) is None


def test_z_is_the_textbooks() -> None:
    scores = torch.randn(100)
    moments = Moments()
    moments.add(scores[:30])
    moments.add(scores[30:])
    wanted = (2.0 - float(scores.mean())) / float(scores.std(correction=0))
    assert moments.z(2.0) == pytest.approx(wanted, rel=1e-5)
    assert Moments().z(1.0) == 0.0


def test_a_sentence_that_fits_is_surer_than_one_with_a_higher_cosine() -> None:
    """The case that a bare cosine gets wrong: a query that is near everything, and one that is
    near one window alone."""
    torch.manual_seed(0)
    common = torch.zeros(64)
    common[0] = 1.0
    rows = normalize(0.8 * common + 0.6 * normalize(torch.randn(500, 64), dim=1), dim=1)
    near_all = normalize(common + 0.05 * torch.randn(64), dim=0)
    fits = normalize(rows[7] - 0.6 * common, dim=0)
    bank = normalize(0.5 * common + 0.12 * torch.randn(len(BANK), 64), dim=1)
    background = Background.of(bank, [rows])

    def best(query: torch.Tensor) -> tuple[float, float]:
        moments = Moments()
        moments.add(rows @ query)
        score = float((rows @ query).max())
        return score, background.surer_than(moments.z(score))

    assert best(near_all)[0] > best(fits)[0]
    assert best(fits)[1] == 1.0 and best(near_all)[1] < 0.95
