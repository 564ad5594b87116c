"""Hires fix: a second pass at a larger size, from what the first pass has made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import HiresError, shown
from .guidance import Scale

PIXELS = "lanczos"
"""The upscaler that decodes the first picture and encodes the larger one. The others resample latents."""

UPSCALERS = {
    "nearest": "Latent (nearest)",
    "nearest-exact": "Latent (nearest-exact)",
    "bilinear": "Latent",
    "bicubic": "Latent (bicubic)",
    "bilinear-antialiased": "Latent (antialiased)",
    "bicubic-antialiased": "Latent (bicubic antialiased)",
    PIXELS: "Lanczos",
}
"""By name, what A1111 calls each. Both are taken."""

DEFAULT_SCALE = 2.0
LARGEST_SCALE = 64.0


@dataclass(frozen=True)
class Hires:
    """A second pass: the picture is enlarged, gets noise, and is denoised again, as image to image.

    scale: of both sides (2 without height and width), rounded down to multiples of 8; or height and width, pixels. A
    side that is missing keeps the proportions. upscaler: one of UPSCALERS. steps, strength: as of image to image, the
    last int(steps * strength) steps are run. What is None is the first pass's.
    """

    scale: float | None = None
    height: int | None = None
    width: int | None = None
    upscaler: str = "bilinear"
    steps: int | None = None
    strength: float = 0.7
    scheduler: str | None = None
    schedule_type: str | None = None
    guidance_scale: Scale | None = None
    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = None

    @property
    def mode(self) -> str:
        """The upscaler's name. HiresError if there is none of that name or label."""
        given = self.upscaler
        for name, label in UPSCALERS.items():
            if isinstance(given, str) and given.lower() in (name, label.lower()):
                return name
        raise HiresError(f"the upscaler of hires is {shown(given)}; it must be one of {', '.join(UPSCALERS)}")

    def size(self, height: int, width: int, factor: int) -> tuple[int, int]:
        """Height and width of the second pass after a first one of that size, in pixels. HiresError."""
        if self.scale is not None and (self.height is not None or self.width is not None):
            raise HiresError("hires has a scale and a size; pass one of them")
        if self.height is None and self.width is None:
            scale = _checked_scale(DEFAULT_SCALE if self.scale is None else self.scale)
            return int(height * scale) // factor * factor, int(width * scale) // factor * factor
        own_height, own_width = _checked_side("height", self.height), _checked_side("width", self.width)
        if own_height is None and own_width is not None:
            own_height = height * own_width // width // factor * factor
        if own_width is None and own_height is not None:
            own_width = width * own_height // height // factor * factor
        assert own_height is not None
        assert own_width is not None
        return own_height, own_width

    def parameters(self) -> dict[str, Any]:
        """Its fields in a picture's parameters, by A1111's keys."""
        fields: dict[str, Any] = {"Denoising strength": float(self.strength)}
        if self.height is None and self.width is None:
            fields["Hires upscale"] = float(DEFAULT_SCALE if self.scale is None else self.scale)
        if self.steps is not None:
            fields["Hires steps"] = int(self.steps)
        fields["Hires upscaler"] = UPSCALERS[self.mode]
        return fields


def check_hires(hires: Any, image: Any) -> Hires | None:
    """The argument of a call, as far as it goes without the first pass's size. HiresError."""
    if hires is None:
        return None
    if not isinstance(hires, Hires):
        raise HiresError(f"hires is {shown(hires)}; pass engine.Hires(scale=2), or None for one pass")
    if image is not None:
        raise HiresError("hires is a second pass after a picture from noise, and image is given; pass one of them")
    _ = hires.mode
    return hires


def _checked_scale(value: Any) -> float:
    number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not number or not 1 <= value <= LARGEST_SCALE:
        raise HiresError(f"the scale of hires is {shown(value)}; it must be a number from 1 to {LARGEST_SCALE:g}")
    return float(value)


def _checked_side(name: str, value: Any) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1):
        raise HiresError(f"the {name} of hires is {shown(value)}; it must be a number of pixels")
    return None if value is None else int(value)
