"""The demo's report renders from what may be incomplete, shows every figure and loads nothing."""

from __future__ import annotations

import base64
import copy
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser_page import check_page, needs_browser
from PIL import Image

from lightning_modules.demo.report import DemoResults, gallery_rows, write_report
from lightning_modules.demo.report.charts import read_series, smooth, ticks
from lightning_modules.demo.report.matrices import class_key, matrix_picture
from lightning_modules.demo.report.words import changes
from lightning_modules.demo.world.vocabulary import NOUNS, VERBS, imperative

VOID = {"meta", "img", "link", "br", "input"}
SECTIONS = (
    "retrieval",
    "accuracy",
    "unseen",
    "training",
    "similarity",
    "gallery",
    "speed",
    "setup",
    "configuration",
)
METRICS: dict[str, Any] = {
    "seed": 7,
    "random": {
        "map": {"v2t": 9.11, "t2v": 10.12, "avg": 9.615},
        "ndcg": {"v2t": 21.13, "t2v": 22.14, "avg": 21.635},
    },
    "zero_shot": {
        "map": {"v2t": 19.21, "t2v": 20.22, "avg": 19.715},
        "ndcg": {"v2t": 31.23, "t2v": 32.24, "avg": 31.735},
    },
    "fine_tuned": {
        "map": {"v2t": 59.31, "t2v": 60.32, "avg": 59.815},
        "ndcg": {"v2t": 71.33, "t2v": 72.34, "avg": 71.835},
    },
    "verb_accuracy": {
        "chance": 12.5, "zero_shot": 33.7, "fine_tuned": 81.9, "fine_tuned_shuffled_frames": 41.6,
    },
    "noun_accuracy": {
        "chance": 8.3, "zero_shot": 55.4, "fine_tuned": 93.2, "fine_tuned_shuffled_frames": 92.8,
    },
    "unseen_pairs": {"num_clips": 53, "verb_accuracy": 74.4, "noun_accuracy": 88.6},
    "seconds": {
        "videos": 38.4, "shards": 9.3, "pretrain": 187.2, "zero_shot": 4.4, "fine_tune": 143.9,
        "evaluate": 6.1, "total": 389.3,
    },
    "clips_per_second": {"pretrain": 61.57, "fine_tune": 66.73},
    "data": {"pretrain_clips": 2400, "train_clips": 1200, "test_clips": 288, "test_sentences": 96},
    "model": {"preset": "tiny", "parameters": 1234567},
    "versions": {"torch": "2.13.0+cpu"},
    "machine": "2 cores",
}  # fmt: skip
NUMBERS = (
    "59.8&thinsp;%", "71.8&thinsp;%", "81.9&thinsp;%", "41.6 %", "6.2× random", "2.1× random",
    "9.11", "10.12", "20.22", "60.32", "72.34", "12.5 %", "33.7 %", "93.2 %", "92.8 %", "74.4 %",
    "88.6 %", "53 test clips", "Fine-tuning raised mAP 19.7 to 59.8 %", "6 min 29 s",
    "3 min 07 s", "9.3 s", "61.6 clips/s", "2,400",
    "1,234,567", "2.13.0+cpu", "2 cores", "Seed 7",
)  # fmt: skip


