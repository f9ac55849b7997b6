"""jsonargparse's reports in words: which key, what was given, what it must be."""

from __future__ import annotations

import re

_TYPES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list, such as [a, b]",
    "tuple": "a list, such as [a, b]",
    "dict": "a mapping of keys",
    "collections.abc.Iterable": "a list, such as [a, b]",
}
_KEY = re.compile(r'Parser key "([\w.]+)":\s*')
_TOLD = re.compile(r"([\w.]+) is .*; it must be ")  # by an inner parser, in words already
_EXPECTED = re.compile(
    r"Expected a (?:<class '(?P<type>[\w.]+)'>|typing\.Literal\[(?P<choices>[^\]]*)\]"
    r"|(?P<tuple>tuple with \d+ elements)|(?P<path>dot import path string))"
)
_GIVEN = (
    re.compile(r"Got value: (.*)"),
    re.compile(r"NestedArg\(key='[^']*', val=(?P<quote>'?)(.*)(?P=quote)\)$"),
    re.compile(r"Given value: (.*)"),
    re.compile(r"dot import path string: (.*)"),
)
_NOISE = ("Does not validate", "Subtypes:", "Errors:", "Expected a <class 'NoneType'>", "Given")


def shorten(message: str) -> str:
    """Say a parser's report in one line.

    A report of a type that was not met becomes "KEY is 'GIVEN'; it must be THIS or THAT"; of any
    other the causes are kept and the nested account of a union's branches is dropped.
    """
    lines = [line.strip(" -") for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(_NOISE)]
    outer = _KEY.match(message)
    told = next((line for line in kept if _TOLD.match(line)), None)
    if told is not None:
        return f"{outer[1]}.{told}" if outer else told
    expected = _expected(message)
    given = _given(lines)
    if outer and expected and given is not None:
        return f"{outer[1]} is {given!r}; it must be {' or '.join(expected)}"
    return " ".join(_KEY.sub(r"\1: ", line).strip() for line in kept)


def _expected(message: str) -> list[str]:
    """What would have been right, each once; null is what nobody means to write."""
    found: dict[str, None] = {}
    for match in _EXPECTED.finditer(message):
        if match["choices"] is not None:
            words = ", ".join(choice.strip(" '\"") for choice in match["choices"].split(","))
            found[f"one of {words}"] = None
        elif match["path"] is not None:
            found[
                "its keys, or the path of a class that can be imported (package.module.Class)"
            ] = None
        elif match["tuple"] is not None:
            found[match["tuple"].replace("tuple with", "a list of")] = None
        elif match["type"] != "NoneType":
            found[_TYPES.get(match["type"], f"a {match['type'].rpartition('.')[2]}")] = None
    return list(found)


def _given(lines: list[str]) -> str | None:
    for pattern in _GIVEN:
        for line in lines:
            match = pattern.search(line)
            if match:
                return match[match.lastindex or 1].strip()
    return None
