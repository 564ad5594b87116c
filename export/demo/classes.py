"""The pictures of the class-conditional model: one shape in one colour on grey, 32 x 32 pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import pictures
from .pictures import SHAPES, Scene, coverage

SIZE = 32
"""Height and width in pixels."""

COLOURS = ("red", "green", "blue", "yellow")
BACKGROUND = "grey"
INKS = {**pictures.COLOURS, BACKGROUND: (128, 128, 128)}
"""Every colour by its name."""
SHIFT = 4.0
"""How far the centre moves from the middle, in units of pictures.SIZE: 2 pixels here."""
ZOOM = (0.85, 1.1)
"""The size of a shape, as a factor of a large one."""


@dataclass(frozen=True)
class Class:
    shape: str
    colour: str

    def __str__(self) -> str:
        return f"{self.colour} {self.shape}"


CLASSES = tuple(Class(shape, colour) for shape in SHAPES for colour in COLOURS)
"""In the order of the model's labels."""


def example(label: int, rng: np.random.Generator) -> np.ndarray:
    """A drawn picture of a class, [32, 32, 3] uint8."""
    drawn = scene(CLASSES[label], rng)
    cover = coverage(drawn, SIZE)[..., None]
    mixed = cover * np.array(INKS[drawn.colour]) + (1 - cover) * np.array(INKS[drawn.background])
    return np.round(mixed).astype(np.uint8)


def scene(what: Class, rng: np.random.Generator) -> Scene:
    """A class at a random place, of a random size."""
    shift = (float(rng.uniform(-SHIFT, SHIFT)), float(rng.uniform(-SHIFT, SHIFT)))
    return Scene(what.shape, what.colour, BACKGROUND, "large", "centre", shift, float(rng.uniform(*ZOOM)))
