"""What a manifest and its records must look like.

A manifest comes from a network, and its names become paths and URLs.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.manifest import ClipRecord

_NAME = re.compile(r"[\w +,.=@%-]+(/[\w +,.=@%-]+)*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_COUNTS, _HASHES, _NAMES = (
    ("num_samples", "num_bytes"),
    ("sha256", "index_sha256"),
    ("name", "index"),
)


def name_fault(name: Any) -> str | None:
    """Say why a file name may not stand in a manifest; None if it may.

    Names are relative to the manifest's place and stay below it, and nothing in them means
    anything to a shell or in a URL.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return (
            f"name {name!r:.200}: names are relative, and of letters, digits, spaces and +,.=@%-_ "
            "alone"
        )
    parts = name.split("/")
    if any(part in (".", "..") or part.startswith("-") for part in parts):
        return f"name {name!r:.200}: no part of it may be . or .. or begin with -"
    return None


def manifest_fault(content: dict[str, Any]) -> str | None:
    """Say what is wrong with the content of a manifest; None if nothing is."""
    for key, kind in (("shards", list), ("options", dict), ("source", dict)):
        if not isinstance(content.get(key), kind):
            return f"its {key!r} is missing or no {'list' if kind is list else 'object'}"
    total = 0
    for number, shard in enumerate(content["shards"]):
        fault = _shard_fault(shard)
        if fault is not None:
            return f"shard {number}: {fault}"
        total += shard["num_samples"]
    if content.get("num_samples", total) != total:
        return f"its shards hold {total} samples, not the {content['num_samples']!r} that it says"
    return None


def _shard_fault(shard: Any) -> str | None:
    if not isinstance(shard, dict) or set(shard) != {*_COUNTS, *_HASHES, *_NAMES}:
        has = sorted(shard) if isinstance(shard, dict) else shard
        return f"it must have {', '.join([*_NAMES, *_COUNTS, *_HASHES])}, not {has!r:.200}"
    for key in _NAMES:
        if (fault := name_fault(shard[key])) is not None:
            return fault
    for key in _COUNTS:
        if type(shard[key]) is not int or not 0 <= shard[key] < 2**63:
            return f"{key} {shard[key]!r:.100} is no count"
    for key in _HASHES:
        if not isinstance(shard[key], str) or not _SHA256.fullmatch(shard[key]):
            return f"{key} {shard[key]!r:.100} is no SHA-256 in 64 hexadecimal digits"
    return None


def check_record(record: ClipRecord, may_be_silent: bool = False) -> ClipRecord:
    """Refuse what a loader, a tokenizer or a tensor would choke on later.

    Args:
        record: What was read from somewhere.
        may_be_silent: A blank text is allowed.

    Returns:
        The same record.

    Raises:
        ValueError: A name or text is no text, or blank, or cannot be written as UTF-8; a time is
            not finite; a class id is no integer from 0 to 2^63 - 1.
    """
    for name, text in (
        ("clip id", record.clip_id),
        ("video id", record.video_id),
        *(("text", text) for text in record.texts or (None,)),
    ):
        if not isinstance(text, str):
            raise ValueError(f"its {name} is missing")
        if not (text.strip() or (name == "text" and may_be_silent)):
            raise ValueError(f"its {name} is blank")
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ValueError(f"its {name} {text!r:.200} is no valid Unicode")
    for time_s in (record.start_s, record.end_s):
        if not isinstance(time_s, int | float) or not math.isfinite(time_s):
            raise ValueError(f"its span {record.start_s!r}-{record.end_s!r} is no two times")
    for number in (*record.verb_classes, *record.noun_classes):
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(f"class id {number!r:.100} is no integer from 0 to 2^63 - 1")
    return record
