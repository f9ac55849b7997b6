"""`eva02-at convert`: any supported checkpoint to a plain inference file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lightning_modules.cli.model_options import add_model_options, reading
from lightning_modules.cli.parser import CommandParser


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
        "OpenAI, AVION or LaViLa",
    )
    parser.add_argument("--output", required=True, metavar="FILE.safetensors", type=Path)
    add_model_options(parser)
    return parser


def main(argv: list[str]) -> int:
    """Convert one checkpoint.

    Args:
        argv: Words after `eva02-at convert`.
    """
    options = _parser().parse_args(argv)
    from lightning_modules.checkpoints.conversion import load_trained, save_model

    loaded = load_trained(options.input, **reading(options))
    description = save_model(loaded, options.output)
    print(f"read {loaded.source.path}: {loaded.report.summary()}")
    for assumption in loaded.assumed:
        print(f"assumed {assumption}")
    print(f"wrote {options.output} and {description}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
