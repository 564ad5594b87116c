"""Is a picture what its caption or its class says? Judged from pixels alone: dominant colours, and overlap with drawn
shapes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import classes
from .classes import Class
from .pictures import COLOURS, POSITIONS, SHAPES, SIZE, SIZES, Scene, coverage, held_out, triples

LEAST_OVERLAP = 0.8
"""Intersection over union with the best-fitting drawn shape, from which on a shape counts as drawn."""


@dataclass(frozen=True)
class Verdict:
    """What a picture shows, and how well its shape fits the drawn one (intersection over union)."""

    shape: str
    colour: str
    background: str
    size: str
    position: str
    overlap: float

    def agrees(self, scene: Scene) -> bool:
        """Whether shape, colour and background are those of the scene."""
        return (self.shape, self.colour, self.background) == scene.triple and self.overlap >= LEAST_OVERLAP

    def agrees_fully(self, scene: Scene) -> bool:
        """Whether size and position are right too."""
        return self.agrees(scene) and (self.size, self.position) == (scene.size, scene.position)


def _nearest_colour(pixels: np.ndarray, colours: Mapping[str, tuple[int, int, int]] = COLOURS) -> str:
    """The named colour nearest to the median of pixels [n, 3]."""
    middle = np.median(pixels.reshape(-1, 3).astype(float), axis=0)
    return min(colours, key=lambda name: float(np.abs(middle - colours[name]).sum()))


@lru_cache(maxsize=1)
def _templates() -> tuple[list[Scene], np.ndarray, np.ndarray]:
    """Every shape at every size and place, moved by up to two pixels and scaled by up to 5 %: the scenes, which pixels
    they cover ([scenes, pixels] of 0 and 1) and how many. In float32, so that all overlaps are one product of
    matrices."""
    shifts = [(float(x), float(y)) for x in (-2, -1, 0, 1, 2) for y in (-2, -1, 0, 1, 2)]
    scenes = [
        Scene(shape, "", "", size, position, shift, zoom)
        for shape in SHAPES
        for size in SIZES
        for position in POSITIONS
        for shift in shifts
        for zoom in (0.95, 1.0, 1.05)
    ]
    masks = np.stack([(coverage(scene) > 0.5).ravel() for scene in scenes]).astype(np.float32)
    return scenes, masks, masks.sum(axis=1)


def judge(picture: np.ndarray) -> Verdict:
    """What `picture` [64, 64, 3] uint8 shows."""
    if picture.shape != (SIZE, SIZE, 3):
        raise ValueError(f"the judge knows pictures of {SIZE} x {SIZE} pixels, not {picture.shape}")
    border = np.concatenate([picture[:2].reshape(-1, 3), picture[-2:].reshape(-1, 3)])
    background = _nearest_colour(border)
    # A pixel belongs to the shape if it is farther from the background than half the way to the colour farthest from
    # it.
    distance = np.abs(picture.astype(float) - np.median(border, axis=0)).sum(axis=-1)
    strongest = np.quantile(distance, 0.995)
    ink = distance > strongest / 2
    colour = _nearest_colour(picture[distance > 0.8 * strongest])
    scenes, masks, areas = _templates()
    shared = masks @ ink.ravel().astype(np.float32)
    overlaps = shared / (areas + ink.sum() - shared)
    best = scenes[int(overlaps.argmax())]
    return Verdict(best.shape, colour, background, best.size, best.position, float(overlaps.max()))


def scenes_to_ask_for(count: int = 96, seed: int = 2024) -> Iterator[Scene]:
    """Scenes to ask a model for: a third of them show a triple that training never saw."""
    rng = np.random.default_rng(seed)
    unseen = sorted(held_out())
    seen = sorted(set(triples()) - held_out())
    for i in range(count):
        pool = unseen if i % 3 == 0 else seen
        shape, colour, background = pool[rng.integers(len(pool))]
        yield Scene(shape, colour, background, str(rng.choice(list(SIZES))), str(rng.choice(list(POSITIONS))))


LEAST_CONTRAST = 100.0
"""Sum of the channels' differences from the background, from which on something is drawn there: half of the faintest
colour, green on grey."""

MOST_TINT = 24.0
"""How far the channels of a background may be from grey's."""


@dataclass(frozen=True)
class ClassVerdict:
    """What a picture of the class-conditional model shows ("nothing" for a plain one), and how well its shape fits the
    drawn one (intersection over union)."""

    shape: str
    colour: str
    background: str
    overlap: float

    def agrees(self, asked: Class) -> bool:
        """Whether it is a picture of the class, on grey."""
        wanted = (asked.shape, asked.colour, classes.BACKGROUND)
        return (self.shape, self.colour, self.background) == wanted and self.overlap >= LEAST_OVERLAP


def judge_class(picture: np.ndarray) -> ClassVerdict:
    """What `picture` [32, 32, 3] uint8 shows. Every shape is drawn with the picture's area and centre of mass."""
    if picture.shape != (classes.SIZE, classes.SIZE, 3):
        raise ValueError(f"this judge knows pictures of {classes.SIZE} x {classes.SIZE} pixels, not {picture.shape}")
    border = np.concatenate([picture[:1].reshape(-1, 3), picture[-1:].reshape(-1, 3)])
    distance = np.abs(picture.astype(float) - np.median(border, axis=0)).sum(axis=-1)
    strongest = max(float(np.quantile(distance, 0.98)), LEAST_CONTRAST)
    # How much of each pixel is not background; the ends of the scale are cut off, so that faint noise has no area.
    ink = np.clip((distance / strongest - 0.15) / 0.7, 0, 1)
    if ink.sum() < 1:
        return ClassVerdict("nothing", "", _background(border), 0.0)
    overlaps = {shape: _overlap(ink, _fitted(shape, ink)) for shape in SHAPES}
    best = max(overlaps, key=lambda shape: overlaps[shape])
    colour = _nearest_colour(picture[ink >= 0.9 * ink.max()], classes.INKS)
    return ClassVerdict(best, colour, _background(border), overlaps[best])


def _background(border: np.ndarray) -> str:
    """The name of the nearest colour; "tinted" for one near grey, but not near enough."""
    middle = np.median(border.reshape(-1, 3), axis=0)
    name = _nearest_colour(border, classes.INKS)
    off = float(np.abs(middle - classes.INKS[classes.BACKGROUND]).max())
    return "tinted" if name == classes.BACKGROUND and off > MOST_TINT else name


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two coverages."""
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())


@lru_cache(maxsize=len(SHAPES))
def _plain(shape: str) -> np.ndarray:
    """A large shape in the middle, as the pictures of classes have it."""
    return coverage(Scene(shape, "", ""), classes.SIZE)


def _fitted(shape: str, ink: np.ndarray) -> np.ndarray:
    """The shape drawn with the area and the centre of mass of a coverage."""
    plain = _plain(shape)
    zoom = float(np.sqrt(ink.sum() / plain.sum()))
    middle = np.array([SIZE / 2, SIZE / 2])
    shift = _centre(ink) - middle - zoom * (_centre(plain) - middle)
    return coverage(Scene(shape, "", "", "large", "centre", (float(shift[0]), float(shift[1])), zoom), classes.SIZE)


def _centre(cover: np.ndarray) -> np.ndarray:
    """The centre of mass (x, y) of a coverage, in units of pictures.SIZE."""
    places = np.arange(cover.shape[0]) + 0.5
    weighted = np.array([(cover.sum(axis=0) * places).sum(), (cover.sum(axis=1) * places).sum()])
    return weighted / cover.sum() * (SIZE / cover.shape[0])
