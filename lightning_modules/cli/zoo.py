"""`eva02-at zoo`: the public checkpoints that this software reads."""

from __future__ import annotations

import sys

from lightning_modules.checkpoints.zoo import ZooEntry, find_entry, zoo
from lightning_modules.cli.parser import CommandParser
from lightning_modules.training.closing import close

_READ = {"yes": "read", "start": "to start from", "no": "not read"}


def main(argv: list[str]) -> int:
    """List the zoo, or show one of it.

    Args:
        argv: Words after `eva02-at zoo`.
    """
    parser = CommandParser("zoo", "Without a name: list public checkpoints. With one: show it.")
    parser.add_argument("name", nargs="?", help="as listed")
    parser.add_argument("--markdown", action="store_true", help="the table of docs/zoo.md")
    options = parser.parse_args(argv)
    if options.markdown:
        print(markdown(), end="")
    elif options.name:
        entry = find_entry(options.name)
        print(_shown(entry))
        close("evaluate", "--zoo", entry.name, "--help")
    else:
        for entry in zoo().values():
            print(f"{entry.name:<26}{_READ[entry.read]:<15}{entry.by:<22}{entry.figures}")
        print("\nFigures are their publishers'; none has been checked here.")
        close("zoo", "NAME")
    return 0


def _shown(entry: ZooEntry) -> str:
    facts = {
        "published by": entry.by,
        "address": entry.address,
        "hash": entry.hash,
        "licence": entry.licence,
        "read here": _READ[entry.read] + (f": {entry.note}" if entry.note else ""),
        "settings": " ".join(entry.settings),
        "reported": entry.figures,
        "checked here": "never run",
        "check with": entry.command,
        "source": entry.source,
    }
    return "\n".join(f"{title:<14}{value}" for title, value in facts.items() if value)


def markdown() -> str:
    """The whole zoo as a Markdown table."""
    rows = [
        "| name | published by | read here | licence | hash | reported (unchecked) | address |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in zoo().values():
        read = _READ[entry.read] + (f": {entry.note}" if entry.note else "")
        place = entry.address.removeprefix("hf:")
        if entry.address.startswith("hf:"):
            place = f"`{entry.address}`"
        elif place:
            place = f"[link]({place})"
        told = f"`{entry.hash[:15]}`" if entry.hash else ""
        cells = [f"`{entry.name}`", entry.by, read, entry.licence, told, entry.figures, place]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
