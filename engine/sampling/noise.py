"""torch's CPU random numbers in NumPy: the same seed gives the same latents as `torch.Generator("cpu")`."""

from __future__ import annotations

import math

import numpy as np

_BLOCK = 16


class TorchGenerator:
    """Draws what `torch.randn(shape, generator=torch.Generator().manual_seed(seed))` draws, draw after draw.

    Equal to 5e-7 (torch's vectorised logarithm and cosine round differently). torch fills tensors of at least 16 values
    by this rule, "normal_fill" in ATen/native/cpu/DistributionTemplates.h; smaller ones are not offered here.
    The generator is MT19937 seeded with the low 32 bits, which is also what `numpy.random.RandomState` is.
    """

    def __init__(self, seed: int) -> None:
        self._mersenne = np.random.RandomState(seed & 0xFFFFFFFF)

    def _uniform(self, count: int) -> np.ndarray:
        """float32 in [0, 1): 24 random bits of each 32-bit number."""
        raw = self._mersenne.randint(0, 1 << 32, size=count, dtype=np.uint32)
        return (raw & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2.0**-24)

    def randn(self, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal float32 of that shape, at least 16 values in all."""
        count = math.prod(shape)
        if count < _BLOCK:
            raise ValueError(f"torch draws fewer than {_BLOCK} values by another rule; {shape} has {count}")
        values = self._uniform(count)
        whole = count - count % _BLOCK
        values[:whole] = _box_muller(values[:whole])
        if whole != count:  # torch redraws the last 16 values of a tensor that blocks of 16 do not fill
            values[-_BLOCK:] = _box_muller(self._uniform(_BLOCK))
        return values.reshape(shape)


def _box_muller(uniform: np.ndarray) -> np.ndarray:
    """Normal values from uniform ones, in blocks of 16: the first eight give the radius, the others the angle."""
    blocks = uniform.reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    angle = np.float32(2 * math.pi) * blocks[:, 1]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)


class Draws:
    """The random numbers of the pictures that one seed makes, drawn evaluation by evaluation when the first of them
    asks, in diffusers' order, and kept until the last one has them."""

    def __init__(self, generator: TorchGenerator, shape: tuple[int, ...], draws: np.ndarray) -> None:
        """`shape` [B, C, h, w] is that of one draw, and `draws` [E] says at which evaluations diffusers draws."""
        self._generator, self._shape = generator, shape
        self._waiting = [int(index) for index in np.flatnonzero(draws)]
        self._drawn: dict[int, tuple[np.ndarray, set[int]]] = {}

    def prepare(self, index: int) -> None:
        """Draws up to evaluation `index`."""
        while self._waiting and self._waiting[0] <= index:
            self._drawn[self._waiting.pop(0)] = self._generator.randn(self._shape), set(range(self._shape[0]))

    def take(self, index: int, picture: int) -> np.ndarray:
        """The noise [C, h, w] of one picture at an evaluation at which there is some. KeyError for a second time."""
        self.prepare(index)
        noise, missing = self._drawn[index]
        missing.remove(picture)
        if not missing:
            del self._drawn[index]
        return noise[picture]
