"""Rasterises a `Scene`: flat shapes with soft edges, drawn at twice the size and reduced.

Coordinates: frame heights from the frame's centre, x right, y down. A frame depends only on the
scene's layout and on row `f` of its per-frame arrays, so that a reversed scene gives exactly the
same pictures in reverse order.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw

from lightning_modules.demo.world.scene import Item, Scene
from lightning_modules.demo.world.vocabulary import VERBS

_SUPERSAMPLE = 2
_MARGIN = 0.12  # of the frame height: how far the camera may wander over the table's picture
_RGB = tuple[int, int, int]
_Points = np.ndarray  # (n, 2) float64

_COLOURS: dict[str, _RGB] = {
    "red": (214, 48, 49),
    "yellow": (242, 196, 36),
    "green": (46, 160, 67),
    "blue": (45, 105, 215),
}
_SKINS: tuple[_RGB, ...] = ((241, 194, 160), (198, 140, 100), (141, 92, 62))

# Bodies in units of the item's size, about its centre; the lid's hinge is its left end.
_BODIES: dict[str, list[tuple[float, float]]] = {
    "box": [(-0.50, -0.28), (0.50, -0.28), (0.50, 0.42), (-0.50, 0.42)],
    "bottle": [
        (-0.14, -0.45),
        (0.14, -0.45),
        (0.14, -0.22),
        (0.27, -0.05),
        (0.27, 0.60),
        (-0.27, 0.60),
        (-0.27, -0.05),
        (-0.14, -0.22),
    ],
    "pot": [(0.55 * math.cos(a), -0.15 + 0.55 * math.sin(a)) for a in np.linspace(0, math.pi, 12)],
}
_LIDS: dict[str, tuple[float, float, float]] = {  # (hinge x, hinge y, length)
    "box": (-0.53, -0.30, 1.06),
    "bottle": (-0.22, -0.47, 0.55),
    "pot": (-0.58, -0.17, 1.16),
}
_LID_OPEN_RAD = math.radians(105)


def _shade(colour: _RGB, factor: float) -> _RGB:
    """Darken (factor < 1) or lighten towards white (factor > 1)."""
    if factor <= 1:
        return tuple(int(c * factor) for c in colour)  # type: ignore[return-value]
    return tuple(int(c + (255 - c) * (factor - 1)) for c in colour)  # type: ignore[return-value]


def _rotate(points: _Points, angle: float, about: tuple[float, float] = (0.0, 0.0)) -> _Points:
    """Rotate clockwise on the screen (y points down) by `angle` radians."""
    cos, sin = math.cos(angle), math.sin(angle)
    return (points - about) @ np.array([[cos, sin], [-sin, cos]]) + about


@lru_cache(maxsize=8)
def _table(kitchen: int, height: int, width: int) -> Image.Image:
    """The cluttered table top of one kitchen, larger than the frame by the camera's margin."""
    rng = np.random.default_rng([kitchen, 7])
    margin = round(_MARGIN * height)
    size = (width + 2 * margin, height + 2 * margin)
    base = rng.uniform(95, 190) + rng.uniform(-18, 18, size=3)

    def tone(spread: float) -> _RGB:
        values = np.clip(base + rng.uniform(-spread, spread) + rng.uniform(-6, 6, 3), 20, 235)
        return tuple(int(v) for v in values)  # type: ignore[return-value]

    image = Image.new("RGB", size, tone(0))
    pen = ImageDraw.Draw(image)
    step = int(height * rng.uniform(0.14, 0.3))
    for column, left in enumerate(range(0, size[0], step)):
        if kitchen % 2:  # tiles
            for row, top in enumerate(range(0, size[1], step)):
                if (row + column) % 2:
                    pen.rectangle((left, top, left + step, top + step), fill=tone(16))
        else:  # planks
            pen.rectangle((left, 0, left + step, size[1]), fill=tone(16))
            pen.line((left, 0, left, size[1]), fill=tone(40), width=2)
    for _ in range(45):  # crumbs, stains and cutlery
        x, y = rng.uniform(0, size[0]), rng.uniform(0, size[1])
        radius = height * rng.uniform(0.008, 0.05)
        if rng.uniform() < 0.7:
            squash = rng.uniform(0.5, 1.0)
            pen.ellipse(
                (x - radius, y - radius * squash, x + radius, y + radius * squash), fill=tone(45)
            )
        else:
            angle = rng.uniform(0, math.pi)
            dx, dy = 3 * radius * math.cos(angle), 3 * radius * math.sin(angle)
            pen.line((x - dx, y - dy, x + dx, y + dy), fill=tone(60), width=round(height * 0.02))
    return image


