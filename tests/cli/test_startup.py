"""Imports go on without the garbage collector, and only those."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LOOKS = """
import gc, sys
from lightning_modules.cli.startup import importing

with importing():
    import json.tool  # no torch in it: nothing is set aside
assert gc.isenabled() and gc.get_freeze_count() == 0
try:
    with importing():
        assert not gc.isenabled()
        raise ImportError
except ImportError:
    assert gc.isenabled()
with importing():
    with importing():
        import torch
    assert not gc.isenabled()  # the outer one's to end
assert gc.isenabled() and gc.get_freeze_count() > 100
with importing():
    assert gc.isenabled()  # torch is there: what comes now is a program's own
"""


def test_the_collector_is_off_while_torch_is_imported_and_no_longer(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("rows = [[] for _ in range(1000)]\n")  # at once, not in 3 s
    root = Path(__file__).parents[2]
    paths = {"PYTHONPATH": f"{tmp_path}:{root}", "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", LOOKS], env=paths, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