class Checker(HTMLParser):
    """Collects resource links and ids; an end tag that closes nothing is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, content in attrs:
            if name == "id":
                self.ids.append(content or "")
            if name in ("src", "href", "srcset", "xlink:href", "data"):
                self.links.append(content or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> at {self.getpos()}"


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def small_results(folder: Path) -> DemoResults:
    rng = np.random.default_rng(0)
    texts = [imperative(verb, (noun,)) for verb in range(len(VERBS)) for noun in range(12)]
    pairs = np.array([class_key(text)[0] for text in texts])
    nouns = np.array([class_key(text)[1][0] for text in texts])
    relevance = 0.5 * (pairs[:, None] == pairs) + 0.5 * (nouns[:, None] == nouns)
    similarity = relevance + 0.3 * rng.standard_normal(relevance.shape)
    shown = {clip for _, clips in gallery_rows(similarity, relevance) for clip in clips}
    logs = folder / "pretrain.csv", folder / "fine_tune.csv"
    logs[0].write_text("step,train/loss\n" + "".join(f"{s},{9 - s / 20}\n" for s in range(80)))
    logs[1].write_text(
        "step,train/loss,lr,val/map_avg\n0,3.5,1e-3,\n1,nan,1e-3,\n2,inf,,\n3,None,,\n4,,,44.4\n"
        "5,2.5,1e-3,\n9,,,55.5\n10,2.25,1e-3,\n11,2."
    )
    return DemoResults(
        metrics=copy.deepcopy(METRICS),
        pretrain_log=logs[0],
        fine_tune_log=logs[1],
        similarity=similarity.astype(np.float32),
        relevance=relevance.astype(np.float32),
        narrations=texts,
        sentences=list(texts),
        frames={clip: rng.integers(0, 255, (6, 24, 32, 3), dtype=np.uint8) for clip in shown},
        configs={"pretrain": "trainer:\n  max_steps: 300\n"},
    )


@pytest.fixture
def results(tmp_path: Path) -> DemoResults:
    return small_results(tmp_path)


def rendered(results: DemoResults, folder: Path) -> str:
    write_report(results, folder / "new" / "report.html")
    return (folder / "new" / "report.html").read_text(encoding="utf-8")


def test_every_section_and_figure_is_there(results: DemoResults, tmp_path: Path) -> None:
    page = rendered(results, tmp_path)
    checker = checked(page)
    assert tuple(checker.ids) == SECTIONS
    assert [number for number in NUMBERS if number not in page] == []
    assert checker.tags.count("polyline") == 5  # two losses, raw and smoothed, and validation
    assert "max_steps: 300" in page


def test_a_loss_is_told_like_a_gain() -> None:
    worse = METRICS | {"noun_accuracy": METRICS["noun_accuracy"] | {"fine_tuned": 40.25}}
    parts = {"colour": {"zero_shot": 90.0, "fine_tuned": 90.0}, "object": {"zero_shot": 62.8}}
    told = changes(worse | {"noun_parts": parts})
    assert told == [
        "Fine-tuning raised mAP 19.7 to 59.8 %, nDCG 31.7 to 71.8 % and verbs 33.7 to 81.9 %.",
        "It lowered nouns 55.4 to 40.2 %; docs/demo.md says what was tried about it.",
        "Verbs fall from 81.9 to 41.6 % when frames are shuffled; a model that reads nothing from "
        "their order falls by nothing.",
    ]
    assert len(changes(METRICS)) == 2 and changes({}) == []
    assert changes({"verb_accuracy": {"zero_shot": float("nan"), "fine_tuned": 1.0}}) == []


def test_nothing_is_loaded_from_elsewhere(results: DemoResults, tmp_path: Path) -> None:
    page = rendered(results, tmp_path)
    checker = checked(page)
    assert checker.links and all(link.startswith("data:image/") for link in checker.links)
    assert not {"script", "link", "iframe"} & set(checker.tags)
    assert not re.search(r"https?://|@import|url\(", page)


def test_gallery_shows_frames_from_first_to_last(results: DemoResults, tmp_path: Path) -> None:
    grey = np.repeat(np.arange(6, dtype=np.uint8)[:, None, None, None] * 40, 3, axis=3)
    frames = np.broadcast_to(grey, (6, 24, 32, 3))
    sentence, (clip, *_) = gallery_rows(results.similarity, results.relevance)[0]
    page = rendered(dataclasses.replace(results, frames={clip: frames}), tmp_path)
    strip = re.findall(r'data:image/jpeg;base64,([^"]+)', page)[:4]
    pictures = [Image.open(io.BytesIO(base64.b64decode(frame))).convert("L") for frame in strip]
    centres = [picture.getpixel((16, 12)) for picture in pictures]
    assert centres == pytest.approx([0, 80, 120, 200], abs=6)  # JPEG's error
    hits = re.findall(r"relevance (\d\.\d\d)", page)
    best = results.relevance[clip, sentence]
    assert len(hits) == 30 and hits[0] == f"{best:.2f}"
    assert "no frames" in page  # of the other clips


def test_missing_parts_are_left_out_or_dashes(results: DemoResults, tmp_path: Path) -> None:
    metrics = {"fine_tuned": {"map": {"avg": float("nan")}}, "seconds": {"pretrain": None}}
    results.fine_tune_log.write_text("step,train/loss\n0,nan\n1,\n")
    results.similarity[0, 0] = np.nan
    page = rendered(dataclasses.replace(results, metrics=metrics), tmp_path)
    checker = checked(page)
    assert tuple(checker.ids) == tuple(name for name in SECTIONS if name != "unseen")
    assert "The log has no values." in page
    assert "Validation mAP" not in page
    assert not re.search(r"\bnan\b|\bNone\b|\binf\b", re.sub(r'base64,[^"]+', "", page))


def test_text_is_escaped(results: DemoResults, tmp_path: Path) -> None:
    evil = "<script>alert(\"x\") & 'y'</script>"
    metrics = {**results.metrics, "machine": evil, "versions": {evil: evil}}
    changed = dataclasses.replace(
        results,
        metrics=metrics,
        narrations=[evil] * len(results.narrations),
        sentences=[evil] * len(results.sentences),
        configs={evil: evil},
    )
    page = rendered(changed, tmp_path)
    assert "script" not in checked(page).tags
    assert page.count("&lt;script&gt;alert(") >= 6 + 30 + 2  # queries, hits, configuration


def test_shapes_must_agree(results: DemoResults) -> None:
    with pytest.raises(ValueError, match=r"similarity has shape \(96, 95\).*must be \(96, 96\)"):
        dataclasses.replace(results, similarity=results.similarity[:, :-1])


def test_a_log_that_is_missing_is_an_error(results: DemoResults, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"gone\.csv"):
        rendered(dataclasses.replace(results, pretrain_log=tmp_path / "gone.csv"), tmp_path)


def test_queries_differ_in_verb_and_do_not_depend_on_success(results: DemoResults) -> None:
    rows = gallery_rows(results.similarity, results.relevance, num_queries=8, top=3)
    verbs = [class_key(results.sentences[sentence])[0] for sentence, _ in rows]
    assert sorted(verbs) == list(range(8))
    for sentence, clips in rows:
        column = results.similarity[:, sentence]
        assert clips == sorted(range(96), key=lambda clip: -column[clip])[:3]
    worse = gallery_rows(-results.similarity, results.relevance, num_queries=8, top=3)
    assert [sentence for sentence, _ in worse] == [sentence for sentence, _ in rows]
    other = gallery_rows(results.similarity, results.relevance, num_queries=8, seed=1)
    assert [sentence for sentence, _ in other] != [sentence for sentence, _ in rows]
    assert len(gallery_rows(results.similarity, results.relevance, num_queries=99)) == 96


def test_log_cells_that_are_no_numbers_are_left_out(results: DemoResults) -> None:
    assert read_series(results.fine_tune_log, "train/loss") == ([0, 5, 10, 11], [3.5, 2.5, 2.25, 2])
    assert read_series(results.fine_tune_log, "val/map_avg") == ([4, 9], [44.4, 55.5])
    assert read_series(results.fine_tune_log, "absent") == ([], [])


def test_smoothing_is_a_centred_mean() -> None:
    values = np.random.default_rng(0).standard_normal(90).tolist()
    smoothed, window = smooth(values)
    assert window == 5
    expected = [np.mean(values[max(0, i - 2) : i + 3]) for i in range(90)]
    assert smoothed == pytest.approx(expected)
    assert smooth([3.0]) == ([3.0], 1)


@pytest.mark.parametrize("span", [(0, 1), (2.2, 6.9), (5, 5), (0, 0), (-3, 1e4), (0.011, 0.012)])
def test_ticks_span_the_values(span: tuple[float, float]) -> None:
    marks = ticks(*span)
    assert marks[0] <= span[0] and marks[-1] >= span[1]
    assert 2 <= len(marks) <= 7


def test_classes_are_read_from_sentences() -> None:
    for verb in range(len(VERBS)):
        for noun in range(len(NOUNS)):
            other = (noun + 5) % len(NOUNS)
            assert class_key(imperative(verb, (noun,))) == (verb, [noun])
            assert class_key(imperative(verb, (noun, other))) == (verb, [noun, other])
    assert class_key("stir the soup") == (len(VERBS), [])


def test_matrix_is_sorted_by_verb_on_both_sides() -> None:
    rows = [imperative(verb, (0,)) for verb in (6, 1, 3)]
    columns = [imperative(verb, (0,)) for verb in (3, 6, 1)]
    equal = np.array([[r == c for c in columns] for r in rows], dtype=np.float32)
    svg = matrix_picture(equal, rows, columns, (0.0, 1.0), "matrix")
    assert re.findall(r">([a-z-]+)</text>", svg) == ["close", "put-down", "clockwise"]
    picture = re.search(r"base64,([^\"]+)", svg)
    assert picture is not None
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture[1]))))
    yellow, violet = (253, 231, 37), (68, 1, 84)
    for row in range(3):
        for column in range(3):
            assert tuple(pixels[row, column]) == (yellow if row == column else violet)


@needs_browser
def test_the_report_in_a_browser(results: DemoResults, tmp_path: Path) -> None:
    rendered(results, tmp_path)
    check_page(tmp_path / "new" / "report.html")
