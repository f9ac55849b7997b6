"""`eva02-at shards build`: its options and its work."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from datamodules.annotations.formats import FORMATS, read_clips
from datamodules.annotations.mapped import Columns
from datamodules.annotations.rows import Rejects
from datamodules.shards.build import build_shards, parse_part
from datamodules.shards.estimate import estimate_build
from datamodules.shards.index import index_tars
from datamodules.shards.layouts import LAYOUTS, find_layout
from datamodules.shards.plan import BuildPlan
from datamodules.shards.rejects import MAX_REJECTS
from datamodules.video.decode import DECODERS
from datamodules.video.encode import RECIPES, EncodeOptions
from datamodules.video.frames import Limits
from lightning_modules.training.closing import close


def add_build(parser: argparse.ArgumentParser) -> None:
    """Add the options of `shards build`."""
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


def build(args: argparse.Namespace) -> int:
    """Build shards, index tars, or estimate a build."""
    limits = Limits(args.max_pixels, args.max_frames)
    if args.index_only:
        indexed = index_tars(
            args.output,
            num_workers=args.workers,
            progress=True,
            max_rejects=args.max_rejects,
            decoder=args.decoder,
            limits=limits,
            timeout_s=args.decode_timeout,
            reencode=_encode_options(args) if args.reencode else None,
        )
        print(indexed)
        _close(args)
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
        close(told="the same command without --dry-run")
        return 0
    report = build_shards(
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
    print(report)
    if report.manifest is None:
        close(told="the other parts; the last one writes the manifest")
    else:
        _close(args)
    return 0


def _close(args: argparse.Namespace) -> None:
    page = Path(args.output) / "shards.html"
    close("shards", "browse", args.output, "--html", page, told="look before you train")
