"""What every HTML page of this project shares: its style, light and dark, and its frame."""

from __future__ import annotations

import html
from importlib import resources


def base_style() -> str:
    """The style sheet that all pages begin with."""
    return resources.files(__package__).joinpath("base.css").read_text(encoding="utf-8")


def page(title: str, body: str, style: str = "", head: str = "") -> str:
    """Frame a page that loads nothing from elsewhere.

    Args:
        title: Plain text.
        body: HTML within `<main>`.
        style: What this page adds to the style sheet.
        head: HTML that this page adds to the head.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{base_style()}{style}</style>{head}</head>"
        f"<body><main>{body}</main></body></html>\n"
    )
