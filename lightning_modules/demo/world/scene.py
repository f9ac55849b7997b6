"""What happens in one segment, as numbers: objects, the handled ones' phase, the camera.

The arrow of time is the only thing that tells a verb from its reversal. An action is one stroke
from one end to the other with a short rest before and after; its reversal is the same stroke
backwards:

    position   1 |        .--           --.
                 |      .'                 '.          `open` left, `close` right
               0 |____.'                     '.____

So the frames of a clip as a set, without their order, are distributed alike for both verbs of a
family, and a frame alone tells how far open the lid is but not whether it is opening: it takes two
frames and their order. (Strokes that also began and ended in the same pose were tried: a model that
trains within the demo's minutes did not learn their direction, 45 % of verbs against 39 % on
shuffled frames, where single strokes gave 64 % against 34 %.)
Everything else that moves (camera, drifting clutter) follows sums of sinusoids with uniform
phases, whose law does not change under time reversal either.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from lightning_modules.demo.world.vocabulary import COLOURS, NOUNS, SHAPES, VERBS, reversed_verb

_REST = 0.08  # of the segment, before and after the action


@dataclass(frozen=True)
class Item:
    """An object on the table.

    Attributes:
        shape: One of `SHAPES`.
        colour: One of `COLOURS`.
        x: Horizontal centre, in frame heights from the frame's centre.
        y: Vertical centre, in frame heights from the frame's centre, downwards.
        size: Width, in frame heights.
        tilt: Resting rotation in radians.
        handled: True where the hand moves it.
    """

    shape: str
    colour: str
    x: float
    y: float
    size: float
    tilt: float
    handled: bool


@dataclass(frozen=True)
class Scene:
    """One segment of F frames; `draw.draw_scene` turns it into pixels frame by frame.

    Attributes:
        verb_class: Row of `VERBS`.
        noun_classes: Rows of `NOUNS` that are handled, in the order of the narration.
        items: Every object in view, farthest first.
        progress: (F,) float64 in [0, 1], share of the family's forward action that is done; it
            falls from 1 to 0 for verbs of direction -1.
        camera: (F, 2) float64, view offset in frame heights (x right, y down).
        drift: (F, K, 2) float64, centres of K drifting clutter blobs, in frame heights.
        kitchen: Seed of the background; all segments of a video share it.
    """

    verb_class: int
    noun_classes: tuple[int, ...]
    items: tuple[Item, ...]
    progress: np.ndarray
    camera: np.ndarray
    drift: np.ndarray
    kitchen: int

    def reversed(self) -> Scene:
        """The same frames in reverse order, which show the verb's partner."""
        return replace(
            self,
            verb_class=reversed_verb(self.verb_class),
            progress=self.progress[::-1],
            camera=self.camera[::-1],
            drift=self.drift[::-1],
        )


def _wander(rng: np.random.Generator, times_s: np.ndarray, scale: float) -> np.ndarray:
    """(F, 2) smooth wandering whose law is the same backwards: three sinusoids an axis."""
    frequency_hz = rng.uniform(0.05, 0.45, size=(3, 2))
    phase = rng.uniform(0, 2 * np.pi, size=(3, 2))
    amplitude = rng.uniform(0.3, 1.0, size=(3, 2)) * scale / 2
    angle = 2 * np.pi * frequency_hz * times_s[:, None, None] + phase
    return (amplitude * np.sin(angle)).sum(axis=1)


def _place_items(rng: np.random.Generator, noun_classes: tuple[int, ...]) -> tuple[Item, ...]:
    """Put the handled objects and two or three others on separate places of the table."""
    num_others = 2
    free = [noun for noun in range(len(NOUNS)) if noun not in noun_classes]
    nouns = [*noun_classes, *rng.choice(free, size=num_others, replace=False)]
    # Handled objects stay inside the centre square, which every evaluation crop keeps.
    if len(noun_classes) == 1:
        places = [(rng.uniform(-0.1, 0.1), rng.uniform(-0.05, 0.12))]
    else:
        places = [
            (-0.24 + rng.uniform(-0.03, 0.03), rng.uniform(-0.05, 0.12)),
            (0.24 + rng.uniform(-0.03, 0.03), rng.uniform(-0.05, 0.12)),
        ]
    corners = [(-0.45, -0.3), (0.45, -0.3), (-0.52, 0.28), (0.52, 0.28), (0.0, -0.4)]
    chosen = rng.permutation(len(corners))[:num_others]
    places += [
        (corners[i][0] + rng.uniform(-0.06, 0.06), corners[i][1] + rng.uniform(-0.06, 0.06))
        for i in chosen
    ]
    items = [
        Item(
            shape=SHAPES[noun // len(COLOURS)],
            colour=COLOURS[noun % len(COLOURS)],
            x=x,
            y=y,
            size=rng.uniform(0.40, 0.46) * (1.0 if index < len(noun_classes) else 0.55),
            tilt=rng.uniform(-0.15, 0.15),
            handled=index < len(noun_classes),
        )
        for index, (noun, (x, y)) in enumerate(zip(nouns, places, strict=True))
    ]
    return tuple(sorted(items, key=lambda item: (item.handled, item.y)))


def sample_scene(
    rng: np.random.Generator,
    verb_class: int,
    noun_classes: tuple[int, ...],
    *,
    num_frames: int,
    fps: float,
    kitchen: int,
) -> Scene:
    """Draw one segment at random.

    Args:
        rng: Source of all randomness; equal generators give equal scenes.
        verb_class: Row of `VERBS`.
        noun_classes: One or two rows of `NOUNS`.
        num_frames: F.
        fps: Frames a second.
        kitchen: Seed of the background.

    Returns:
        The scene. For a verb and its reversal the drawn values differ in the order of `progress`
        alone, as a law: `sample(v)` and `sample(partner of v).reversed()` are equal in
        distribution.
    """
    times_s = np.arange(num_frames) / fps
    items = _place_items(rng, noun_classes)
    # Centred on the segment's middle, with symmetric jitter: the law is its own mirror image.
    half = 0.5 - _REST * rng.uniform(0.7, 1.3)
    centred = (np.arange(num_frames) + 0.5) / num_frames - 0.5 + rng.uniform(-0.04, 0.04)
    progress = np.clip(VERBS[verb_class].direction * centred / (2 * half) + 0.5, 0.0, 1.0)
    num_blobs = 3
    anchor = rng.uniform((-0.6, -0.45), (0.6, 0.45), size=(num_blobs, 2))
    drift = np.stack([_wander(rng, times_s, 0.25) for _ in range(num_blobs)], axis=1) + anchor
    return Scene(
        verb_class=verb_class,
        noun_classes=noun_classes,
        items=items,
        progress=progress,
        camera=_wander(rng, times_s, 0.06),
        drift=drift,
        kitchen=kitchen,
    )
