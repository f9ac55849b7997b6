"""The one direction of imports: kernels <- models <- LightningModules <- command line."""

from __future__ import annotations

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OURS = ("kernels", "datamodules", "lightning_modules")

# room -> the rooms it may import, besides itself. The first prefix that matches a module wins.
ALLOWED: dict[str, tuple[str, ...]] = {
    "kernels": (),
    "datamodules.files": (),
    "datamodules.video": (),
    "datamodules.annotations": ("datamodules.manifest",),
    "datamodules.stream": (
        "datamodules.batch",
        "datamodules.files",
        "datamodules.manifest",
        "datamodules.tokenizer",
        "datamodules.video",
    ),
    "datamodules.shards": (
        "datamodules.files",
        "datamodules.manifest",
        "datamodules.stream",
        "datamodules.video",
    ),
    "datamodules": ("datamodules",),
    "lightning_modules.packaged": (),
    "lightning_modules.models": ("kernels",),
    "lightning_modules.collectives": (),
    "lightning_modules.losses": ("lightning_modules.collectives",),
    "lightning_modules.metrics": (),
    "lightning_modules.checkpoints.sharing": (
        "lightning_modules.checkpoints",
        "lightning_modules.sweep.table",
    ),
    "lightning_modules.checkpoints": (
        "datamodules.files",
        "lightning_modules.models",
        "lightning_modules.training.run.checkpoint_store",
    ),
    "lightning_modules.training.optim": (
        "lightning_modules.collectives",
        "lightning_modules.training.run.agreement",
        "lightning_modules.training.run.checkpoint_store",
        "lightning_modules.training.run.private",
    ),
    "lightning_modules.training.run": (
        "datamodules.stream.faults",
        "datamodules.stream.retry",
        "datamodules.files",
        "lightning_modules.checkpoints.plain_data",
        "lightning_modules.training.monitor.csv_log",
        "lightning_modules.training.optim",
    ),
    "lightning_modules.training.monitor": (
        "datamodules.files",
        "lightning_modules.models",
        "lightning_modules.training.run",
        "lightning_modules.training.runs",
    ),
    "lightning_modules.training": (
        "datamodules",
        "lightning_modules.packaged",
        "lightning_modules.checkpoints",
        "lightning_modules.training",
    ),
    "lightning_modules.evaluation": (
        "datamodules",
        "lightning_modules.losses.gather",
        "lightning_modules.metrics",
        "lightning_modules.models",
        "lightning_modules.training.run.stall",
    ),
    "lightning_modules.inference": (
        "lightning_modules.pages",
        "datamodules",
        "lightning_modules.models",
        "lightning_modules.checkpoints",
    ),
    "lightning_modules.pages": ("datamodules",),
    "lightning_modules.sweep": (
        "lightning_modules.evaluation.intervals",
        "datamodules.files",
        "lightning_modules.checkpoints",
        "lightning_modules.packaged",
        "lightning_modules.pages",
        "lightning_modules.training.closing",
    ),
    "lightning_modules.planning": (
        "datamodules.stream",
        "kernels",
        "lightning_modules.models",
        "lightning_modules.pretrain",
        "lightning_modules.training",
    ),
    "lightning_modules.bench": OURS,
    "lightning_modules.doctor": (
        "kernels",
        "datamodules",
        "lightning_modules.bench",
        "lightning_modules.models",
        "lightning_modules.packaged",
        "lightning_modules.planning",
        "lightning_modules.training.monitor",
    ),
    "lightning_modules.demo": OURS,
    "lightning_modules.cli": OURS,
    "lightning_modules": (
        "datamodules.annotations.epic",
        "datamodules.batch",
        "datamodules.manifest",
        "datamodules.module",
        "datamodules.relevance",
        "lightning_modules.models",
        "lightning_modules.losses",
        "lightning_modules.metrics",
        "lightning_modules.checkpoints",
        "lightning_modules.evaluation",
        "lightning_modules.training.optim",
        "lightning_modules.training.run.private",
    ),
}
THIRD_PARTY = {
    "lightning_modules.collectives": {"torch"},
    "lightning_modules.losses": {"torch"},
    "lightning_modules.metrics": {"torch", "torchmetrics"},
}


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return next(room for room in ALLOWED if module == room or module.startswith(room + "."))


