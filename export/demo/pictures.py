"""The pictures and captions that the built-in model is trained on, drawn from nothing but NumPy and Pillow.

A picture is one shape in one colour on a plain background of another colour, small or large, left, centre or right.
Some (shape, colour, background) triples are held out of training (`held_out`), so that a test can ask whether the
model composes what it knows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SIZE = 64
"""Height and width of a training picture in pixels."""

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 35),
    "green": (25, 155, 60),
    "blue": (30, 65, 215),
    "yellow": (250, 220, 25),
    "orange": (245, 135, 20),
    "purple": (140, 40, 170),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
SIZES = {"small": 9.5, "large": 17.0}
"""Radius of a shape in pixels."""
POSITIONS = {"left": 20.0, "centre": 32.0, "right": 44.0}
"""Horizontal centre of a shape in pixels; vertically every shape is in the middle."""

_SUPERSAMPLING = 8
_HELD_OUT_EVERY = 7


@dataclass(frozen=True)
class Scene:
    """What one picture shows. `shift` (x, y) in pixels and `zoom` are the variation that captions do not mention."""

    shape: str
    colour: str
    background: str
    size: str = "large"
    position: str = "centre"
    shift: tuple[float, float] = (0.0, 0.0)
    zoom: float = 1.0

    @property
    def triple(self) -> tuple[str, str, str]:
        return self.shape, self.colour, self.background


def triples() -> Iterator[tuple[str, str, str]]:
    """Every (shape, colour, background) with two different colours, 336 in all, in a fixed order."""
    for shape in SHAPES:
        for colour in COLOURS:
            for background in COLOURS:
                if colour != background:
                    yield shape, colour, background


def held_out() -> frozenset[tuple[str, str, str]]:
    """The 48 triples that training never sees: every shape, every colour and every background is among them."""
    shuffled = list(triples())
    np.random.default_rng(7).shuffle(shuffled)
    return frozenset((shape, colour, background) for shape, colour, background in shuffled[::_HELD_OUT_EVERY])


def _polygon(shape: str) -> list[tuple[float, float]]:
    """The outline of a straight-edged shape around the origin, for radius 1; y points down."""
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    if shape == "triangle":
        return [(0.0, -1.05), (1.1, 0.9), (-1.1, 0.9)]
    if shape == "cross":
        a, b = 0.34, 1.0
        return [
            (-a, -b),
            (a, -b),
            (a, -a),
            (b, -a),
            (b, a),
            (a, a),
            (a, b),
            (-a, b),
            (-a, a),
            (-b, a),
            (-b, -a),
            (-a, -a),
        ]
    points = []
    for i in range(10):
        radius, angle = (1.15, 0.48)[i % 2], math.pi * (i / 5 - 0.5)
        points.append((radius * math.cos(angle), radius * math.sin(angle) + 0.08))
    return points


def coverage(scene: Scene, size: int = SIZE) -> np.ndarray:
    """How much of each pixel the shape covers, [size, size] float32 in 0..1, with antialiased edges."""
    scale = _SUPERSAMPLING * size / SIZE
    centre_x = (POSITIONS[scene.position] + scene.shift[0]) * scale
    centre_y = (SIZE / 2 + scene.shift[1]) * scale
    radius = SIZES[scene.size] * scene.zoom * scale
    canvas = Image.new("L", (size * _SUPERSAMPLING,) * 2, 0)
    draw = ImageDraw.Draw(canvas)

    def disc(r: float, value: int) -> None:
        draw.ellipse((centre_x - r, centre_y - r, centre_x + r, centre_y + r), fill=value)

    if scene.shape in ("circle", "ring"):
        disc(radius, 255)
        if scene.shape == "ring":
            disc(0.55 * radius, 0)
    else:
        draw.polygon([(centre_x + x * radius, centre_y + y * radius) for x, y in _polygon(scene.shape)], fill=255)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def picture(scene: Scene, size: int = SIZE) -> np.ndarray:
    """The scene as pixels, [size, size, 3] uint8."""
    cover = coverage(scene, size)[..., None]
    mixed = cover * np.array(COLOURS[scene.colour], np.float32) + (1 - cover) * np.array(
        COLOURS[scene.background], np.float32
    )
    return np.round(mixed).astype(np.uint8)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def caption(scene: Scene, rng: np.random.Generator | None = None) -> str:
    """A description of the scene. Without `rng` the plain one, "a large red circle on a blue background" (and where it
    is, unless that is the centre); with it one of many wordings, some of which leave out the size."""
    size, side = scene.size, scene.position
    if rng is None:
        where = "" if side == "centre" else f" on the {side}"
        ground = f"{_article(scene.background)} {scene.background} background"
        return f"{_article(size)} {size} {scene.colour} {scene.shape}{where} on {ground}"
    named = [scene.colour, scene.shape] if rng.random() < 0.2 else [size, scene.colour, scene.shape]
    words = " ".join(named)
    if rng.random() < 0.85:
        words = f"{_article(words)} {words}"
    centre = str(rng.choice(["centre", "center", "middle"]))
    if side == "centre" and rng.random() < 0.6:
        where = ""
    elif side == "centre":
        where = str(rng.choice([" in the {0}", " at the {0}"])).format(centre)
    else:
        where = str(rng.choice([" on the {0}", " at the {0}", " on the {0} side", " to the {0}"])).format(side)
    ground = scene.background
    behind = str(
        rng.choice(
            [
                f" on {_article(ground)} {ground} background",
                f" on {ground}",
                f" with {_article(ground)} {ground} background",
                f" in front of {_article(ground)} {ground} background",
                f", {ground} background",
            ]
        )
    )
    opening = str(rng.choice(["", "", "", "a picture of ", "a drawing of ", "an image of "]))
    ordered = words + where + behind if rng.random() < 0.6 else words + behind + (f",{where}" if where else "")
    return opening + ordered + ("." if rng.random() < 0.1 else "")
