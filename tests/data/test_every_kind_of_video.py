"""Every kind of video through every path: the right picture in the right colours, or the reason."""

from __future__ import annotations

from pathlib import Path

import pytest
from video_table import KINDS, PATHS, Result, indexed
from videos_of_every_kind import Made


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    folder = tmp_path_factory.mktemp("videos")
    return {kind.name: kind.write(folder) for kind in KINDS}


@pytest.fixture(scope="module")
def in_place(
    videos: dict[str, Made], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Result]:
    return indexed(list(videos.values()), Path(tmp_path_factory.mktemp("tars")))


@pytest.mark.parametrize("name", [kind.name for kind in KINDS])
def test_a_video_is_right_on_every_path_or_refused_with_the_reason(name, videos, in_place) -> None:
    made = videos[name]
    results = {label: path(made) for label, path in PATHS.items()}
    results["--index-only, fit"] = in_place[name]
    wrong = {label: result for label, result in results.items() if result.wrong(made)}
    assert not wrong, wrong
    if made.kind.refused:
        assert all(result.reason for result in results.values())
