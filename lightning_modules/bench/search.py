"""`eva02-at bench search`: an index of many windows, by what it costs to grow, to open and to ask.

Windows are random unit vectors: nothing is decoded or embedded, since that is another bench's.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.functional import normalize

from lightning_modules.bench.timing import machine
from lightning_modules.inference.calibration import BANK, Background
from lightning_modules.inference.search_index import IndexedVideo, Part, SearchIndex

_EMBED_DIM, _PART_ROWS = 256, 1 << 17
_QUERIES = 5


def _grow(folder: Path, num_windows: int, bank: torch.Tensor) -> dict[str, float]:
    """Write an index part by part, as `update` does; the embedding of windows not counted."""
    generator = torch.Generator().manual_seed(0)
    seconds = 0.0
    for start in range(0, num_windows, _PART_ROWS):
        rows = min(_PART_ROWS, num_windows - start)
        vectors = normalize(torch.randn(rows, _EMBED_DIM, generator=generator), dim=1)
        began = time.perf_counter()
        spans = torch.arange(rows, dtype=torch.float64)[:, None] * 2 + torch.tensor([0.0, 2.0])
        background = Background.of(bank, [vectors])
        video = torch.zeros(rows, dtype=torch.int64)
        name = IndexedVideo(f"{start}.mp4", 0, 0)
        Part([name], video, spans, vectors.half(), background).write(folder, "bench")
        seconds += time.perf_counter() - began
    written = sum(file.stat().st_size for file in folder.iterdir())
    return {"grow_s": seconds, "written_mb": written / 1e6}


def measure(num_windows: int, folder: Path) -> dict[str, float]:
    """Grow, open and ask an index.

    Args:
        num_windows: N.
        folder: Empty; it will hold some 530 N bytes.
    """
    bank = normalize(torch.randn(len(BANK), _EMBED_DIM), dim=1)
    row: dict[str, float] = {"windows": num_windows, **_grow(folder, num_windows, bank)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    index = SearchIndex.load(folder, folder, "bench")
    row["open_s"] = time.perf_counter() - began
    queries = normalize(torch.randn(1 + _QUERIES, _EMBED_DIM), dim=1)
    index.search(queries[0], 12)  # pages come in
    began = time.perf_counter()
    for query in queries[1:]:
        index.search(query, 12)
    row["query_s"] = (time.perf_counter() - began) / _QUERIES
    row["memory_mb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return row


def main(argv: list[str]) -> int:
    """Run the bench.

    Args:
        argv: Words after `eva02-at bench search`.
    """
    parser = argparse.ArgumentParser(prog="eva02-at bench search", description=__doc__)
    parser.add_argument("--windows", type=int, nargs="+", default=[1_000_000])
    parser.add_argument("--folder", type=Path, help="where the index is made (a temporary folder)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    print(json.dumps(machine()))
    print("    windows   grow s   written MB   open s   query s   mapped and resident MB")
    rows = []
    for num_windows in args.windows:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            row = measure(num_windows, Path(folder))
        rows.append(row)
        print(
            f"{num_windows:11,} {row['grow_s']:8.1f} {row['written_mb']:12,.0f} "
            f"{row['open_s']:8.3f} {row['query_s']:9.3f} {row['memory_mb']:10,.0f}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0
