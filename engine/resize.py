"""Resamples latents as torch's `interpolate(align_corners=False)` does, each axis by a matrix of its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

CUBIC, CUBIC_ANTIALIASED = -0.75, -0.5
"""Keys' parameter a, which torch takes for bicubic without and with antialias."""


def resize(latents: np.ndarray, height: int, width: int, mode: str) -> np.ndarray:
    """Latents [n, C, h, w] -> [n, C, height, width] float32. `mode` is one of MODES."""
    return np.ascontiguousarray(resampled(latents, height, width, mode), np.float32)


def resampled(planes: np.ndarray, height: int, width: int, mode: str) -> np.ndarray:
    """Planes [..., h, w] -> [..., height, width] float64."""
    matrix = MODES[mode]
    rows, columns = matrix(planes.shape[-2], height), matrix(planes.shape[-1], width)
    made: np.ndarray = rows @ (planes.astype(np.float64) @ columns.T)
    return made


def _nearest(size: int, target: int, offset: float) -> np.ndarray:
    """torch finds the place in float32."""
    places = (np.arange(target, dtype=np.float32) + np.float32(offset)) * np.float32(size / target)
    matrix = np.zeros((target, size))
    matrix[np.arange(target), np.minimum(places.astype(int), size - 1)] = 1
    return matrix


def _interpolated(size: int, target: int, kernel: Callable[[np.ndarray], np.ndarray], reach: int) -> np.ndarray:
    """Every target is a sum over `reach` neighbours on each side. What lies outside is the edge's value."""
    places = (np.arange(target) + 0.5) * (size / target) - 0.5
    matrix = np.zeros((target, size))
    for step in range(1 - reach, reach + 1):
        neighbours = np.floor(places).astype(int) + step
        np.add.at(matrix, (np.arange(target), neighbours.clip(0, size - 1)), kernel(places - neighbours))
    return matrix


def _antialiased(size: int, target: int, kernel: Callable[[np.ndarray], np.ndarray], reach: int) -> np.ndarray:
    """The kernel is as wide as a target's part of the source. What lies outside has no weight."""
    scale = size / target
    stretch = max(scale, 1.0)
    centres = (np.arange(target)[:, np.newaxis] + 0.5) * scale
    places = np.arange(size)
    first, last = (np.trunc(centres + sign * reach * stretch + 0.5) for sign in (-1, 1))
    weights = np.where((places >= first) & (places < last), kernel((places - centres + 0.5) / stretch), 0)
    matrix: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return matrix


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel (IEEE ASSP 29, 1981)."""
    x = np.abs(x)
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))


MODES: dict[str, Callable[[int, int], np.ndarray]] = {
    "nearest": partial(_nearest, offset=0.0),
    "nearest-exact": partial(_nearest, offset=0.5),
    "bilinear": partial(_interpolated, kernel=_triangle, reach=1),
    "bicubic": partial(_interpolated, kernel=partial(_cubic, a=CUBIC), reach=2),
    "bilinear-antialiased": partial(_antialiased, kernel=_triangle, reach=1),
    "bicubic-antialiased": partial(_antialiased, kernel=partial(_cubic, a=CUBIC_ANTIALIASED), reach=2),
}
"""The matrix [target, size] of each mode; torch's names, and antialias=True."""
