"""Change the code in one place at a time and see whether a test goes red: `make mutants`.

    python .ci/mutants.py [ROOM ...]     losses, metrics, order, checkpoints, kernels

mutmut makes the mutants and runs the tests that reach each one, in a copy under build/mutants, and
goes on where it was stopped. What runs only in processes of its own (ranks) it cannot trace: those
mutants are tried here, against all tests of the room. The report, by file, is at the end; a
survivor is a test that is missing, or a change that makes no difference.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("kernels", "datamodules", "lightning_modules")
COPIED = (*PACKAGES, "tests", "configs", "slurm", "docs", "pyproject.toml", "README.md", "Makefile")
# room -> (what is changed, the tests that should notice)
ROOMS = {
    "losses": (["lightning_modules/losses/*.py"], ["tests/losses"]),
    "metrics": (["lightning_modules/metrics/*.py"], ["tests/metrics"]),
    "order": (
        ["datamodules/stream/order.py"],
        ["tests/data/test_order.py", "tests/data/test_prefetch.py"],
    ),
    "checkpoints": (
        ["lightning_modules/checkpoints/*.py"],
        [
            "tests/checkpoints",
            "tests/inference/test_convert.py",
            "tests/sharing",
            "tests/evaluation/test_rerank.py",
            "tests/evaluation/test_reranker_files.py",
        ],
    ),
    "kernels": (
        # what runs without a GPU; Triton's and C's own text is out of reach
        [
            f"kernels/{name}.py"
            for name in ("st_rope", "attention", "rotation", "gated_norm", "norm")
        ],
        [
            f"tests/kernels/test_{name}.py"
            for name in ("tables", "rotation", "gated_norm", "norm", "attention", "doors")
        ],
    ),
}
# what starts processes is tried on those that survive the rest
SLOW = {"checkpoints": ["tests/inference/test_convert_zero.py"]}
# torch.compile cannot trace mutmut's calls; its forked children wait for a second thread for ever;
# the others start processes for what is tested beside
_LEFT_OUT = "not one_graph and not threads and not two_ranks_are_one and not read_by_the_mixin"
PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "-k", _LEFT_OUT]
SKIPPED, SURVIVED, UNTRIED = "no tests", "survived", "not checked"


def prepare(room: str) -> Path:
    """The room's copy of the repository, with mutmut's settings for it."""
    folder = ROOT / "build" / "mutants" / room
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        source, target = ROOT / name, folder / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=ignore)
        else:
            shutil.copy(source, target)
    for name in PACKAGES:  # what is no Python, mutmut copies once and never anew
        copied = folder / "mutants" / name
        if copied.is_dir():
            ignore = shutil.ignore_patterns("*.py", "__pycache__")
            shutil.copytree(ROOT / name, copied, dirs_exist_ok=True, ignore=ignore)
    changed, tests = ROOMS[room]
    settings = {
        "source_paths": list(PACKAGES),
        "only_mutate": changed,
        "pytest_add_cli_args_test_selection": tests,
        "pytest_add_cli_args": PYTEST,
        "also_copy": ["configs", "slurm", "docs"],
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
    with (folder / "pyproject.toml").open("a") as file:
        file.write("\n".join(["", "[tool.mutmut]", *lines, ""]))
    return folder


def mutmut(folder: Path, *words: str) -> str:
    """Run mutmut in a room's copy, one thread a process; returns what it printed.

    Raises:
        SystemExit: It failed: the tests are red without any mutant, most likely.
    """
    command = [sys.executable, "-m", "mutmut", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    if run.returncode:
        sys.exit(f"{run.stdout[-4000:]}\nmutmut {' '.join(words)} failed in {folder}")
    return run.stdout


def results(folder: Path) -> dict[str, str]:
    """Mutant -> what became of it."""
    lines = mutmut(folder, "results", "--all", "true").splitlines()
    pairs = (line.strip().rpartition(": ") for line in lines if "__mutmut_" in line)
    return {name: outcome for name, _, outcome in pairs}


def try_apart(folder: Path, name: str, tests: list[str]) -> str:
    """Run tests on one mutant, in processes that know of it from the start."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MUTANT_UNDER_TEST": name}
    command = [sys.executable, "-m", "pytest", *PYTEST, *tests]
    try:
        run = subprocess.run(
            command, cwd=folder / "mutants", env=environment, capture_output=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        return "timeout"
    return SURVIVED if run.returncode == 0 else "killed"


def try_rest(folder: Path, room: str, outcomes: dict[str, str]) -> dict[str, str]:
    """What becomes of mutants that mutmut could not trace, or that survived it.

    Raises:
        SystemExit: The tests are red without any mutant: they would notice each.
    """
    ledger = folder / "apart.json"
    apart = json.loads(ledger.read_text()) if ledger.is_file() else {}
    green: list[list[str]] = []
    for name, outcome in outcomes.items():
        tests = ROOMS[room][1] if outcome == SKIPPED else []
        tests = tests + (SLOW.get(room, []) if outcome in (SKIPPED, SURVIVED) else [])
        if tests and name not in apart:
            if tests not in green:
                if try_apart(folder, "", tests) != SURVIVED:
                    sys.exit(f"red without any mutant in {folder / 'mutants'}: {' '.join(tests)}")
                green.append(tests)
            apart[name] = try_apart(folder, name, tests)
            ledger.write_text(json.dumps(apart, indent=1))
    return {name: apart.get(name, outcome) for name, outcome in outcomes.items()}


def module_of(name: str) -> str:
    """`a.b.xǁCǁf__mutmut_1` -> `a/b.py`."""
    return name.rpartition(".")[0].replace(".", "/") + ".py"


def main(rooms: list[str]) -> int:
    """Try the rooms' mutants and report; 1 where some were not tried."""
    whole = True
    for room in rooms or list(ROOMS):
        folder = prepare(room)
        mutmut(folder, "run")
        outcomes = try_rest(folder, room, results(folder))
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for name, outcome in outcomes.items():
            counts[module_of(name)][outcome] += 1
        for path, found in sorted(counts.items()):
            untried, alive = found[UNTRIED], found[SURVIVED]
            tried = found.total() - untried
            whole = whole and not untried
            share = f"{alive / tried:.1%}" if tried else "-"
            told = f", {found['timeout']} ran out of time" if found["timeout"] else ""
            told += f", {untried} NOT TRIED" if untried else ""
            print(f"{path:<55}{tried:>6} mutants{alive:>5} survive ({share}){told}")
        print("".join(f"  {n}\n" for n, o in outcomes.items() if o == SURVIVED), end="")
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
