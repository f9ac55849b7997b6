"""Waiting for remote shards: fetched ahead against fetched when asked for, over loopback.

A server in a process of its own answers after a latency and shares a bandwidth among its
connections. A loop takes batches and sleeps for a step's time; what it waits for beyond that is
what a GPU would.
"""

from __future__ import annotations

import functools
import http.server
import io
import multiprocessing
import statistics
import tarfile
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import av
import numpy as np

from datamodules.pretrain import PretrainDataModule
from datamodules.shards.index import index_tars
from lightning_modules.bench.timing import Row, add_output_argument, report
from lightning_modules.cli.parser import CommandParser

_BATCH, _CHUNK = 32, 1 << 17


class _Line:
    """A link that its users share: a chunk goes when those before it are through."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s, self.free_at, self.lock = bytes_per_s, 0.0, threading.Lock()

    def send(self, size: int) -> None:
        """Wait until a chunk is through."""
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic()) + size / self.bytes_per_s
            free_at = self.free_at
        time.sleep(max(0.0, free_at - time.monotonic()))


class _Handler(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, line: _Line, latency_s: float, *args: Any, **kwargs: Any) -> None:
        self.line, self.latency_s = line, latency_s
        super().__init__(*args, **kwargs)

    def do_GET(self) -> None:
        time.sleep(self.latency_s)
        super().do_GET()

    def do_HEAD(self) -> None:
        time.sleep(self.latency_s)
        super().do_HEAD()

    def copyfile(self, source: Any, outputfile: Any) -> None:
        while chunk := source.read(_CHUNK):
            self.line.send(len(chunk))
            outputfile.write(chunk)

    def log_message(self, *args: Any) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A reader that ends leaves its connection; that is no news."""


def _serve(folder: Path, latency_s: float, bytes_per_s: float, port: Any) -> None:
    handler = functools.partial(_Handler, _Line(bytes_per_s), latency_s, directory=str(folder))
    with _Server(("127.0.0.1", 0), handler) as server:
        port.value = server.server_port
        server.serve_forever()


def write_set(folder: Path, num_shards: int, per_shard: int, clip_bytes: int) -> None:
    """Write shards of one small clip, padded to the size of real ones, and their manifest."""
    clip = _clip()
    padding = np.random.default_rng(0).bytes(max(0, clip_bytes - len(clip) - 8))
    # mp4 readers skip what lies in a `free` box
    data = clip + (len(padding) + 8).to_bytes(4, "big") + b"free" + padding
    folder.mkdir(parents=True)
    for number in range(num_shards):
        with tarfile.open(folder / f"shard-{number:06d}.tar", "w") as tar:
            for k in range(per_shard):
                for suffix, content in (("mp4", data), ("txt", b"#C C waits")):
                    member = tarfile.TarInfo(f"{number * per_shard + k:09d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    index_tars(folder, probe=False)


def _clip() -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(8):
            frame = np.zeros((32, 32, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def epoch_waits(place: str, cache_dir: Path, step_s: float, ahead: int | None) -> list[float]:
    """Seconds that each step of an epoch waits for its batch."""
    module = PretrainDataModule(
        [place],
        global_batch_size=_BATCH,
        lanes=4,
        shuffle_window=64,
        num_frames=2,
        image_size=32,
        num_workers=2,
        cache_dir=str(cache_dir),
        prefetch_shards=ahead,
    )
    waits = []
    batches = iter(module.train_dataloader())
    while True:
        started = time.perf_counter()
        if next(batches, None) is None:
            break
        waits.append(time.perf_counter() - started)
        time.sleep(step_s)
    module.teardown("fit")
    return waits


def main(argv: list[str]) -> int:
    """Measure both ways of fetching in turns.

    Args:
        argv: Words after `eva02-at bench store`.
    """
    parser = CommandParser("bench store", "What a step waits for shards in a store.")
    add = parser.add_argument
    add("--latency-ms", type=float, default=50.0, help="to the first byte (%(default)s)")
    add("--mb-s", type=float, default=50.0, help="bandwidth of the node (%(default)s)")
    add("--step-ms", type=float, default=200.0, help="of a step that waits for nothing")
    add("--shards", type=int, default=24, help="shards (%(default)s)")
    add("--clips", type=int, default=64, help="clips a shard (%(default)s)")
    add("--clip-kb", type=float, default=160.0, help="size of a clip (%(default)s)")
    add("--rounds", type=int, default=3, help="epochs each (%(default)s)")
    add_output_argument(parser)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "set"
        write_set(folder, options.shards, options.clips, int(options.clip_kb * 1000))
        context = multiprocessing.get_context("fork")
        port = context.Value("i", 0)
        arguments = folder, options.latency_ms / 1e3, options.mb_s * 1e6, port
        server = context.Process(target=_serve, args=arguments, daemon=True)
        server.start()
        while not port.value:
            time.sleep(0.01)
        try:
            place = f"http://127.0.0.1:{port.value}/manifest.json"
            report(_rows(place, Path(work), options), options.json)
        finally:
            server.kill()
            server.join()
    return 0


def _rows(place: str, work: Path, options: Any) -> list[Row]:
    waits: dict[str, list[list[float]]] = {"when asked for": [], "ahead": []}
    for number in range(options.rounds):
        for name, ahead in (("when asked for", 0), ("ahead", None)):
            cache = work / f"cache-{name}-{number}"
            waits[name].append(epoch_waits(place, cache, options.step_ms / 1e3, ahead))
    group = (
        f"{options.latency_ms:g} ms, {options.mb_s:g} MB/s, steps of {options.step_ms:g} ms that "
        f"read {_BATCH * options.clip_kb / 1e3:.1f} MB"
    )
    means = {name: [statistics.mean(epoch) for epoch in epochs] for name, epochs in waits.items()}
    first = statistics.median(means["when asked for"])
    rows = []
    for name, epochs in waits.items():
        mean = statistics.median(means[name])
        spread = (max(means[name]) - min(means[name])) / mean
        total = statistics.median(sum(epoch) for epoch in epochs)
        busy = len(epochs[0]) * options.step_ms / 1e3
        notes: dict[str, object] = {
            "waiting": f"{total / (total + busy):.1%} of the epoch",
            "first step ms": round(1e3 * statistics.median(epoch[0] for epoch in epochs)),
            "later ms": round(1e3 * statistics.median(statistics.mean(e[1:]) for e in epochs), 1),
        }
        rows.append(Row(group, name, mean, first / mean, spread, notes=notes))
    return rows
