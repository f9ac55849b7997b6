"""What a training step asks of a GPU and its network, counted on fake CUDA tensors.

The count runs in a process of its own: PyTorch looks for CUDA once, at its import.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("steps.py")
PAGE = ROOT / "docs" / "performance.md"
# losses that ask for class ids; the one whose texts go round; false captions beside the true
EGO_NCE = ("pretrain/egovlp_base_egoclip", "pretrain/eva02_at_base_egoclip_egonce_plus_plus")
SIGLIP, LAMB = "pretrain/eva02_at_base_egoclip_siglip", "charades_ego/"
pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="needs g++: a CPU build has to be told that CUDA is there"
)


@pytest.fixture(scope="module")
def count(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """Run the count with the given words; once for the same words."""
    known: dict[tuple[str, ...], dict[str, Any]] = {}

    def run(*words: str) -> dict[str, Any]:
        if words not in known:
            path = tmp_path_factory.mktemp("count") / "counted.json"
            command = [sys.executable, str(PROGRAM), "--json", str(path), *words]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            known[words] = json.loads(path.read_text())
        return known[words]

    return run


@pytest.fixture(scope="module")
def counted(count: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """A recipe of each kind as the first and the last of 8 ranks, and the planted faults."""
    return count("--ranks", "8", "--last", "--plant")


def check_step(step: dict[str, Any]) -> None:
    """No wait between two logs, bf16 throughout, fp32 gradients, repeatable if asked."""
    recipe = step["recipe"]
    waits = 0
    if recipe in EGO_NCE and step["ranks"] > 1:
        waits = 2  # the widths of class ids go out, and everybody's are read
    if recipe.startswith(LAMB):
        waits = 1  # whether the gradients are finite
    assert sum(step["waits"].values()) == waits, step["waits"]
    text = 768 if "large" in recipe else 512
    table_lookup = {f"forward (4, 32, {text}) fp32": 2, f"backward (4, 32, {text}) fp32": 1}
    texts_are_pairs = not recipe.startswith("recognition/") and recipe != EGO_NCE[1]
    wide = table_lookup if texts_are_pairs else {}
    assert step["wide_fp32"] == wide
    assert step["gradients"] == ["torch.float32"]
    assert step["not_repeatable"] == {}
    calls = [(c["phase"], c["name"]) for c in step["collectives"]]
    expected = [("forward", "allgather"), ("forward", "allreduce"), ("backward", "reduce_scatter")]
    if step["ranks"] == 1 or recipe.startswith("recognition/"):
        expected = []
    elif recipe == SIGLIP:
        hop = [("forward", "send"), ("forward", "recv")]
        expected = [*hop * step["ranks"], ("forward", "allreduce")]
    elif recipe in EGO_NCE:
        expected = [("forward", "allgather")] * 2 + expected
    elif not recipe.startswith("pretrain/"):
        expected = [("forward", "allgather"), *expected]
    assert calls == expected


def test_a_step_of_each_kind(counted: dict[str, Any]) -> None:
    first = [step for step in counted["steps"] if step["rank"] == 0]
    assert len(first) == 6
    for step in first:
        check_step(step)


def test_muons_step_waits_to_hear_whether_gradients_are_finite(counted: dict[str, Any]) -> None:
    ((place, times),) = counted["muon"]["waits"].items()
    assert place.startswith("health.py") and times == 1
    check_step(counted["muon"] | {"waits": {}})


def test_the_order_of_collectives_is_that_of_every_rank(counted: dict[str, Any]) -> None:
    by_recipe: dict[str, list[Any]] = {}
    for step in counted["steps"]:
        by_recipe.setdefault(step["recipe"], []).append(step["collectives"])
    assert all(len(ranks) == 2 and ranks[0] == ranks[1] for ranks in by_recipe.values())


def test_nothing_has_grown_beyond_what_the_page_says(counted: dict[str, Any]) -> None:
    from cuda_without_gpu.kinds import KINDS

    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.read_text().splitlines()
        if line.startswith("|")
    ]
    told = {(row[0], row[1]): row[2:] for row in rows if len(row) == 5}
    for step in (s for s in counted["steps"] if s["rank"] == 0):
        kind = KINDS.get(step["recipe"]) or KINDS[step["recipe"].split("/")[1]]
        waits, calls, sent = told[kind, "8"]
        assert sum(step["waits"].values()) <= int(waits)
        assert len(step["collectives"]) <= sum(map(int, calls.split("+")))
        assert sum(c["sent"] for c in step["collectives"]) <= int(sent.replace(",", ""))
    models = {row[0]: row[1:] for row in rows if len(row) == 3}
    for model, cost in counted["forward"].items():
        saved, casts = models[model]
        assert cost["saved_mib"] <= float(saved.removesuffix(" MiB")) + 0.05
        assert cost["casts"] <= int(casts)


@pytest.mark.parametrize(
    ("plant", "problem"),
    [
        ("a tensor on the CPU", "Expected all tensors to be on the same device"),
        ("a collective on the CPU", "allreduce of a tensor on cpu on the default group"),
    ],
)
def test_a_planted_device_ends_the_step(counted: dict[str, Any], plant: str, problem: str) -> None:
    assert problem in counted["plants"][plant]


@pytest.mark.parametrize("plant", ["a read", "float32", "a collective of one rank"])
def test_a_planted_fault_is_counted(counted: dict[str, Any], plant: str) -> None:
    """The checks above go red, each for its own fault."""
    step = counted["plants"][plant]
    with pytest.raises(AssertionError):
        check_step(step)
    clean = next(s for s in counted["steps"] if s["recipe"] == step["recipe"])
    keys = ("waits", "wide_fp32", "gradients", "not_repeatable", "collectives")
    changed = [key for key in keys if step[key] != clean[key]]
    named = {"a read": "waits", "float32": "wide_fp32", "a collective of one rank": "collectives"}
    assert changed == [named[plant]]


def test_what_is_offloaded_goes_to_the_gpu_for_the_network(counted: dict[str, Any]) -> None:
    told = counted["offloaded"]
    assert told["lamb"] == told["average"] == "result on cpu, 1 collective"
    assert "takes CUDA tensors only" in told["unguarded"]


@pytest.mark.slow
def test_every_recipe_on_any_number_of_ranks(count: Callable[..., dict[str, Any]]) -> None:
    steps = count("--all", "--ranks", "1", "8", "64", "512")["steps"]
    assert len(steps) == 4 * len({step["recipe"] for step in steps}) >= 4 * 21
    for step in steps:
        check_step(step)
