"""`eva02-at evaluate`: one checkpoint on one benchmark."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning_modules.checkpoints.zoo import checkpoint_of, find_entry
from lightning_modules.cli.evaluate_options import evaluate_parser
from lightning_modules.cli.model_options import reading
from lightning_modules.cli.startup import importing
from lightning_modules.training.closing import close

if TYPE_CHECKING:
    from lightning_modules.evaluation.rerank import RerankOptions


def main(argv: list[str]) -> int:
    """Evaluate one checkpoint on one benchmark.

    Args:
        argv: Words after `eva02-at evaluate`.

    Raises:
        ValueError: A file is missing or malformed, an option does not fit the benchmark, or the
            shards do not hold its clips.
    """
    options = evaluate_parser().parse_args(argv)
    if options.zoo is not None:
        entry = find_entry(options.zoo)
        options.settings = [*entry.settings, *options.settings]
        options.checkpoint = checkpoint_of(entry)
    with importing():
        from datamodules.stream.cache import FileCache
        from lightning_modules.checkpoints.conversion import LoadedModel, load_trained
        from lightning_modules.checkpoints.rerank import load_reranker
        from lightning_modules.evaluation.processes import Machines
        from lightning_modules.evaluation.results import Outputs
        from lightning_modules.evaluation.run import EvalOptions, evaluate_here, open_benchmark
        from lightning_modules.training.run.devices import check_devices
        from lightning_modules.training.run.launch import check_slurm, meet

    outputs = Outputs(options.json, options.prediction, options.submission, options.rerank_scores)
    outputs.check(options.benchmark)
    second = _second_look(options)
    check_devices(options.accelerator, nodes=options.nodes)
    machines = Machines(options.accelerator, options.devices, options.nodes, options.dtype)
    how = EvalOptions(
        options.batch_size,
        options.workers,
        options.views,
        options.flip,
        options.max_fault_rate,
        0.0 if options.submission else options.max_missing,
        options.cache_dir and FileCache(options.cache_dir, int(options.cache_gb * 1e9)),
    )
    # Annotations first: a mistake in them should not wait for the model, nor meet other processes.
    benchmark, corpus = open_benchmark(
        options.benchmark,
        options.shards,
        annotations=options.annotations,
        split=options.split,
        template=options.template,
        dual_softmax=options.dual_softmax,
        allow_pipe=options.allow_pipe,
    )
    loaded = load_trained(options.checkpoint, **reading(options))
    if second is not None:
        if not isinstance(loaded, LoadedModel):
            raise ValueError(f"--rerank is for dual encoders; {options.checkpoint} is a classifier")
        how = replace(how, rerank=(load_reranker(options.rerank, loaded.model), second))
    if machines.num_processes > 1:
        check_slurm()
        meet()
    done = evaluate_here(loaded.model, benchmark, corpus, how, machines)
    if done is not None:
        protocol = _protocol(options, loaded.config.vision.num_frames, second)
        result = outputs.write(done, protocol, options.checkpoint)
        print(f"{options.checkpoint}: {loaded.report.summary()}", file=sys.stderr)
        if done.second_stage is not None:
            print(done.second_stage, file=sys.stderr)
        if options.flip:
            _warn_of_sides(benchmark.prompts)
        print(done.headline, file=sys.stderr)
        print(result)
        files = (options.json, options.prediction, options.submission, options.rerank_scores)
        if options.benchmark == "ek100_mir":
            matrix = options.prediction or "FILE.npy"
            told = "" if options.prediction else "FILE.npy: of --prediction"
            words = ("--annotations", options.annotations, "--similarity", matrix)
            close("audit", *words, wrote=files, told=told)
        else:
            close("sweep", "--help", wrote=files, told="many checkpoints, one table")
    return 0


_SIDE = re.compile(r"\b(left|right|(anti|counter)?-?clockwise)\b", re.IGNORECASE)


def _warn_of_sides(prompts: Sequence[str]) -> None:
    """Say how many texts name a side, which a flipped clip shows the other way round."""
    named = [text for text in prompts if _SIDE.search(text)]
    if named:
        print(
            f"--flip: {len(named):,} of {len(prompts):,} texts name a side ({named[0]!r}), and a "
            "flipped clip shows the other one; compare with the figure without --flip",
            file=sys.stderr,
        )


def _second_look(options: argparse.Namespace) -> RerankOptions | None:
    """How the re-ranker takes part, if there is one.

    Raises:
        ValueError: One option without the others.
    """
    from lightning_modules.evaluation.rerank import RerankOptions

    given = {
        "--rerank": options.rerank,
        "--top": options.top,
        "--blend": options.blend,
        "--rerank-scores": options.rerank_scores,
    }
    if all(value is None for value in given.values()):
        return None
    lacking = [name for name in ("--rerank", "--top", "--blend") if given[name] is None]
    if lacking:
        raise ValueError(
            f"{', '.join(lacking)} missing: a second look needs --rerank PATH, --top K and --blend "
            "W; `eva02-at tune` chooses K and W on clips held out of training"
        )
    return RerankOptions(options.top, options.blend)


def _protocol(options: argparse.Namespace, num_frames: int, second: RerankOptions | None) -> str:
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
    if second is not None:
        parts.append(str(second))
    return ", ".join([*parts, options.dtype])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
