"""`eva02-at shards build | verify | info | browse`: annotations and videos to WebDataset shards."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from datamodules.annotations.formats import FORMATS, read_clips
from datamodules.annotations.mapped import Columns
from datamodules.annotations.rows import Rejects
from datamodules.files import write_atomically
from datamodules.manifest import Manifest
from datamodules.shards.build import build_shards, parse_part
from datamodules.shards.describe import describe, render
from datamodules.shards.estimate import estimate_build
from datamodules.shards.index import index_tars
from datamodules.shards.layouts import LAYOUTS, find_layout
from datamodules.shards.plan import BuildPlan
from datamodules.shards.rejects import MAX_REJECTS
from datamodules.shards.verify import repair, verify
from datamodules.video.decode import DECODERS
from datamodules.video.encode import RECIPES, EncodeOptions
from datamodules.video.frames import Limits
from lightning_modules.cli.parser import CommandParser


def _add_build(parser: argparse.ArgumentParser) -> None:
    default = EncodeOptions()
    add = parser.add_argument
    add("--output", required=True, metavar="DIR", help="folder to write to")
    add("--annotations", metavar="FILE", help="annotation file")
    add("--format", choices=[*FORMATS, "csv"], help="its format; csv is any table, see --columns")
    add(
        "--columns",
        nargs="+",
        default=[],
        metavar="FIELD=COLUMN",
        help="for csv: which column holds video_id, start_s, end_s, text (and clip_id, "
        "verb_classes, noun_classes)",
    )
    add("--videos", metavar="DIR", help="folder of source videos")
    add(
        "--layout",
        default="whole",
        help=f"how they lie there: {', '.join(LAYOUTS)}, or a pattern such as "
        "'{video_id}/{index}.mp4' (then with --chunk-seconds)",
    )
    add("--chunk-seconds", type=int, metavar="N", help="chunk length of a pattern")
    add("--recipe", choices=list(RECIPES), help="a set of the six options below")
    add("--short-side", type=int, metavar="PX", help=f"shorter side ({default.short_side})")
    add("--fps", type=float, help="frames a second (the source's)")
    add("--gop", type=int, metavar="N", help=f"frames from key frame to key frame ({default.gop})")
    add("--crf", type=int, metavar="N", help=f"x264's quality, 0-51 ({default.crf})")
    add("--preset", help=f"x264's trade of time for size ({default.preset})")
    add(
        "--fast-decode",
        action=argparse.BooleanOptionalAction,
        default=None,
        help=f"no arithmetic coding, no deblocking ({'on' if default.fast_decode else 'off'})",
    )
    add("--samples-per-shard", type=int, default=1000, metavar="N", help="rows (%(default)s)")
    add("--workers", type=int, default=1, metavar="N", help="processes (%(default)s)")
    add("--part", default="0/1", metavar="I/N", help="build the I-th of N parts, from 0")
    add(
        "--max-rejects",
        type=float,
        default=MAX_REJECTS,
        metavar="SHARE",
        help="end, without a manifest, if more of the rows and clips is rejected (%(default)s)",
    )
    add("--dry-run", action="store_true", help="say how many clips, hours and bytes; write nothing")
    add(
        "--index-only",
        action="store_true",
        help="write indexes and a manifest for the tars that --output holds already",
    )
    add(
        "--reencode",
        action="store_true",
        help="with --index-only: store clips anew that training would not see as they play (into "
        "NAME.reencoded.tar, by the options above), instead of rejecting them",
    )
    add(
        "--decoder",
        choices=DECODERS,
        default="auto",
        help="with --index-only: what training is to decode the tars with (%(default)s)",
    )
    bounds = Limits()
    add("--max-pixels", type=int, default=bounds.max_pixels, help="of a frame (%(default)s)")
    add("--max-frames", type=int, default=bounds.max_frames, help="of a clip (%(default)s)")
    add(
        "--decode-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="with --index-only: seconds that a clip may take (%(default)s)",
    )


def _encode_options(args: argparse.Namespace) -> EncodeOptions:
    """The recipe's options, each overridden by its own flag."""
    base = RECIPES[args.recipe] if args.recipe else EncodeOptions()
    names = ("short_side", "fps", "gop", "crf", "preset", "fast_decode")
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return dataclasses.replace(base, **given)


