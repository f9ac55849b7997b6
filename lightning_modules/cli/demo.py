"""`eva02-at demo`: the whole mission in small, through the commands that a cluster runs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lightning_modules.cli.startup import importing
from lightning_modules.training.closing import close


def main(argv: list[str]) -> int:
    """Run the demo.

    Args:
        argv: Words after `eva02-at demo`.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="eva02-at demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="(%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything (%(default)s)")
    parser.add_argument(
        "--clips",
        type=int,
        nargs=3,
        metavar=("PRETRAIN", "TRAIN", "TEST"),
        help="size of the world; even numbers",
    )
    args, words = parser.parse_known_args(argv)
    with importing():
        import torch

        from lightning_modules.cli.main import main as run_command
        from lightning_modules.demo.run import Demo, StageFailed
        from lightning_modules.demo.world import WorldOptions

    sizes = dict(zip(("num_pretrain", "num_train", "num_test"), args.clips or (), strict=False))
    # One core is the loader's: with a thread on each, every matrix product would wait for it.
    torch.set_num_threads(max(1, (os.cpu_count() or 2) - 1))
    demo = Demo(run_command, args.out, args.seed, WorldOptions(seed=args.seed, **sizes), words)
    try:
        metrics = demo.run()
    except StageFailed as failed:
        return failed.code
    gain = metrics["fine_tuned"]["map"]["avg"] / metrics["random"]["map"]["avg"]
    print(f"\nfine-tuned mAP {metrics['fine_tuned']['map']['avg']:.1f} % ({gain:.1f} x random)")
    model = args.out / "fine_tune" / "checkpoints"
    close(
        *("search", "--checkpoint", model, "--videos", args.out / "world" / "videos", "--serve"),
        wrote=(args.out / "report.html", args.out / "metrics.json"),
    )
    return 0