class _Painter:
    """Draws one frame in frame-height units onto the supersampled image."""

    def __init__(self, image: Image.Image, offset: np.ndarray) -> None:
        self.pen = ImageDraw.Draw(image, "RGBA")
        self.unit = image.height
        self.centre = np.array([image.width / 2, image.height / 2]) - offset * self.unit

    def polygon(self, points: _Points, fill: tuple[int, ...], edge: _RGB | None = None) -> None:
        xy = [tuple(p) for p in points * self.unit + self.centre]
        self.pen.polygon(xy, fill=fill)
        if edge is not None:
            self.pen.line([*xy, xy[0]], fill=edge, width=max(1, self.unit // 80), joint="curve")

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: tuple[int, ...]) -> None:
        left, top = np.array([x - rx, y - ry]) * self.unit + self.centre
        self.pen.ellipse((left, top, left + 2 * rx * self.unit, top + 2 * ry * self.unit), fill)

    def limb(self, start: _Points, end: _Points, width: float, fill: _RGB) -> None:
        """A thick straight line with round ends."""
        xy = [tuple(p * self.unit + self.centre) for p in (start, end)]
        self.pen.line(xy, fill=fill, width=round(width * self.unit))
        for x, y in (start, end):
            self.ellipse(x, y, width / 2, width / 2, fill)


def _paint_item(
    painter: _Painter,
    item: Item,
    *,
    shift: tuple[float, float] = (0.0, 0.0),
    grow: float = 1.0,
    turn: float = 0.0,
    lid: float = 0.0,
) -> tuple[_Points, _Points]:
    """Draw an object; return where a hand holds its body and its lid.

    Args:
        painter: The frame's painter.
        item: What to draw.
        shift: Displacement of the object from its place; upward shifts leave the shadow behind.
        grow: Factor on the size.
        turn: Rotation about the centre in radians, clockwise.
        lid: Opening angle of the lid in radians.
    """
    size = item.size * grow
    place = np.array([item.x + shift[0], item.y + shift[1]])
    lifted = -shift[1]
    painter.ellipse(
        place[0] + 0.02,
        item.y + 0.42 * item.size,
        size * 0.55,
        size * 0.2 * (1 - lifted),
        (0, 0, 0, round(95 - 110 * lifted)),
    )

    def to_frame(points: ArrayLike) -> _Points:
        return _rotate(np.asarray(points), item.tilt + turn) * size + place

    colour = _COLOURS[item.colour]
    edge = _shade(colour, 0.5)
    if item.shape == "pot":
        for side in (-1, 1):
            painter.limb(
                to_frame((side * 0.5, 0.0)),
                to_frame((side * 0.72, -0.04)),
                0.12 * size,
                _shade(colour, 0.6),
            )
    body = np.array(_BODIES[item.shape])
    painter.polygon(to_frame(body), colour, edge)
    # A light band on the left and a dark base tell up from down and left from right.
    left = body[:, 0].min()
    band = np.array(
        [(left * 0.62, -0.18), (left * 0.35, -0.18), (left * 0.3, 0.2), (left * 0.5, 0.2)]
    )
    painter.polygon(to_frame(band), _shade(colour, 1.6))

    x, y, length = _LIDS[item.shape]
    slab = np.array([(x, y - 0.1), (x + length, y - 0.1), (x + length, y + 0.03), (x, y + 0.03)])
    slab = _rotate(slab, -lid, about=(x, y))
    if lid > 0.1:  # the dark mouth under an open lid
        mouth = np.array(
            [
                (x + 0.08 * length, y - 0.02),
                (x + 0.92 * length, y - 0.02),
                (x + 0.85 * length, y + 0.08),
                (x + 0.15 * length, y + 0.08),
            ]
        )
        painter.polygon(to_frame(mouth), (35, 30, 35))
    painter.polygon(to_frame(slab), _shade(colour, 0.68), edge)
    tip = _rotate(np.array([(x + length, y - 0.04)]), -lid, about=(x, y))
    return to_frame((0.12, 0.3)), to_frame(tip)[0]


def _paint_hand(painter: _Painter, grip: _Points, side: float, skin: _RGB) -> None:
    """A forearm from below the frame to the grip, with a hand at its end; side -1 is the left."""
    elbow = np.array([0.8 * grip[0] + 0.35 * side, 0.75])
    painter.limb(elbow, grip, 0.10, _shade(skin, 0.82))
    painter.limb(elbow, grip + (elbow - grip) * 0.1, 0.085, skin)
    painter.ellipse(grip[0], grip[1], 0.062, 0.055, skin)
    for finger in (-0.035, 0.0, 0.035):
        painter.limb(grip, grip + np.array([finger - 0.02, -0.06]), 0.026, _shade(skin, 0.93))


def _pose(family: str, progress: float) -> dict[str, object]:
    """Keyword arguments of `_paint_item` for a handled object after a share of the action."""
    if family == "lid":
        return {"lid": progress * _LID_OPEN_RAD}
    if family == "lift":
        return {"shift": (0.0, 0.18 - 0.5 * progress), "grow": 1.0 + 0.1 * progress}
    if family == "slide":
        return {"shift": (0.3 - 0.6 * progress, 0.0)}
    return {"turn": math.radians(200) * (progress - 0.5)}


def draw_frame(scene: Scene, index: int, height: int, width: int) -> np.ndarray:
    """Draw frame `index` of a scene: (height, width, 3) uint8 RGB."""
    tall, wide = height * _SUPERSAMPLE, width * _SUPERSAMPLE
    camera = np.clip(scene.camera[index], -_MARGIN, _MARGIN)
    left, top = np.rint((camera + _MARGIN) * tall).astype(int)
    image = _table(scene.kitchen, tall, wide).crop((left, top, left + wide, top + tall))
    painter = _Painter(image, camera)
    for blob, (x, y) in enumerate(scene.drift[index]):  # other things that move on the table
        grey = 70 + 45 * ((scene.kitchen + blob) % 4)
        painter.ellipse(x, y, 0.06 + 0.02 * blob, 0.05, (grey, grey - 8, grey - 16, 200))
    family = VERBS[scene.verb_class].family
    grips = []
    for item in scene.items:
        pose = _pose(family, float(scene.progress[index])) if item.handled else {}
        body_grip, lid_grip = _paint_item(painter, item, **pose)  # type: ignore[arg-type]
        if item.handled:
            grips.append((lid_grip if family == "lid" else body_grip, item.x))
    for grip, x in grips:
        side = -1.0 if x < -0.15 else 1.0
        _paint_hand(painter, grip, side, _SKINS[scene.kitchen % len(_SKINS)])
    return np.asarray(image.reduce(_SUPERSAMPLE))


def draw_scene(scene: Scene, height: int = 96, width: int = 128) -> np.ndarray:
    """Draw all frames of a scene: (F, height, width, 3) uint8 RGB."""
    return np.stack([draw_frame(scene, f, height, width) for f in range(len(scene.progress))])
