"""`eva02-at shards verify | info | browse`: their options and their work."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from datamodules.files import write_atomically
from datamodules.manifest import Manifest
from datamodules.shards.describe import describe, render
from datamodules.shards.verify import repair, verify
from lightning_modules.pages.shards import browse_shards
from lightning_modules.training.closing import close


def verify_shards(args: argparse.Namespace) -> int:
    """Verify shards, and repair their manifest; returns 1 for faults that stay."""
    manifest = Manifest.load(args.manifest)
    faults = verify(
        manifest, decode_every=args.decode_every, num_workers=args.workers, progress=True
    )
    for fault in faults:
        print(fault)
    print(f"{manifest.num_samples} samples in {len(manifest.shards)} shards; {len(faults)} faults")
    if not faults:
        close("shards", "info", args.manifest)
        return 0
    if not args.repair:
        close("shards", "verify", args.manifest, "--repair", "FILE", told="leaves them out")
        return 1
    mended = repair(manifest, faults, args.repair)
    print(f"{args.repair}: {mended.num_samples} samples in {len(mended.shards)} shards")
    close("shards", "verify", args.repair, wrote=(args.repair,))
    return 0


def info(args: argparse.Namespace) -> int:
    """Describe shards."""
    summary = describe(Manifest.load(args.manifest, args.allow_pipe))
    if args.json:
        write_atomically(Path(args.json), json.dumps(summary, indent=1) + "\n")
    print(render(summary))
    close("shards", "browse", args.manifest, "--html", "FILE.html", wrote=(args.json,))
    return 0


def add_verify(parser: argparse.ArgumentParser) -> None:
    """Add the options of `shards verify`."""
    add = parser.add_argument
    add("manifest", help="manifest.json, or its folder")
    add("--decode-every", type=int, default=100, metavar="N", help="decode each N-th (%(default)s)")
    add("--workers", type=int, default=1, metavar="N", help="processes (%(default)s)")
    add("--repair", metavar="FILE", help="write a manifest without the damaged samples")


def add_info(parser: argparse.ArgumentParser) -> None:
    """Add the options of `shards info`."""
    parser.add_argument("manifest", help="manifest.json, its folder, or its URL")
    parser.add_argument("--json", metavar="FILE", help="write all of it, whole histograms included")
    parser.add_argument(
        "--allow-pipe", action="store_true", help="run the command if MANIFEST is pipe:COMMAND"
    )


def browse(args: argparse.Namespace) -> int:
    """Write a page about shards."""
    if args.samples < 1:
        raise ValueError(f"--samples {args.samples}; at least 1")
    manifest = Manifest.load(args.manifest)
    write_atomically(Path(args.html), browse_shards(manifest, args.samples, args.workers))
    close(told=f"open {args.html} in a browser", wrote=(args.html,))
    return 0


def add_browse(parser: argparse.ArgumentParser) -> None:
    """Add the options of `shards browse`."""
    add = parser.add_argument
    add("manifest", help="manifest.json, or its folder")
    add("--html", required=True, metavar="FILE", help="the page: one file, nothing from elsewhere")
    add("--samples", type=int, default=48, metavar="N", help="to show (%(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="decoding processes (%(default)s)")
