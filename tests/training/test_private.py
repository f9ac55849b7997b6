"""Private names of libraries: in one file, looked at in these versions, doing what they did."""

from __future__ import annotations

import ast
from importlib import metadata
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lightning_modules.training.recipe import RecipeParser
from lightning_modules.training.run import private
from lightning_modules.training.run.loop_state import Progress

ROOT = Path(__file__).parents[2]
THE_FILE = "lightning_modules/training/run/private.py"
# What may not import that file, or is no library's secret. Each is said at its place.
ELSEWHERE = {
    ("kernels/xformers_door.py", "_dispatch_fw"),
    ("kernels/xformers_door.py", "_dispatch_bw"),
    ("kernels/attention.py", "_dynamo_marked_constant"),
    ("kernels/operators.py", "_dynamo_marked_constant"),
    ("kernels/trial.py", "torch.utils._python_dispatch"),
    ("datamodules/stream/loader.py", "torch.utils.data._utils"),
    ("datamodules/stream/loader.py", "_shutdown_workers"),
    ("lightning_modules/models/towers.py", "_dynamo"),  # documented under this name
}
OPTIMISERS = tuple(f"lightning_modules/training/optim/{name}.py" for name in ("lamb", "muon"))
PACKAGES = ("kernels", "datamodules", "lightning_modules")
FILES = [path for top in PACKAGES for path in ROOT.glob(f"{top}/**/*.py")]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.AST) -> set[str]:
    """Names that a file defines: functions, classes, variables, attributes of its objects."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            is_own = isinstance(node, ast.Name) or ast.unparse(node.value) == "self"
            names |= {node.id if isinstance(node, ast.Name) else node.attr} if is_own else set()
    return names


def borrowed(source: str, ours: frozenset[str] = frozenset()) -> list[str]:
    """Private names that a file takes from a library: `ours` are those of our other files."""
    tree = ast.parse(source)
    own, found = own_names(tree) | ours, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if node.attr not in own and ast.unparse(node.value) != "os":
                found.append(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module:
            if any(is_private(part) for part in node.module.split(".")):
                found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if any(map(is_private, a.name.split(".")))]
    return found


def test_private_names_are_in_one_file():
    here = frozenset(borrowed((ROOT / THE_FILE).read_text()))
    assert {"_checkpoint_connector", "_config", "_get_default_store", "_actions"} <= here
    ours = frozenset().union(*(own_names(ast.parse(path.read_text())) for path in FILES)) - here
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in FILES
        for name in borrowed(path.read_text(), ours)
    }
    # an optimiser over many tensors is nothing but these: torch.optim's own are written so
    found = {
        (path, name)
        for path, name in found
        if not (path in OPTIMISERS and name.startswith("_foreach_"))
    }
    assert {pair for pair in found if pair[0] != THE_FILE} == ELSEWHERE


@pytest.mark.parametrize(
    "source",
    [
        "trainer._loop.run()",
        "engine._config = 1",
        "import torch._inductor",
        "from lightning.fabric._graveyard import x",
        "class A(B):\n    def f(self):\n        return self._inherited_from_a_library",
    ],
)
def test_a_planted_one_is_seen(source):
    assert len(borrowed(source)) == 1


def test_the_versions_are_those_that_were_looked_at():
    found = {name: metadata.version(name).split("+")[0] for name in private.CHECKED}
    assert found == private.CHECKED, f"go through {THE_FILE} again, then change CHECKED"


class Probe(BoringModel):
    """Looks from within a batch's hook, two micro-batches a step, validation after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def on_train_batch_end(self, *_) -> None:
        trainer = self.trainer
        self.seen.append((private.gradients_pending(trainer), private.validation_due(trainer)))
        if len(self.seen) == 4:
            private.log_last_step(trainer)


@pytest.fixture
def trainer(tmp_path) -> Trainer:
    return Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        max_epochs=1,
        limit_train_batches=4,
        limit_val_batches=1,
        val_check_interval=3,
        accumulate_grad_batches=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )


def test_the_loops_tell_where_they_stand(trainer):
    probe = Probe()
    assert private.attached_trainer(probe) is None
    trainer.fit(probe)
    assert private.attached_trainer(probe) is trainer
    assert [pending for pending, _ in probe.seen] == [True, False, True, False]
    assert [due for _, due in probe.seen] == [False, False, True, False]
    checkpoint = private.dump_checkpoint(trainer)
    assert set(checkpoint) >= {"state_dict", "optimizer_states", "loops", "global_step"}
    fit = checkpoint["loops"]["fit_loop"]
    shape = {name: sorted(counts) for name, counts in fit.items()}
    stands = Progress(0, 4, 4, 2, accumulate=2, epoch_done=True, validation_due=True)
    stands.place(trainer, checkpoint["loops"])
    assert {name: sorted(counts) for name, counts in fit.items()} == shape  # Lightning's own names
    counts = fit["epoch_loop.val_loop.batch_progress"]["current"]
    assert (counts["started"], counts["processed"]) == (1, 0)


def test_lightning_handles_no_signals(trainer, monkeypatch):
    connector = type(trainer._signal_connector)
    asked = []
    monkeypatch.setattr(connector, "register_signal_handlers", lambda self: asked.append(1))
    private.silence_lightning_signals(trainer)
    trainer.fit(Probe())
    assert asked == []  # and Lightning has asked its connector, or the attribute is gone:
    Trainer(barebones=True, accelerator="cpu", max_steps=1).fit(BoringModel())
    assert asked == [1]


def test_many_tensors_at_once():
    first, second = [torch.ones(3), torch.zeros(2, 2)], [torch.zeros(3), torch.ones(2, 2)]
    private.lerp_(first, second, 0.25)
    assert first[0].tolist() == [0.75] * 3 and first[1].tolist() == [[0.25] * 2] * 2
    assert [norm.item() for norm in private.norms([torch.tensor([3.0, 4.0])])] == [5.0]


def test_fake_tensors_have_storages():
    with private.fake_tensors():
        tensor = torch.zeros(10**12)
        assert private.storage_identity(tensor) == private.storage_identity(tensor[3:])
        assert private.storage_identity(tensor) != private.storage_identity(torch.zeros(1))


def test_options_have_names():
    parser = RecipeParser()
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_argument("--data.init_args.size", type=int)
    assert {"model", "data.init_args.size", "size"} <= private.option_names(parser)
