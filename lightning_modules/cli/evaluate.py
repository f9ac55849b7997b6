"""`eva02-at evaluate`: one checkpoint on one benchmark."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from tqdm import tqdm

from datamodules.files import write_atomically
from lightning_modules.cli.model_options import add_model_options, load_from_options
from lightning_modules.cli.parser import CommandParser
from lightning_modules.evaluation.benchmarks import BENCHMARKS
from lightning_modules.evaluation.benchmarks.ek100_mir import EK100Retrieval
from lightning_modules.evaluation.embed import EmbedOptions
from lightning_modules.evaluation.missing import add_max_missing
from lightning_modules.evaluation.run import Evaluation, evaluate, open_benchmark
from lightning_modules.evaluation.submission import write_submission

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "evaluate",
        "Evaluate a checkpoint on a benchmark exactly as its protocol says; figures in percent.",
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="PATH", help="as `eva02-at convert` reads it"
    )
    parser.add_argument("--benchmark", required=True, choices=list(BENCHMARKS))
    parser.add_argument(
        "--shards",
        required=True,
        metavar="MANIFEST",
        help="manifest of the benchmark's clips, or its folder: `eva02-at shards build` with the "
        "format ek100, egomcq, charades_ego_test or csv",
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        metavar="PATH",
        help="folder of EK-100's or Charades-Ego's CSVs, or egomcq.json; none for text_video",
    )
    parser.add_argument("--split", help="part of the data; the benchmark's usual one if absent")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result, with each query's own value"
    )
    parser.add_argument(
        "--prediction", type=Path, metavar="FILE.npy", help="write the similarities or logits"
    )
    parser.add_argument(
        "--submission",
        type=Path,
        metavar="FILE.zip",
        help="ek100_mir: write the challenge's zip, validated",
    )
    add_max_missing(parser)
    _add_test_time_options(parser)
    add_model_options(parser)
    return parser


def _add_test_time_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("test time (each is named in the result)")
    group.add_argument("--flip", action="store_true", help="average with flipped clips")
    group.add_argument(
        "--views", type=int, default=1, metavar="K", help="average K interleaved clips of T frames"
    )
    group.add_argument(
        "--dual-softmax", type=float, metavar="SCALE", help="retrieval by dual softmax"
    )
    group.add_argument(
        "--template", default="{}", metavar="TEXT", help="set each prompt in here: '#C C {}'"
    )
    group = parser.add_argument_group("running")
    group.add_argument("--batch-size", type=int, default=16, metavar="N")
    group.add_argument("--workers", type=int, default=2, metavar="N", help="decoders a process")
    group.add_argument(
        "--devices",
        type=int,
        default=1,
        metavar="N",
        help="processes on this node; under torchrun or srun give what they were told",
    )
    group.add_argument("--nodes", type=int, default=1, metavar="N")
    group.add_argument("--accelerator", default="auto", choices=["auto", "cpu", "cuda"])
    group.add_argument("--dtype", default="float32", choices=list(_DTYPES))
    group.add_argument(
        "--max-fault-rate",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of damaged clips above which the evaluation ends (default 0.01)",
    )


def main(argv: list[str]) -> int:
    """Evaluate one checkpoint on one benchmark.

    Args:
        argv: Words after `eva02-at evaluate`.

    Raises:
        ValueError: A file is missing or malformed, an option does not fit the benchmark, or the
            shards do not hold its clips.
    """
    options = _parser().parse_args(argv)
    if options.submission is not None and options.benchmark != EK100Retrieval.name:
        raise ValueError(f"a submission is for {EK100Retrieval.name}, not {options.benchmark}")
    if options.devices < 1 or options.nodes < 1:
        raise ValueError(f"{options.devices} devices on {options.nodes} nodes; at least 1 of each")
    if options.accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError("--accelerator cuda, but PyTorch finds no CUDA device here")
    embed_options = EmbedOptions(
        options.batch_size, options.workers, options.views, options.flip, options.max_fault_rate
    )
    # Annotations first: a mistake in them should not wait for the model, nor meet other processes.
    benchmark, corpus = open_benchmark(
        options.benchmark,
        options.shards,
        annotations=options.annotations,
        split=options.split,
        template=options.template,
        dual_softmax=options.dual_softmax,
    )
    loaded = load_from_options(options, options.checkpoint)
    with _processes(options) as (device, is_first):
        model = loaded.model.to(device, _DTYPES[options.dtype])
        with tqdm(
            total=len(benchmark.clip_ids), unit="clip", disable=not is_first or None, leave=False
        ) as bar:
            done = evaluate(
                model,
                benchmark,
                corpus,
                embed_options,
                lambda clips: bar.update(clips * options.devices * options.nodes),
                0.0 if options.submission else options.max_missing,
            )
        if is_first:
            told = f"{options.checkpoint}: {loaded.report.summary()}"
            _write(done, options, _protocol(options, loaded.config.vision.num_frames), told)
    return 0


@contextlib.contextmanager
def _processes(options: argparse.Namespace) -> Iterator[tuple[torch.device, bool]]:
    """Start the other processes, if any; yields this one's device and whether it is the first."""
    if options.devices * options.nodes == 1:
        use_cuda = options.accelerator == "cuda" or (
            options.accelerator == "auto" and torch.cuda.is_available()
        )
        yield torch.device("cuda" if use_cuda else "cpu"), True
        return
    fabric = Fabric(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.nodes,
        strategy="ddp",
    )
    fabric.launch()
    try:
        yield fabric.device, fabric.is_global_zero
    finally:
        torch.distributed.destroy_process_group()


def _protocol(options: argparse.Namespace, num_frames: int) -> str:
    """What was done at test time, in words."""
    parts = [f"{num_frames} frames"]
    if options.views > 1:
        parts.append(f"{options.views} views")
    if options.flip:
        parts.append("flip averaging")
    if options.template != "{}":
        parts.append(f"template {options.template!r}")
    if options.dual_softmax is not None:
        parts.append(f"dual softmax with scale {options.dual_softmax:g}")
    return ", ".join([*parts, options.dtype])


def _write(done: Evaluation, options: argparse.Namespace, protocol: str, told: str) -> None:
    """Print the result, and write what was asked for."""
    metrics = done.measured.metrics
    result: dict[str, Any] = {"benchmark": options.benchmark, "protocol": protocol, **metrics}
    print(told, file=sys.stderr)
    print(done.headline, file=sys.stderr)
    print(json.dumps(_without_nan(result), indent=2))
    if options.json is not None:
        whole = result | {"checkpoint": options.checkpoint, "per_query": done.measured.per_query}
        write_atomically(options.json, json.dumps(_without_nan(whole)) + "\n")
    if options.prediction is not None:
        options.prediction.parent.mkdir(parents=True, exist_ok=True)
        with options.prediction.open("wb") as file:
            np.save(file, done.prediction.numpy())
    if options.submission is not None and isinstance(done.benchmark, EK100Retrieval):
        write_submission(options.submission, done.prediction, *done.benchmark.annotations.ids)


def _without_nan(content: Any) -> Any:
    """The same with null for NaN (what was left out), which JSON does not know."""
    if isinstance(content, dict):
        return {key: _without_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [_without_nan(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
