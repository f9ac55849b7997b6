"""Starting tiny runs and reading their curves."""

import csv

from safetensors.torch import load_file
from tiny_run import STEPS_PER_EPOCH, steps

TOTAL = 3 * STEPS_PER_EPOCH
REAL = {"workers": 1, "dropout": 0.2, "ema": True}  # what could break exactness, switched on


def run(zygote, folder, *, world=2, meanwhile=None, **options):
    """Run to the end; `meanwhile` is called with the run under way."""
    folder.mkdir(exist_ok=True)
    launched = zygote.start(folder / "log.txt", world=world, folder=str(folder), **options)
    if meanwhile is not None:
        meanwhile(launched)
    launched.wait()
    return launched


def curve(folder, world=2):
    """step -> (exact loss, ids of all ranks); a step done twice must have given the same."""
    merged = {}
    for rank in range(world):
        for line in steps(folder, rank):
            seen = merged.setdefault(line["step"], {})
            entry = (line["loss"], tuple(line["ids"]))
            assert seen.setdefault(rank, entry) == entry, f"step {line['step']} differs when redone"
    return merged


def average(folder):
    """The averaged weights of the newest checkpoint, as lists of floats."""
    newest = (folder / "checkpoints" / "latest").read_text().strip()
    tensors = load_file(folder / "checkpoints" / newest / "ema.safetensors")
    return {name: tensor.flatten().tolist() for name, tensor in sorted(tensors.items())}


def losses_of(run_dir):
    """(step, loss) as a recipe's run has logged them."""
    with (run_dir / "logs" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    return [(row["step"], row["train/loss"]) for row in rows]