def _build(args: argparse.Namespace) -> int:
    limits = Limits(args.max_pixels, args.max_frames)
    if args.index_only:
        print(
            index_tars(
                args.output,
                num_workers=args.workers,
                progress=True,
                max_rejects=args.max_rejects,
                decoder=args.decoder,
                limits=limits,
                timeout_s=args.decode_timeout,
                reencode=_encode_options(args) if args.reencode else None,
            )
        )
        return 0
    missing = [f"--{n}" for n in ("annotations", "format", "videos") if getattr(args, n) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be given (or --index-only)")
    annotations, rejects = Path(args.annotations), Rejects()
    clips = read_clips(annotations, args.format, Columns.parse(args.columns), rejects)
    built: dict[str, Any] = {
        "videos": Path(args.videos),
        "layout": find_layout(args.layout, args.chunk_seconds),
        "output": Path(args.output),
        "options": _encode_options(args),
        "samples_per_shard": args.samples_per_shard,
        "lost_rows": rejects.rows,
        "limits": limits,
    }
    if args.dry_run:
        print(estimate_build(BuildPlan(clips, **built)))
        return 0
    print(
        build_shards(
            clips,
            **built,
            source={
                "annotations": annotations.name,
                "format": args.format,
                "annotations_sha256": hashlib.sha256(annotations.read_bytes()).hexdigest(),
            },
            num_workers=args.workers,
            part=parse_part(args.part),
            progress=True,
            max_rejects=args.max_rejects,
        )
    )
    return 0


def _verify(args: argparse.Namespace) -> int:
    manifest = Manifest.load(args.manifest)
    faults = verify(
        manifest, decode_every=args.decode_every, num_workers=args.workers, progress=True
    )
    for fault in faults:
        print(fault)
    print(f"{manifest.num_samples} samples in {len(manifest.shards)} shards; {len(faults)} faults")
    if not faults:
        return 0
    if not args.repair:
        return 1
    mended = repair(manifest, faults, args.repair)
    print(f"{args.repair}: {mended.num_samples} samples in {len(mended.shards)} shards")
    return 0


def _info(args: argparse.Namespace) -> int:
    summary = describe(Manifest.load(args.manifest, args.allow_pipe))
    if args.json:
        write_atomically(Path(args.json), json.dumps(summary, indent=1) + "\n")
    print(render(summary))
    return 0


def _add_verify(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("manifest", help="manifest.json, or its folder")
    add("--decode-every", type=int, default=100, metavar="N", help="decode each N-th (%(default)s)")
    add("--workers", type=int, default=1, metavar="N", help="processes (%(default)s)")
    add("--repair", metavar="FILE", help="write a manifest without the damaged samples")


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("manifest", help="manifest.json, its folder, or its URL")
    parser.add_argument("--json", metavar="FILE", help="write all of it, whole histograms included")
    parser.add_argument(
        "--allow-pipe", action="store_true", help="run the command if MANIFEST is pipe:COMMAND"
    )


def _browse(args: argparse.Namespace) -> int:
    from lightning_modules.pages.shards import browse_shards

    if args.samples < 1:
        raise ValueError(f"--samples {args.samples}; at least 1")
    manifest = Manifest.load(args.manifest)
    write_atomically(Path(args.html), browse_shards(manifest, args.samples, args.workers))
    print(f"page in {args.html}")
    return 0


def _add_browse(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("manifest", help="manifest.json, or its folder")
    add("--html", required=True, metavar="FILE", help="the page: one file, nothing from elsewhere")
    add("--samples", type=int, default=48, metavar="N", help="to show (%(default)s)")
    add("--workers", type=int, default=2, metavar="N", help="decoding processes (%(default)s)")


# name -> (what it does, its options, its work)
COMMANDS = {
    "build": ("make shards from annotations and videos, or go on with it", _add_build, _build),
    "verify": (
        "compare shards with their manifest; exit code 1 if they differ",
        _add_verify,
        _verify,
    ),
    "info": ("counts, sizes, durations, classes", _add_info, _info),
    "browse": ("a page to look at: samples, histograms, rejects", _add_browse, _browse),
}


def main(argv: list[str]) -> int:
    """Run one subcommand.

    Args:
        argv: Words after `eva02-at shards`.

    Returns:
        The exit code; 1 if `verify` found faults and was not told to repair.

    Raises:
        ValueError: For the user's mistakes.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: eva02-at shards COMMAND [options]\n")
        print("\n".join(f"  {name:<8}{text}" for name, (text, _, _) in COMMANDS.items()))
        return 0 if argv else 2
    name, *rest = argv
    if name not in COMMANDS:
        raise ValueError(f"unknown command `shards {name}`; one of: {', '.join(COMMANDS)}")
    text, add_options, work = COMMANDS[name]
    parser = CommandParser(f"shards {name}", text)
    add_options(parser)
    return work(parser.parse_args(rest))
