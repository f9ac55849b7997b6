"""Interleaved timing for every `eva02-at bench`: medians, ratios, peak memory, a table, JSON."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch

Case = Callable[[], object]


@dataclass
class Row:
    """One variant of one comparison.

    Attributes:
        group: What is compared.
        name: The variant.
        median_s: Median seconds of a call.
        ratio: The baseline's median over this one's: above 1 is faster than the baseline.
        spread: (90th - 10th percentile) / median of the calls: how noisy the machine was.
        peak_bytes: Largest memory a call added beyond what lay there before it; None if not asked.
        notes: Whatever else the bench has to say of the row.
    """

    group: str
    name: str
    median_s: float
    ratio: float
    spread: float
    peak_bytes: int | None = None
    notes: dict[str, object] = field(default_factory=dict)


def compare(
    group: str,
    cases: Mapping[str, Case],
    *,
    baseline: str | None = None,
    rounds: int = 7,
    warmup: int = 1,
    memory: bool | Literal["tensors"] = False,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Time variants in turns (a b c, a b c, ...), so that a slow minute slows all of them alike.

    Args:
        group: What is compared.
        cases: Name -> call without arguments.
        baseline: The name whose median is the numerator of every ratio; the first by default.
        rounds: Timed turns.
        warmup: Untimed turns before them.
        memory: Also measure the peak memory of one call of each, outside the timed turns: True
            as the system counts it (numpy's too), "tensors" as PyTorch allocates, to the byte.
        clock: time.perf_counter, or time.process_time where other processes share the cores: it
            counts the processor's seconds of all our threads (run one thread: waiting ones spin).

    Returns:
        One row a case, in their order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(warmup + rounds):
        for name, case in cases.items():
            _synchronize()
            start = clock()
            case()
            _synchronize()
            if turn >= warmup:
                seconds[name].append(clock() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    reference = medians[baseline if baseline is not None else next(iter(cases))]
    measure = peak_tensor_bytes if memory == "tensors" else peak_memory
    return [
        Row(
            group,
            name,
            medians[name],
            reference / medians[name],
            _spread(values),
            measure(cases[name]) if memory else None,
        )
        for name, values in seconds.items()
    ]


def _spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 10], ordered[-1 - len(ordered) // 10]
    return (high - low) / statistics.median(ordered)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_memory(case: Case) -> int:
    """Return the bytes that one call of `case` adds at its peak.

    On CUDA the allocator's own count. On CPU the largest resident set that the kernel saw (reset
    through /proc/self/clear_refs) over the one before the call, free heap pages having been given
    back first, so that their reuse counts; -1 where /proc is not there.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    clear_refs = Path("/proc/self/clear_refs")
    if not clear_refs.exists():
        return -1
    _trim_heap()
    clear_refs.write_text("5")
    before = _status_bytes("VmRSS")
    case()
    return max(0, _status_bytes("VmHWM") - before)


def peak_tensor_bytes(case: Case) -> int:
    """Return the bytes of tensors that one call of `case` adds at its peak, exactly."""
    gc.collect()
    if torch.cuda.is_available():
        return peak_memory(case)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        case()
    assert profile.profiler is not None
    results = profile.profiler.kineto_results
    assert results is not None
    changes = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    held = peak = 0
    for _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


def _trim_heap() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):  # glibc's; other C libraries give pages back by themselves
        libc.malloc_trim(0)


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def device_name() -> str:
    """Return the device that a bench runs on: "cuda" where there is one, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> dict[str, object]:
    """Describe what a figure was measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return {
        "device": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def add_clock_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--cpu-time`; `chosen_clock` reads it."""
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count processor seconds in one thread: for machines that others use too",
    )


def chosen_clock(args: argparse.Namespace) -> Callable[[], float]:
    """Return the clock for `compare`; with --cpu-time, keep PyTorch to one thread."""
    if not args.cpu_time:
        return time.perf_counter
    torch.set_num_threads(1)
    return time.process_time


def add_output_argument(parser: argparse.ArgumentParser) -> None:
    """Add `--json FILE`, which every bench has."""
    parser.add_argument("--json", type=Path, help="also write the rows and the machine to FILE")


def report(rows: list[Row], json_path: Path | None = None) -> None:
    """Print the rows as a table and, if asked, write them as JSON."""
    print("# " + ", ".join(f"{key} {value}" for key, value in machine().items()))
    columns = ("comparison", "variant", "median", "ratio", "spread", "peak", "notes")
    table = [columns, *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(columns))]
    for line in table:
        print("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
    sys.stdout.flush()
    if json_path is not None:
        content = {"machine": machine(), "rows": [asdict(row) for row in rows]}
        json_path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _cells(row: Row) -> tuple[str, ...]:
    peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f} MiB"
    notes = ", ".join(f"{key} {value}" for key, value in row.notes.items())
    return (
        row.group,
        row.name,
        f"{row.median_s * 1e3:.2f} ms",
        f"{row.ratio:.2f}x",
        f"{row.spread:.0%}",
        peak,
        notes,
    )
