"""The planner of the training stream at the size of the largest data set, without any data."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from datamodules.manifest import Manifest, Shard
from lightning_modules.bench.timing import Row

NUM_SHARDS, NUM_SAMPLES, WORLD, GLOBAL_BATCH = 10_000, 35_000_000, 256, 8192

# Runs in a process of its own, so that neither time nor memory has seen a plan before.
_PROBE = """
import json, sys, time
from datamodules.stream.order import StreamOrder
from datamodules.stream.reader import Corpus
place, fraction, batch, world = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
def memory(key):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":"))
open("/proc/self/clear_refs", "w").write("5")  # resets the peak
before = memory("VmRSS")
start = time.perf_counter()
corpus = Corpus.load([place])
order = StreamOrder(corpus.counts, global_batch_size=batch, weights=corpus.shard_weights)
epoch = order.epoch(3)
step = min(int(fraction * order.num_steps), order.num_steps - 1)
slots = epoch.batch(step, world // 2, world)
seconds = time.perf_counter() - start
peak = memory("VmHWM") - before
begin = time.perf_counter()
for later in range(step, min(step + 50, order.num_steps)):
    slots = epoch.batch(later, world // 2, world)
each = (time.perf_counter() - begin) / 50
print(json.dumps({"s": seconds, "kib": peak, "step_ms": each * 1e3, "lanes": order.lanes,
                  "steps": order.num_steps, "dropped": order.num_dropped,
                  "shards": len(set(slots.shard.tolist()))}))
"""


def planner_rows() -> list[Row]:
    """Time start and resume at four places of an epoch: manifest to the first batch's samples."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "manifest.json"
        Manifest("", tuple(_shard(k) for k in range(NUM_SHARDS)), {}, {}).save(path)
        results = [(f, _probe(path, f)) for f in (0.0, 0.5, 0.99)]
    group = f"planner, {NUM_SHARDS} shards, {NUM_SAMPLES // 10**6} M samples, {WORLD} ranks"
    start_s = results[0][1]["s"]
    rows = []
    for fraction, found in results:
        notes: dict[str, object] = {
            "then ms a step": round(found["step_ms"], 2),
            "shards in it": found["shards"],
            "lanes": found["lanes"],
            "samples dropped": found["dropped"],
        }
        name = f"resume at {fraction:.0%}" if fraction else "start"
        peak = int(found["kib"]) * 1024
        rows.append(Row(group, name, found["s"], start_s / found["s"], 0.0, peak, notes))
    return rows


def _shard(number: int) -> Shard:
    # uneven, as shards are after rejects; the sum is exact
    count = NUM_SAMPLES // NUM_SHARDS + (1 if number % 2 else -1)
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    name = f"shard-{number:06d}"
    return Shard(f"{name}.tar", f"{name}.index.npz", count, 700_000_000, digest, digest)


def _probe(path: Path, fraction: float) -> dict[str, float]:
    words = [sys.executable, "-c", _PROBE, str(path), str(fraction), str(GLOBAL_BATCH), str(WORLD)]
    return json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
