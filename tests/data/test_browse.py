"""The page of a set of shards: every sample asked for, every complaint, nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from browser_page import check_page, needs_browser
from conftest import FAST, write_video

from datamodules.manifest import ClipRecord, Manifest
from datamodules.shards import LAYOUTS, build_shards
from lightning_modules.cli.main import main
from lightning_modules.pages.shards import browse_shards, read_samples


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Ten clips in three shards, one clip rejected, a text that is markup."""
    write_video(tmp_path / "v" / "v.mp4", seconds=6.0)
    records = [
        ClipRecord(f"v_{k}", "v", 0.5 * k, 0.5 * k + 0.8, (f"<b>thing</b> & {k}",), (k % 2,), (k,))
        for k in range(10)
    ]
    records.append(ClipRecord("gone_0", "gone", 0.0, 1.0, ("nothing",), (0,), (0,)))
    build_shards(
        records,
        videos=tmp_path / "v",
        layout=LAYOUTS["whole"],
        output=tmp_path / "shards",
        options=FAST,
        samples_per_shard=4,
        num_workers=1,
        max_rejects=0.5,
    )
    return tmp_path / "shards"


def test_the_page_holds_what_is_asked_for(shards: Path, capsys) -> None:
    target = shards.parent / "page.html"
    assert main(["shards", "browse", str(shards), "--html", str(target)]) == 0
    text = target.read_text()
    assert text.count("<article") == 10 and text.count("data:image/jpeg;base64,") == 30
    assert "&lt;b&gt;thing&lt;/b&gt; &amp; 3" in text and "<b>thing" not in text
    assert "gone_0" in text and "1 clips were rejected" in text
    links = set(re.findall(r'href="#([\w-]+)"', text))
    assert links <= set(re.findall(r'id="([\w-]+)"', text)) and len(links) == 11
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    assert main(["shards", "browse", str(shards), "--html", str(target), "--samples", "0"]) == 2


def test_samples_are_spread_over_the_whole_set(shards: Path) -> None:
    manifest = Manifest.load(str(shards))
    samples = read_samples(manifest, 4, 1)
    shown = [sample.record.clip_id for sample in samples if sample.record]
    assert shown == ["v_0", "v_3", "v_6", "v_9"]


def test_damage_is_shown_where_it_is(shards: Path) -> None:
    manifest = Manifest.load(str(shards))
    tar = shards / manifest.shards[0].name
    place = manifest.load_index(0).rows[1]
    data = bytearray(tar.read_bytes())
    data[int(place["video_offset"]) + 50] ^= 1
    tar.write_bytes(data)
    text = browse_shards(manifest, 10, 1)
    assert text.count("data:image/jpeg;base64,") == 27
    assert "1 of the 10 samples looked at cannot be used" in text
    assert re.search(r'href="#sample-0-1">v_1</a>: checksum', text)


@needs_browser
def test_the_page_in_a_browser(shards: Path) -> None:
    page = shards.parent / "shards.html"
    page.write_text(browse_shards(Manifest.load(str(shards)), 10, 1), encoding="utf-8")
    check_page(page)
