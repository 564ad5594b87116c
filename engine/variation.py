"""Variations: the first noise of a picture, turned towards that of another seed."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .checks import check_seeds
from .errors import VariationError, shown
from .sampling.noise import TorchGenerator

NEARLY_EQUAL = 0.9995
"""From this mean cosine on A1111 mixes the two noises linearly."""

LEAST_SINE = 1e-6
"""Below this the directions of two columns are the same or opposite, and the sphere has no one way between them."""


@dataclass(frozen=True, eq=False)
class Variation:
    """A checked variation. seeds: one for all pictures of a call, whose noise is then drawn together, or one for each;
    strengths: one for each picture, 0 for the noise of its own seed and 1 for the other's."""

    seeds: tuple[int, ...]
    strengths: tuple[float, ...]
    _drawn: list[np.ndarray] = field(default_factory=list)

    @classmethod
    def check(cls, subseed: Any, subseed_strength: Any, batch: int) -> Variation | None:
        """The arguments of a call for `batch` pictures; None without a variation. Strength without a subseed takes a
        random one. VariationError or SeedError."""
        if subseed_strength is None:
            if subseed is not None:
                raise VariationError("subseed is given without subseed_strength; pass one from 0 to 1, such as 0.1")
            return None
        seeds = check_seeds(secrets.randbits(32) if subseed is None else subseed, batch, "subseed")
        strengths = _strengths(subseed_strength, batch)
        return cls(tuple(seeds), strengths) if any(strengths) else None

    def of(self, picture: int) -> tuple[int, float]:
        """The seed and the strength of one picture."""
        return self.seeds[picture if len(self.seeds) > 1 else 0], self.strengths[picture]

    def vary(self, noise: np.ndarray, pictures: range) -> np.ndarray:
        """The varied noise [n, C, h, w] of these pictures of the call."""
        others = self._noise(noise.shape[1:])
        return np.stack([slerp(self.strengths[i], one, others[i]) for one, i in zip(noise, pictures)])

    def _noise(self, plane: tuple[int, ...]) -> np.ndarray:
        """The other noise of every picture."""
        if not self._drawn:
            count = len(self.strengths)
            if len(self.seeds) == 1:
                self._drawn.append(TorchGenerator(self.seeds[0]).randn((count, *plane)))
            else:
                self._drawn.append(np.concatenate([TorchGenerator(seed).randn((1, *plane)) for seed in self.seeds]))
        return self._drawn[0]


def slerp(share: float, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The point at `share` of the way from `low` to `high` [C, h, w], along the arc between the columns of each
    channel. A1111 measures angles like that, column by column, and so its pictures come out."""
    cosine = (_unit(low) * _unit(high)).sum(axis=1, keepdims=True).clip(-1, 1)
    straight = (1 - share) * low + share * high
    if cosine.mean() > NEARLY_EQUAL:
        return straight.astype(np.float32)
    angle = np.arccos(cosine)
    sine = np.sin(angle)
    wide = sine > LEAST_SINE
    divisor = np.where(wide, sine, 1)
    curved = np.sin((1 - share) * angle) / divisor * low + np.sin(share * angle) / divisor * high
    return np.where(wide, curved, straight).astype(np.float32)


def _unit(columns: np.ndarray) -> np.ndarray:
    length: np.ndarray = np.linalg.norm(columns, axis=1, keepdims=True)
    unit: np.ndarray = columns / np.maximum(length, np.finfo(np.float32).tiny)
    return unit


def _strengths(value: Any, batch: int) -> tuple[float, ...]:
    several = isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 1)
    if several and len(value) != batch:
        raise VariationError(
            f"there are {len(value)} values of subseed_strength for {batch} pictures; pass one, or {batch}"
        )
    for one in list(value) if several else [value]:
        number = isinstance(one, (int, float, np.number)) and not isinstance(one, bool)
        if not number or not 0 <= one <= 1:
            raise VariationError(
                f"subseed_strength is {shown(one)}; it must be a number from 0, the picture of its own seed, to 1, "
                "that of the subseed"
            )
    return tuple(map(float, value)) if several else (float(value),) * batch
