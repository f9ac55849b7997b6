"""Public checkpoints that this software reads: where they are, and what their publishers say.

`zoo.yaml` beside this file is the table; every fact in it has its source.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import yaml

from datamodules.files import write_whole

_TABLE = Path(__file__).with_suffix(".yaml")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class ZooEntry:
    """A public checkpoint.

    Attributes:
        name: In this table.
        by: Who published it.
        source: Where the facts are from.
        read: "yes", "start" or "no": see the table.
        address: A URL, or `hf:ORG/NAME/FILE`.
        hash: `sha256:...` or `md5:...` as published, which may be its first digits only.
        licence: As its publisher says.
        settings: `FIELD=VALUE` that shapes do not tell.
        benchmark: Of this software, on which `figures` can be checked.
        figures: As reported by the publisher unless it says otherwise.
        note: What else to know.
    """

    name: str
    by: str
    source: str
    read: str
    address: str = ""
    hash: str = ""
    licence: str = ""
    settings: tuple[str, ...] = ()
    benchmark: str = ""
    figures: str = ""
    note: str = ""

    @property
    def command(self) -> str:
        """The one command that checks its figures; empty where no benchmark here does."""
        if not self.benchmark:
            return ""
        return (
            f"eva02-at evaluate --zoo {self.name} --benchmark {self.benchmark} --shards MANIFEST "
            "--annotations DIR"
        )


@lru_cache(maxsize=1)
def zoo() -> dict[str, ZooEntry]:
    """The table, by name."""
    raw = yaml.safe_load(_TABLE.read_text())
    return {
        name: ZooEntry(name, **{**row, "settings": tuple(row.get("settings", ()))})
        for name, row in raw.items()
    }


def find_entry(name: str) -> ZooEntry:
    """Find an entry.

    Raises:
        ValueError: There is none of this name.
    """
    if name in zoo():
        return zoo()[name]
    near = difflib.get_close_matches(name, zoo())
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"the zoo has no {name!r} (`eva02-at zoo` lists them){hint}")


def checkpoint_of(entry: ZooEntry) -> str:
    """Return what `--checkpoint` takes: `hf:...`, or the file, fetched once and compared.

    Files of URLs lie in `~/.cache/eva02-at/zoo` (`EVA02_AT_CACHE`).

    Raises:
        ValueError: It cannot be read here or fetched, or is not what its publisher published.
    """
    if entry.read == "no":
        raise ValueError(f"{entry.name} cannot be read: {entry.note}")
    if entry.address.startswith("hf:"):
        return entry.address
    root = Path(os.environ.get("EVA02_AT_CACHE", Path.home() / ".cache" / "eva02-at"))
    path = root / "zoo" / f"{entry.name}{Path(entry.address).suffix}"
    if not path.is_file():
        print(f"fetching {entry.address} to {path}", flush=True)
        write_whole(path, lambda temporary: _fetch(entry, temporary))
    return str(path)


def _fetch(entry: ZooEntry, path: Path) -> None:
    kind, _, expected = entry.hash.partition(":")
    digest = hashlib.new(kind) if kind else hashlib.sha256()
    try:
        with urllib.request.urlopen(entry.address, timeout=60) as answer, path.open("wb") as file:
            while chunk := answer.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
    except (urllib.error.URLError, OSError) as error:
        raise ValueError(
            f"{entry.address} cannot be fetched ({error}); fetch it by hand and give --checkpoint"
        ) from None
    found = digest.hexdigest()
    if not found.startswith(expected):
        raise ValueError(
            f"{entry.address} is not what was published: {kind} {found}, not {expected}"
        )
