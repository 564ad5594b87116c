"""Cheap pictures of a loop that is under way: a linear map from latents to colours, fitted to the model's own VAE."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .backends.interface import Backend
from .contract import Family

CELL = 4
"""Latents along a side of a square of one colour, in the pictures that the map is fitted to."""

COLOURS = 64
"""So many colours at least are fitted. The map has C+1 numbers for each of red, green and blue."""


class StepTensors(dict[str, np.ndarray]):
    """What a callback sees of an evaluation: {"latents": [B, C, h, w]}, as from diffusers."""

    def __init__(self, latents: np.ndarray, x0: Callable[[], np.ndarray], colours: Callable[[], LatentColours]) -> None:
        super().__init__(latents=latents)
        self._x0, self._colours = x0, colours

    def x0(self) -> np.ndarray:
        """The clean latents [B, C, h, w] float32 that the model predicts at this evaluation, with guidance.
        PreviewError for the samplers that leave no room for them."""
        return self._x0()

    def preview(self) -> list[Image.Image]:
        """Pictures of `x0` with one pixel a latent, w x h. The first call on a pipeline runs its VAE once."""
        return self._colours().pictures(self.x0())


@dataclass(frozen=True, eq=False)
class LatentColours:
    """colours = latents @ matrix[:-1] + matrix[-1], in 0..1; matrix [C+1, 3]."""

    matrix: np.ndarray

    @classmethod
    def of(cls, backend: Backend, family: Family) -> LatentColours:
        """The least-squares map between latents and the mean colours of their pixels, at the smallest size of the
        backend: of coloured squares through the VAE encoder, without one of random latents through the decoder."""
        smallest = backend.profiles[0]
        plane = family.plane(smallest.height.min, smallest.width.min)
        if backend.encodes_images:
            pixels = _coloured(plane, family.factor)
            latents, _ = backend.encode_image(2 * pixels - 1)
        else:
            latents = np.random.default_rng(0).standard_normal((_count(plane), *plane), np.float32)
            pixels = backend.decode(latents).image.astype(np.float32) / 255
        matrix, *_ = np.linalg.lstsq(_with_one(latents), _means(pixels, family.factor), rcond=None)
        return cls(matrix)

    def pictures(self, latents: np.ndarray) -> list[Image.Image]:
        """Pictures of latents [B, C, h, w]."""
        count, _, height, width = latents.shape
        colours = (_with_one(latents) @ self.matrix).reshape(count, height, width, 3)
        return [Image.fromarray(one) for one in np.rint(255 * colours.clip(0, 1)).astype(np.uint8)]


def _with_one(latents: np.ndarray) -> np.ndarray:
    """Every element's channels and a 1, [n h w, C+1] float64."""
    channels = latents.astype(np.float64).transpose(0, 2, 3, 1).reshape(-1, latents.shape[1])
    return np.concatenate([channels, np.ones((len(channels), 1))], axis=1)


def _count(plane: tuple[int, ...]) -> int:
    """How many pictures hold COLOURS squares."""
    _, height, width = plane
    return math.ceil(COLOURS / (math.ceil(height / CELL) * math.ceil(width / CELL)))


def _coloured(plane: tuple[int, ...], factor: int) -> np.ndarray:
    """Pictures [n, H, W, 3] float32 in 0..1 of squares in random colours."""
    _, height, width = plane
    count, side = _count(plane), CELL * factor
    rows, columns = math.ceil(height / CELL), math.ceil(width / CELL)
    colours = np.random.default_rng(0).random((count, rows, columns, 3), np.float32)
    return colours.repeat(side, axis=1).repeat(side, axis=2)[:, : height * factor, : width * factor]


def _means(pixels: np.ndarray, factor: int) -> np.ndarray:
    """The mean colour of every latent's pixels, [n h w, 3]."""
    count, height, width, _ = pixels.shape
    squares = pixels.reshape(count, height // factor, factor, width // factor, factor, 3)
    means: np.ndarray = squares.mean(axis=(2, 4)).reshape(-1, 3)
    return means
