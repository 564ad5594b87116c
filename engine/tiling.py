"""Large pictures go through the VAE in tiles that overlap, so that its memory is that of one tile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from .contract import Shapes
from .errors import TilingError, shown
from .manifest import LARGEST_SIDE

TILE = 512
"""The side of a tile in pixels, where a call has none of its own."""

LARGEST_WHOLE = 1024 * 1024
"""Pictures of more pixels are tiled, unless a call says otherwise."""

SMALLEST_TILE = 8
"""In latents. The overlap is a quarter of a tile, and less of it would be no overlap."""


def check_tiling(value: Any, factor: int) -> bool | int | None:
    """`vae_tiling` of a call: None, whether there are tiles, or their side in pixels. TilingError."""
    if value is None or isinstance(value, (bool, np.bool_)):
        return None if value is None else bool(value)
    smallest = SMALLEST_TILE * factor
    if not isinstance(value, (int, np.integer)) or not smallest <= value <= LARGEST_SIDE:
        raise TilingError(
            f"vae_tiling is {shown(value)}; it must be True, False, None (large pictures only), or the side of a tile, "
            f"{smallest} to {LARGEST_SIDE} pixels"
        )
    return int(value)


@dataclass(frozen=True)
class Tiles:
    """A plane of latents in tiles of one size, both in latents, of `factor` pixels each."""

    plane: tuple[int, int]
    sides: tuple[int, int]
    factor: int

    @classmethod
    def of(
        cls, tiling: bool | int | None, height: int, width: int, factor: int, profiles: Sequence[Shapes]
    ) -> Tiles | None:
        """The tiles of a picture of that size in pixels; None if it stays whole. A plan that is built for larger sizes
        than the tile has tiles of its smallest size."""
        if tiling is False or (tiling is None and height * width <= LARGEST_WHOLE):
            return None
        side = TILE if tiling is None or tiling is True else tiling
        serving = [one for one in profiles if height in one.height and width in one.width]
        sides = [(max(side, one.height.min), max(side, one.width.min)) for one in serving] or [(side, side)]
        high, wide = min(sides)
        if high >= height and wide >= width:
            return None
        plane = height // factor, width // factor
        return cls(plane, (min(high // factor, plane[0]), min(wide // factor, plane[1])), factor)

    def decode(
        self, decode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], latents: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Latents [n, C, h, w] -> pixels [n, H, W, 3] uint8, and whether each picture's values were finite; both by
        `decode` on one tile of every picture after the other."""
        count, (height, width), factor = len(latents), self.plane, self.factor
        canvas = np.zeros((count, height * factor, width * factor, 3), np.float32)
        finite = np.ones(count, bool)
        for rows, columns, weight in self._parts(factor):
            pixels, fine = decode(np.ascontiguousarray(latents[:, :, rows, columns]))
            canvas[:, scaled(rows, factor), scaled(columns, factor)] += weight[..., np.newaxis] * pixels
            finite &= fine
        return np.rint(canvas).astype(np.uint8), finite

    def encode(
        self, encode: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]], images: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images [n, H, W, 3] -> mean and standard deviation of their latents, [n, C, h, w]."""
        factor = self.factor
        blended: list[np.ndarray] = []
        for rows, columns, weight in self._parts(1):
            part = encode(np.ascontiguousarray(images[:, scaled(rows, factor), scaled(columns, factor)]))
            blended = blended or [np.zeros((*one.shape[:2], *self.plane), np.float32) for one in part]
            for whole, one in zip(blended, part):
                whole[:, :, rows, columns] += weight * one
        mean, std = blended
        return mean, std

    def _parts(self, factor: int) -> list[tuple[slice, slice, np.ndarray]]:
        """Rows and columns of each tile in latents, and the weight of each of its elements, at `factor` of them for a
        latent. All weights of an element are 1 in sum."""
        rows, columns = (axis(size, side, factor) for size, side in zip(self.plane, self.sides))
        return [(y, x, np.outer(down, across)) for (y, down), (x, across) in product(rows, columns)]


def axis(size: int, side: int, factor: int) -> list[tuple[slice, np.ndarray]]:
    """The tiles along an axis, evenly spread, and their weights. At an end of a tile that is not one of the picture the
    VAE sees what is not there, so its first elements have no weight, and the next ones a rising one."""
    overlap = side // 4
    count = 1 if side >= size else -(-(size - overlap) // (side - overlap))
    starts = np.rint(np.linspace(0, size - side, count)).astype(int)
    margin = overlap / 4
    places = (np.arange(side * factor) + 0.5) / factor
    weights = np.zeros((count, size * factor))
    for number, start in enumerate(starts):
        from_left = np.inf if start == 0 else places - margin
        from_right = np.inf if start + side == size else side - places - margin
        ramp = np.minimum(from_left, from_right) / (overlap - 2 * margin)
        weights[number, start * factor : (start + side) * factor] = np.clip(ramp, 0, 1)
    weights /= weights.sum(axis=0)
    tiles = [slice(int(start), int(start) + side) for start in starts]
    return [(tile, weights[i, scaled(tile, factor)].astype(np.float32)) for i, tile in enumerate(tiles)]


def scaled(part: slice, factor: int) -> slice:
    """The same part, at `factor` elements for each."""
    return slice(part.start * factor, part.stop * factor)
