"""What a check has to say, and how a screen and a file say it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

STATES = {"ok": "ok", "note": "note", "skipped": "--", "bad": "BAD"}
# what has to be the same on every node of a job
_SAME_EVERYWHERE = ("project", "torch", "driver")


@dataclass(frozen=True)
class Finding:
    """One line of the screen.

    Attributes:
        name: What was looked at.
        state: "ok"; "note", worth knowing; "skipped", could not be checked here; "bad", a training
            job would fail or crawl.
        text: What was found.
        mend: What to do about it, where it is bad.
        figures: Numbers, for `--json` and for `eva02-at plan --doctor`.
    """

    name: str
    state: str
    text: str
    mend: str = ""
    figures: Mapping[str, float | str] = field(default_factory=dict)


Check = Callable[[], Iterable[Finding]]


def run_check(name: str, check: Check) -> list[Finding]:
    """Run one check; its own failure is a finding too, and never the end of the others."""
    found = []
    try:
        for finding in check():
            found.append(finding)
    except Exception as error:  # drivers, compilers and file systems raise whatever they like
        last = (str(error).strip().splitlines() or [""])[-1]
        text = f"the check itself failed: {type(error).__name__}: {last}"
        found.append(Finding(name, "skipped", text))
    return found


def merge(by_node: Mapping[str, list[Finding]]) -> list[Finding]:
    """Make one list of every node's: what all say alike stands once, else with the node's name."""
    names = dict.fromkeys(f.name for findings in by_node.values() for f in findings)
    merged = []
    for name in names:
        saying: dict[tuple[str, str], list[str]] = {}
        first: dict[tuple[str, str], Finding] = {}
        for node, findings in by_node.items():
            for finding in findings:
                if finding.name == name:
                    key = (finding.state, finding.text)
                    saying.setdefault(key, []).append(node)
                    first.setdefault(key, finding)
        for key, nodes in saying.items():
            finding = first[key]
            where = "" if len(nodes) == len(by_node) else f"{', '.join(nodes)}: "
            merged.append(
                Finding(name, finding.state, where + finding.text, finding.mend, finding.figures)
            )
        if name in _SAME_EVERYWHERE and len(saying) > 1:
            merged.append(
                Finding(
                    name,
                    "bad",
                    "the nodes differ",
                    "give every node the same environment (one virtual environment on the shared "
                    "file system, or one container)",
                )
            )
    return merged


def verdict(findings: Iterable[Finding]) -> int:
    """Return the exit code: 1 where anything is bad."""
    return int(any(f.state == "bad" for f in findings))


def screen(title: str, findings: Iterable[Finding]) -> str:
    """Lay the findings out as text."""
    findings = list(findings)
    width = max(len(f.name) for f in findings)
    lines = [title, ""]
    for finding in findings:
        lines.append(f"{STATES[finding.state]:<5} {finding.name:<{width}}  {finding.text}")
        if finding.mend:
            lines.append(f"{'':<5} {'':<{width}}  mend: {finding.mend}")
    bad = sum(f.state == "bad" for f in findings)
    skipped = [f.name for f in findings if f.state == "skipped"]
    if skipped:
        lines += ["", f"not checked here: {', '.join(dict.fromkeys(skipped))}"]
    what = "nothing stands" if bad == 0 else "1 thing stands" if bad == 1 else f"{bad} things stand"
    lines += ["", f"{what} in the way of a training job"]
    return "\n".join(lines)


def as_json(findings: Iterable[Finding], cluster: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `--json` writes; `cluster` is what `eva02-at plan --doctor` reads."""
    findings = list(findings)
    return {
        "host": platform.node(),
        "exit_code": verdict(findings),
        "cluster": dict(cluster),
        "findings": [{**vars(f), "figures": dict(f.figures)} for f in findings],
    }