def imported(source: str, module: str) -> set[str]:
    """Every absolute module name that a source file imports, at any depth of nesting."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import; write the whole name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def forbidden_edges(source: str, module: str) -> list[str]:
    room = room_of(module)
    allowed = (room, *ALLOWED[room])
    if room == "lightning_modules":  # its own prefix covers every other room: only files beside it
        allowed = ALLOWED[room]
    bad = []
    for name in imported(source, module):
        top = name.split(".")[0]
        if top in OURS:
            ours = any(name == a or name.startswith(a + ".") for a in allowed)
            inner = room == "lightning_modules" and room_of(name) == room
            if not (ours or inner):
                bad.append(f"{module} -> {name}")
        elif room in THIRD_PARTY and top not in THIRD_PARTY[room] | sys.stdlib_module_names:
            bad.append(f"{module} -> {name}")
    return bad


FILES = sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


def test_there_are_files_to_walk():
    assert len(FILES) > 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path):
    assert forbidden_edges(path.read_text(), module_name(path)) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("kernels.attention", "from lightning_modules.models import VideoEncoder"),
        ("datamodules.stream.clips", "import kernels.st_rope"),
        ("lightning_modules.models.blocks", "from lightning_modules.losses import InfoNCELoss"),
        ("lightning_modules.losses.infonce", "import lightning"),
        ("lightning_modules.metrics.map", "import numpy"),
        ("lightning_modules.pretrain", "from lightning_modules.cli.main import main"),
        ("lightning_modules.pretrain", "from datamodules.stream.clips import ClipStream"),
    ],
)
def test_each_forbidden_edge_is_seen(module: str, line: str):
    assert len(forbidden_edges(line, module)) == 1


def at_import(body: list[ast.stmt]) -> set[str]:
    """Names imported when a module is: not within functions, not for type checkers alone."""
    names: set[str] = set()
    for node in body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            for part in ("orelse",) if for_types else ("body", "handlers", "orelse", "finalbody"):
                names |= at_import(getattr(node, part, []))
    return names


def circle(sources: dict[str, str]) -> list[str]:
    """Modules that need each other to be imported, in turn; none in a sound tree.

    A module also needs the packages it lies in, unless its importer lies there too.
    """
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        needed = set()
        for name in at_import(ast.parse(source).body):
            parts = name.split(".")
            needed |= {".".join(parts[:k]) for k in range(1, len(parts) + 1)}
        outside = {name for name in needed if not f"{module}.".startswith(f"{name}.")}
        graph[module] = outside & set(sources)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


SOURCES = {module_name(path): path.read_text() for path in FILES}


def test_no_circle_of_imports():
    assert circle(SOURCES) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("datamodules.files", "from datamodules.manifest import ClipRecord"),
        ("lightning_modules.models.config", "import lightning_modules.models.dual_encoder"),
        ("lightning_modules.evaluation.interface", "import lightning_modules.base"),
        # the package's own file imports what lies in it
        ("lightning_modules.losses.gather", "from lightning_modules.losses.margin import x"),
        ("datamodules.files", "try:\n    from datamodules import manifest\nexcept OSError: ..."),
    ],
)
def test_a_planted_circle_is_seen(module: str, line: str):
    found = circle({**SOURCES, module: f"{line}\n{SOURCES[module]}"})
    assert module in found


@pytest.mark.parametrize(
    "line",
    [
        "def f():\n    from datamodules.manifest import ClipRecord",
        "if TYPE_CHECKING:\n    from datamodules.manifest import ClipRecord",
    ],
)
def test_what_is_imported_later_makes_no_circle(line: str):
    assert circle({**SOURCES, "datamodules.files": f"{line}\n{SOURCES['datamodules.files']}"}) == []
