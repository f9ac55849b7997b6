"""What lies in a tar: its members in samples, and what is wrong with them."""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Group:
    """The members that share a key, the file name up to its first dot.

    Attributes:
        key: The key, with the folder that it lies in.
        members: Suffix (lower case) to member.
        fault: Why they are no sample.
    """

    key: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    fault: str | None = None


def tar_members(path: Path) -> tuple[list[tarfile.TarInfo], str | None]:
    """List the members of a tar whose data is all there, and say what is wrong with the rest.

    Python's reader, and webdataset's on top of it, end without a word at a damaged header: the
    rest of the tar vanishes. A sound tar ends with a block of zeros. A header may also say a size
    below zero, from which Python's reader steps backwards for ever.
    """
    members: list[tarfile.TarInfo] = []
    size = path.stat().st_size
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
            try:
                while (member := tar.next()) is not None:
                    if member.size < 0 or member.offset_data + member.size > size:
                        return members, (
                            f"cut short: {member.name!r:.200} would take {member.size} bytes from "
                            f"byte {member.offset_data} of {size}"
                        )
                    if not member.isdir():
                        members.append(member)
            except tarfile.TarError:
                return members, f"cut short: it ends at byte {size} within a member"
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                return members, f"what follows byte {tar.offset} cannot be read"
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        return members, f"no tar: {error}"
    return members, None


def group_members(members: list[tarfile.TarInfo]) -> list[Group]:
    """Put members together to samples, as webdataset does: those of a sample follow each other.

    A key that comes twice names two samples whose members cannot be told apart for certain, so
    both are at fault. Hidden files (macOS writes `._0001.mp4`) are left out.
    """
    groups: dict[str, Group] = {}
    last = None
    for member in members:
        parent, _, base = member.name.rpartition("/")
        if base.startswith("."):
            continue
        stem, _, suffix = base.partition(".")
        key = f"{parent}/{stem}" if parent else stem
        group = groups.setdefault(key, Group(key))
        suffix = suffix.lower()
        group.fault = group.fault or _fault(group, member, suffix, apart=key != last)
        group.members[suffix] = member
        last = key
    return list(groups.values())


def _fault(group: Group, member: tarfile.TarInfo, suffix: str, *, apart: bool) -> str | None:
    """What is wrong with one more member of a group."""
    if group.members and apart:
        return f"two samples are called {group.key!r:.200}"
    if suffix in group.members:
        return f"two members are called {member.name!r:.200}"
    if not member.isreg() or member.issparse():
        return f"{member.name!r:.200} is no plain file"
    return None
