"""Where the loop of each picture begins: from noise, or from an image, with diffusers' random numbers in their
order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from .sampling.noise import TorchGenerator
from .sampling.table import StepTable

if TYPE_CHECKING:  # it reads files with Pillow, which plans are built without
    from .init_image import InitImage


@dataclass(frozen=True, eq=False)
class Beginning:
    """The beginning of one picture: latents [C, h, w] scaled for the table's first evaluation, and what it adds to
    `Job.steps` and `Job.extras`. seen: by name, the value of an input with one for each row, the same for all but blind
    rows."""

    latents: np.ndarray
    steps: Mapping[str, np.ndarray] = field(default_factory=dict)
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    seen: Mapping[str, np.ndarray] = field(default_factory=dict)


Encode = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""`Backend.encode_image`."""

FirstNoise = Callable[[tuple[int, ...]], np.ndarray]
"""noise((n, C, h, w)): the noise that the loops of one seed's pictures begin with."""

Begin = Callable[[TorchGenerator, range, FirstNoise], Sequence[Beginning]]
"""begin(generator, pictures, noise): the beginnings of one seed's pictures, which are numbered in the call. `noise` is
called once, where diffusers draws it. It is called for one seed after the other."""


def seeing(begin: Begin, seen: Sequence[Mapping[str, np.ndarray]]) -> Begin:
    """The same beginnings, whose rows see something: seen[p] is picture number p's."""

    def begin_seeing(generator: TorchGenerator, pictures: range, noise: FirstNoise) -> list[Beginning]:
        made = begin(generator, pictures, noise)
        return [replace(one, seen=seen[picture]) for picture, one in zip(pictures, made)]

    return begin_seeing


def from_noise(table: StepTable, plane: tuple[int, ...]) -> Begin:
    """Loops that begin with noise alone. `plane` is (C, h, w)."""

    def begin(generator: TorchGenerator, pictures: range, noise: FirstNoise) -> list[Beginning]:
        return [Beginning(one * np.float32(table.initial_scale)) for one in noise((len(pictures), *plane))]

    return begin


@dataclass(frozen=True, eq=False)
class Encoded:
    """Images as distributions of latents: mean and std [n, C, h, w], std None for latents that are known; of: the image
    of each picture."""

    mean: np.ndarray
    std: np.ndarray | None
    of: tuple[int, ...]

    @classmethod
    def of_images(cls, init: InitImage, height: int, width: int, of: tuple[int, ...], encode: Encode) -> Encoded:
        """Images of that size in pixels, of which picture number p has number of[p]."""
        if init.latents is not None:
            return cls(init.latents, None, of)
        mean, std = encode(init.pixels(height, width))
        return cls(mean, std, of)

    def draw(self, generator: TorchGenerator, images: Sequence[int]) -> np.ndarray:
        """Latents of each of these images, drawn at once."""
        chosen = list(images)
        if self.std is None:
            return self.mean[chosen]
        return self.mean[chosen] + self.std[chosen] * generator.randn((len(chosen), *self.mean.shape[1:]))


@dataclass(frozen=True, eq=False)
class DrawnOnce:
    """Latents that pictures of several seeds share: the first seed that needs an image's draws them."""

    encoded: Encoded
    _drawn: dict[int, np.ndarray] = field(default_factory=dict)

    def draw(self, generator: TorchGenerator, pictures: Iterable[int]) -> np.ndarray:
        """Those of these pictures' images."""
        images = [self.encoded.of[picture] for picture in pictures]
        new = [image for image in distinct(images) if image not in self._drawn]
        if new:
            self._drawn.update(zip(new, self.encoded.draw(generator, new)))
        return np.stack([self._drawn[image] for image in images])


def from_images(table: StepTable, encoded: Encoded) -> Begin:
    """Loops that begin with images, as in StableDiffusionImg2ImgPipeline: each seed draws latents of its images, then
    the noise."""

    def begin(generator: TorchGenerator, pictures: range, noise: FirstNoise) -> list[Beginning]:
        images = distinct(encoded.of[picture] for picture in pictures)
        drawn = dict(zip(images, encoded.draw(generator, images)))
        clean = np.stack([drawn[encoded.of[picture]] for picture in pictures])
        return [Beginning(latents) for latents in noised(clean, noise(clean.shape), table)]

    return begin


@dataclass(frozen=True, eq=False)
class Masked:
    """Loops that repaint the part of images inside of masks, as in StableDiffusionInpaintPipeline with a model of four
    channels. An image's latents are drawn once, by the first seed that needs them. Then comes the noise, then a draw
    for each masked image, of which such a model makes no use.

    masks [m, 1, h, w]; of: the mask of each picture; from_noise: the loop begins with noise alone.
    """

    table: StepTable
    originals: DrawnOnce
    masks: np.ndarray
    of: tuple[int, ...]
    from_noise: bool
    _masked: set[tuple[int, int]] = field(default_factory=set)

    def __call__(self, generator: TorchGenerator, pictures: range, noise: FirstNoise) -> list[Beginning]:
        original = self.originals.draw(generator, pictures)
        start = noise(original.shape)
        self._skip_masked_images(generator, pictures, original.shape[1:])
        latents = begun(self.table, original, start, self.from_noise)
        steps = {"blend": blend(self.table)}
        extras = [
            {"mask": self.masks[self.of[picture]], "original": original[i], "start_noise": start[i]}
            for i, picture in enumerate(pictures)
        ]
        return [Beginning(one, steps, more) for one, more in zip(latents, extras)]

    def _skip_masked_images(self, generator: TorchGenerator, pictures: range, plane: tuple[int, ...]) -> None:
        """Draws what diffusers' VAE encoder takes for the masked images."""
        encoded = self.originals.encoded
        pairs = {(encoded.of[picture], self.of[picture]) for picture in pictures} - self._masked
        if pairs and encoded.std is not None:
            self._masked.update(pairs)
            generator.randn((len(pairs), *plane))


def distinct(images: Iterable[int]) -> list[int]:
    return sorted(set(images))


def noised(clean: np.ndarray, noise: np.ndarray, table: StepTable) -> np.ndarray:
    """Latents with the noise of a table's first level."""
    alpha, sigma = np.float32(table.alphas[0]), np.float32(table.sigmas[0])
    mixed: np.ndarray = alpha * clean + sigma * noise
    return mixed


def blend(table: StepTable) -> np.ndarray:
    """The factors [E, 2] of original and noise after each evaluation: those of the next one's level, at the end those
    of the original alone."""
    levels = np.stack([table.alphas, table.sigmas], axis=1)
    return np.append(levels[1:], [[1.0, 0.0]], axis=0).astype(np.float32)


def begun(table: StepTable, original: np.ndarray, noise: np.ndarray, from_noise: bool) -> np.ndarray:
    """Where a loop starts: noise alone, or the original with the noise of the table's first level."""
    return noise * np.float32(table.initial_scale) if from_noise else noised(original, noise, table)
