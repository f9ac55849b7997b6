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
    parser.add_argument(
        "--input",
        required=True,
        metavar="PATH",
        help="a run's folder (its newest complete checkpoint), one checkpoint's folder, a "
        "Lightning .ckpt, a DeepSpeed folder of any ZeRO stage, or a file of BAAI, open_clip, "
        "OpenAI, AVION or LaViLa; or hf:ORG/NAME[/FILE][@REV] on the Hugging Face Hub",
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
    with importing():
        from lightning_modules.checkpoints.conversion import load_trained, save_model

    loaded = load_trained(options.input, **reading(options))
    description = save_model(loaded, options.output)
    print(f"read {loaded.source.path}: {loaded.report.summary()}")
    for assumption in loaded.assumed:
        print(f"assumed {assumption}")
    print(f"wrote {options.output} and {description}")
    if options.push is not None:
        from lightning_modules.sharing import model_card, push_model

        card = model_card(options.push, loaded, options.licence, options.results)
        commit = push_model(options.push, options.output, card, private=options.private)
        print(f"pushed to {commit}")
    close("search", "--checkpoint", options.output, "--videos", "DIR", "--serve")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
