"""What a manifest must look like: it comes from a network, and its names become paths and URLs."""

from __future__ import annotations

import re
from typing import Any

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
