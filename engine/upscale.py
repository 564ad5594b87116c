"""The x4 upscaler: a U-Net that sees a small picture with noise, and is told how much of that.
StableDiffusionUpscalePipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .beginnings import Begin, Beginning, DrawnOnce, Encode, Encoded, FirstNoise, from_noise
from .errors import NoiseLevelError, shown
from .sampling.noise import TorchGenerator
from .sampling.schedule import Schedule

if TYPE_CHECKING:
    from .request import Request

DEFAULT_LEVEL = 20


@dataclass(frozen=True, eq=False)
class Upscale:
    """The noise that the small pictures of a call get: its level, and the factors of picture and noise."""

    level: int
    signal: float
    noise: float

    @classmethod
    def check(cls, noise_level: Any, schedule: Schedule, most: int) -> Upscale:
        """The noise of a level of the model's own; without one it is DEFAULT_LEVEL, or the model's highest.
        NoiseLevelError for what is no integer from 0 to `most`."""
        level = min(DEFAULT_LEVEL, most) if noise_level is None else noise_level
        if isinstance(level, bool) or not isinstance(level, (int, np.integer)) or not 0 <= level <= most:
            raise NoiseLevelError(
                f"noise_level is {shown(noise_level)}; it must be an integer from 0 to {most}, such as "
                f"{min(DEFAULT_LEVEL, most)}: more noise lets the model invent more"
            )
        kept = float(schedule.alphas_cumprod[level])
        return cls(int(level), kept**0.5, (1 - kept) ** 0.5)

    def begin(self, request: Request, plane: tuple[int, ...], encode: Encode) -> Begin:
        """See `Seen`. A small picture's noise is drawn once, by the first seed that needs it, before the latents'."""
        assert request.init is not None
        pixels = request.init.pixels(*plane[1:]).transpose(0, 3, 1, 2)
        mean = np.float32(self.signal) * pixels
        return Upscaling(
            from_noise(request.table, plane),
            DrawnOnce(Encoded(mean, np.full_like(mean, self.noise), request.image_of)),
            np.array(self.level, np.int32),
        )

    def parameters(self) -> Mapping[str, Any]:
        """See `Seen`."""
        return {"Noise level": self.level}


@dataclass(frozen=True, eq=False)
class Upscaling:
    """Loops that begin with noise and see a small picture with noise of its own, which is drawn first."""

    begin: Begin
    small: DrawnOnce
    level: np.ndarray

    def __call__(self, generator: TorchGenerator, pictures: range, noise: FirstNoise) -> list[Beginning]:
        small = self.small.draw(generator, pictures)
        made = self.begin(generator, pictures, noise)
        return [replace(one, seen={"concat": seen, "class_labels": self.level}) for one, seen in zip(made, small)]
