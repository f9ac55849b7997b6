"""The Triton kernels, compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kernels.ahead_of_time import (
    CAPABILITIES,
    FORMS,
    Compiled,
    Form,
    compile_form,
    over_budget,
)
from kernels.pages import write_between

GOOD = Compiled(90, Form("rotate q, k", 64, "bf16"), 40, 0, 0, 6, 0)
GOOD_ODD = Compiled(90, Form("rotate q, k", 20, "bf16"), 128, 0, 0, 0, 40)
GOOD_NORM = Compiled(90, Form("gated norm", 2048, "bf16", "bf16"), 128, 0, 8192, 6, 2)
GOOD_ADD_NORM = Compiled(90, Form("add, norm", 768, "bf16", "bf16"), 170, 0, 4096, 6, 8)


def test_every_kernel_compiles_within_budget_for_every_architecture() -> None:
    """In a process of its own: Triton decides at import between interpreter and compiler."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.ahead_of_time", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    rows = [Compiled(**row | {"form": Form(**row["form"])}) for row in json.loads(done.stdout)]
    assert len(rows) == len(CAPABILITIES) * len(FORMS)
    assert {r.capability for r in rows} == {80, 90, 100, 120}
    assert all(r.spill_bytes == 0 for r in rows)
    assert all(r.narrow_accesses == 0 < r.wide_accesses for r in rows if r.form.width == 64)


@pytest.mark.parametrize(
    ("good", "change", "problem"),
    [
        (GOOD, {"spill_bytes": 8}, "spills 8 bytes"),
        (GOOD, {"registers": 65}, "65 registers"),
        (GOOD, {"shared_bytes": 1}, "1 bytes of shared memory"),
        (GOOD, {"narrow_accesses": 1}, "narrower than 128 bits"),
        (GOOD, {"wide_accesses": 0}, "no accesses of 128 bits"),
        (GOOD_ODD, {"registers": 129}, "129 registers"),
        (GOOD_NORM, {"registers": 129}, "129 registers"),
        (GOOD_NORM, {"shared_bytes": 8193}, "8193 bytes of shared memory"),
        (GOOD_NORM, {"narrow_accesses": 3}, "narrower than 128 bits"),
        (GOOD_ADD_NORM, {"registers": 171}, "171 registers"),
        (GOOD_ADD_NORM, {"shared_bytes": 4097}, "4097 bytes of shared memory"),
        (GOOD_ADD_NORM, {"narrow_accesses": 9}, "narrower than 128 bits"),
    ],
)
def test_budgets_can_fail(good: Compiled, change: dict, problem: str) -> None:
    assert over_budget([good]) == []
    (message,) = over_budget([good, replace(good, **change)])
    assert problem in message


def test_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="unset it"):
        compile_form(90, GOOD.form)


def test_table_is_written_between_the_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- begin: kernels.ahead_of_time -->\nold\n<!-- end: kernels.ahead_of_time -->\nb\n"
    )
    write_between(page, "kernels.ahead_of_time", "new")
    assert page.read_text().splitlines() == [
        "a",
        "<!-- begin: kernels.ahead_of_time -->",
        "new",
        "<!-- end: kernels.ahead_of_time -->",
        "b",
    ]
    page.write_text("no markers")
    with pytest.raises(ValueError, match="has no lines"):
        write_between(page, "kernels.ahead_of_time", "new")
