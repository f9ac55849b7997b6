"""Similarity and relevance as pictures whose rows and columns are sorted by verb, then noun."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from markupsafe import Markup, escape
from PIL import Image

from lightning_modules.demo.world.vocabulary import NOUNS, VERBS

_SIDE, _LEFT = 300, 88  # of the picture and of the labels beside it
# Dark blue to yellow by way of green, rising in lightness, so that it reads in grey as well.
_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))


def class_key(text: str) -> tuple[int, list[int]]:
    """Rows of `VERBS` and `NOUNS` that a sentence of the demo world names, to sort by.

    Args:
        text: Such as `push blue pot left`. A text of other words comes after all verbs.
    """
    verbs = (
        index
        for index, verb in enumerate(VERBS)
        if text.startswith(verb.base + " ") and text.endswith(" " + verb.tail if verb.tail else "")
    )
    nouns = sorted((text.find(noun), index) for index, noun in enumerate(NOUNS) if noun in text)
    return next(verbs, len(VERBS)), [index for _, index in nouns]


def matrix_picture(
    matrix: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    span: tuple[float, float],
    label: str,
) -> Markup:
    """Draw a matrix as SVG around a PNG, with lines between verbs and the verbs' names beside it.

    Args:
        matrix: (V, S).
        rows: V texts.
        columns: S texts.
        span: Values of the darkest and the lightest colour.
        label: What a screen reader says in the picture's place.
    """
    row_keys = sorted((class_key(text), row) for row, text in enumerate(rows))
    column_keys = sorted((class_key(text), column) for column, text in enumerate(columns))
    ordered = matrix[[row for _, row in row_keys]][:, [column for _, column in column_keys]]
    parts = [
        f'<image x="{_LEFT}" y="0" width="{_SIDE}" height="{_SIDE}" preserveAspectRatio="none" '
        f'href="data:image/png;base64,{_png(ordered, span)}"/>'
    ]
    for verb, start, stop in _blocks([key[0] for key, _ in row_keys]):
        top, bottom = _SIDE * start / len(rows), _SIDE * stop / len(rows)
        name = VERBS[verb].name if verb < len(VERBS) else "other"
        parts.append(
            f'<text x="{_LEFT - 6}" y="{(top + bottom) / 2 + 3.5:.1f}" text-anchor="end">'
            f"{escape(name.replace('turn-', ''))}</text>"
        )
        if start:
            parts.append(_line(_LEFT, top, _LEFT + _SIDE, top))
    for _, start, _ in _blocks([key[0] for key, _ in column_keys]):
        if start:
            x = _LEFT + _SIDE * start / len(columns)
            parts.append(_line(x, 0, x, _SIDE))
    return Markup(
        f'<svg class="matrix" viewBox="0 0 {_LEFT + _SIDE} {_SIDE}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def colour_scale() -> Markup:
    """The colours from dark to light as a CSS gradient."""
    return Markup("linear-gradient(90deg,{})").format(
        Markup(",").join(f"rgb{colour}" for colour in _COLOURS)
    )


def _blocks(verbs: Sequence[int]) -> list[tuple[int, int, int]]:
    """(verb, start, stop) of each run of equal verbs."""
    blocks, start = [], 0
    for verb, members in groupby(verbs):
        stop = start + len(list(members))
        blocks.append((verb, start, stop))
        start = stop
    return blocks


def _line(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _png(matrix: np.ndarray, span: tuple[float, float]) -> str:
    low, high = span
    share = np.clip((np.nan_to_num(matrix) - low) / max(high - low, 1e-12), 0, 1)
    stops = np.linspace(0, 1, len(_COLOURS))
    channels = [np.interp(share, stops, channel) for channel in np.array(_COLOURS).T]
    image = Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
