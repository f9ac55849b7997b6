"""`eva02-at convert`: any supported checkpoint to a plain inference file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_modules.cli.model_options import add_model_options, reading
from lightning_modules.cli.parser import CommandParser
from lightning_modules.cli.startup import importing
from lightning_modules.training.closing import close


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        "convert",
        "Read a checkpoint of any supported kind without running code it may carry, and write "
        "FILE.safetensors with FILE.json, which together rebuild the model.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--input",
        metavar="PATH",
        help="a run's folder (its newest complete checkpoint), one checkpoint's folder, a "
        "Lightning .ckpt, a DeepSpeed folder of any ZeRO stage, or a file of BAAI, open_clip, "
        "OpenAI, AVION or LaViLa; or hf:ORG/NAME[/FILE][@REV] on the Hugging Face Hub",
    )
    which.add_argument(
        "--interpolate",
        nargs="+",
        metavar="PATH",
        help="several checkpoints of one architecture: the weighted mean of their weights (with "
        "--average, of their moving averages)",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        type=float,
        metavar="W",
        help="of --interpolate, one a checkpoint; their sum is taken as 1 (equal)",
    )
    parser.add_argument("--output", required=True, metavar="FILE.safetensors", type=Path)
    group = parser.add_argument_group("sharing")
    group.add_argument("--push", metavar="ORG/NAME", help="upload the result to the Hub")
    group.add_argument("--private", action="store_true", help="where --push makes a repository")
    group.add_argument("--licence", metavar="ID", help="of the weights: mit, cc-by-nc-4.0, ...")
    group.add_argument(
        "--results",
        nargs="+",
        default=[],
        type=Path,
        metavar="FILE",
        help="what `evaluate --json` wrote: the card's figures",
    )
    add_model_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """Convert one checkpoint.

    Args:
        argv: Words after `eva02-at convert`.
    """
    options = _parser().parse_args(argv)
    if options.push is None and (options.private or options.licence or options.results):
        raise ValueError("--private, --licence and --results go with --push")
    if options.push is not None and options.licence is None:
        raise ValueError("--push needs --licence: what the data and the first weights permit")
    if options.weights and not options.interpolate:
        raise ValueError("--weights goes with --interpolate A B")
    with importing():
        from lightning_modules.checkpoints.conversion import load_trained, save_model
        from lightning_modules.checkpoints.interpolation import interpolate

    paths = options.interpolate or [options.input]
    parts = [load_trained(path, **reading(options)) for path in paths]
    loaded = interpolate(parts, options.weights) if options.interpolate else parts[0]
    description = save_model(loaded, options.output)
    for part in parts:
        print(f"read {part.source.path}: {part.report.summary()}")
    for share in loaded.parts:
        print(f"{share['weight']:.4g} of {share['source']}")
    for assumption in loaded.assumed:
        print(f"assumed {assumption}")
    print(f"wrote {options.output} and {description}")
    if options.push is not None:
        from lightning_modules.checkpoints.sharing import model_card, push_model

        card = model_card(options.push, loaded, options.licence, options.results)
        commit = push_model(options.push, options.output, card, private=options.private)
        print(f"pushed to {commit}")
    close("search", "--checkpoint", options.output, "--videos", "DIR", "--serve")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
