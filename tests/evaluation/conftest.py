"""The small world, once for a test session."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_world import make_world


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> tuple[Path, list, list]:
    """A folder with EK-100's files, shards of their clips and a checkpoint."""
    return make_world(tmp_path_factory.mktemp("world"))
