"""Starting tiny runs and reading their curves."""

import csv
import os
import signal
import time

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


def run_stopped_once(zygote, folder, argv):
    """A recipe's run on two ranks, stopped by a signal after its first checkpoint, then to its end.

    Args:
        folder: Its run_dir, as `argv` has it.
        argv: Words of the command line.

    Returns:
        The number of losses at the stop.
    """
    log = folder.with_name(f"{folder.name}.txt")
    started = zygote.start(log, world=2, argv=argv)
    deadline = time.monotonic() + 120
    while not (folder / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(started.pids[1], signal.SIGTERM)
    assert started.wait() == [85, 85], started.text()
    stopped_at = len(losses_of(folder))
    done = zygote.start(log, world=2, argv=argv)
    assert done.wait() == [0, 0], done.text()
    return stopped_at
