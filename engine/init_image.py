"""Image to image (SDEdit, arXiv 2108.01073): a loop that starts late, from a picture with noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .checks import check_latents
from .contract import Family
from .errors import ImageError, StrengthError, shown
from .pixels import BICUBIC, LANCZOS, Readable, read_image, resized, size_of

DEFAULT_STRENGTH = 0.8


@dataclass(frozen=True, eq=False)
class InitImage:
    """What a loop starts from, checked: n pictures, or their latents [n, C, h, w] scaled as the U-Net sees them.
    magnification: see `Family`."""

    pictures: tuple[Readable, ...]
    latents: np.ndarray | None
    strength: float
    magnification: int = 1

    @classmethod
    def check(cls, image: Any, strength: Any, family: Family, default: float) -> InitImage | None:
        """`image` and `strength` of a call; without a strength it is `default`. ImageError, StrengthError or
        LatentsError."""
        if image is None:
            if strength is not None:
                raise StrengthError("strength says how much of an image changes; pass image too, or leave it out")
            return None
        if family.begins_with_noise and strength is not None:
            raise StrengthError(
                "this model sees the image and begins with noise, so it takes no strength; leave it out"
            )
        share = check_strength(default if strength is None else strength)
        if _is_latents(image, family.channels) and family.magnification == 1:
            return cls((), check_latents(image, image.shape, "the latents in image"), share)
        pictures = tuple(read_image(one, f"image{number}") for number, one in _numbered(image))
        sizes = {size_of(picture) for picture in pictures}
        if len(sizes) > 1:
            listed = ", ".join(f"{width} x {height}" for height, width in sorted(sizes))
            raise ImageError(f"the images of a call have one size, and these are {listed} pixels")
        return cls(pictures, None, share, family.magnification)

    def __len__(self) -> int:
        return len(self.pictures) if self.latents is None else len(self.latents)

    def size(self, factor: int) -> tuple[int, int]:
        """Height and width in pixels of the pictures to make: as in diffusers the images', rounded down to multiples of
        the factor, and magnified."""
        height, width = self.full_size(factor)
        times = self.magnification
        return height // factor * factor * times, width // factor * factor * times

    def full_size(self, factor: int) -> tuple[int, int]:
        """Height and width of the images in pixels."""
        if self.latents is not None:
            return self.latents.shape[2] * factor, self.latents.shape[3] * factor
        return size_of(self.pictures[0])

    def first_step(self, steps: int) -> int:
        """Where the loop starts, as in diffusers. StrengthError if no step is left."""
        left = min(int(steps * self.strength), steps)
        if left == 0:
            raise StrengthError(
                f"strength {self.strength:g} of {steps} steps leaves no step; pass at least {1 / steps:.3g}, or more "
                "steps"
            )
        return steps - left

    def pixels(self, height: int, width: int) -> np.ndarray:
        """The pictures as the VAE encoder takes them, [n, height, width, 3] float32 in -1..1. What is to be magnified
        is stretched bicubically, as in diffusers."""
        filter = LANCZOS if self.magnification == 1 else BICUBIC
        return np.stack([resized(picture, height, width, filter) for picture in self.pictures])

    def of(self, prompts: int, images_per_prompt: int) -> tuple[int, ...]:
        """Which image each picture of a call starts from; see `each_of`."""
        return each_of("images", len(self), prompts, images_per_prompt)


def check_strength(value: Any) -> float:
    """A number from 0 to 1."""
    if not isinstance(value, (int, float, np.number)) or isinstance(value, bool) or not 0 <= value <= 1:
        raise StrengthError(f"strength is {shown(value)}; it must be a number from 0 to 1, such as 0.8")
    return float(value)


def each_of(what: str, count: int, prompts: int, images_per_prompt: int) -> tuple[int, ...]:
    """Which of `count` images, or masks, each picture of a call has: the only one, its text's, or its own. ImageError
    where there is another number of them."""
    batch = prompts * images_per_prompt
    choices = {1: [0] * batch, prompts: [i // images_per_prompt for i in range(batch)], batch: list(range(batch))}
    if count not in choices:
        allowed = " or ".join(map(str, sorted({1, prompts, batch})))
        raise ImageError(f"there are {count} {what} for {batch} pictures; pass {allowed}")
    return tuple(choices[count])


def _is_latents(image: Any, channels: int) -> bool:
    """Whether an array holds latents [n, C, h, w] instead of pictures."""
    return isinstance(image, np.ndarray) and image.ndim == 4 and image.shape[1] == channels and image.shape[3] > 4


def _numbered(image: Any) -> list[tuple[str, Any]]:
    """The images of a call, with what an error adds to the argument's name."""
    if isinstance(image, np.ndarray) and image.ndim == 4:
        image = list(image)
    if not isinstance(image, (list, tuple)):
        return [("", image)]
    if not image:
        raise ImageError("image is an empty list; pass a picture, or one for each text")
    return [(f"[{number}]", one) for number, one in enumerate(image)]
