"""What a backend offers to the pipeline, or to another program that drives the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

import numpy as np

from ..contract import Shapes
from ..job import Conditioning, Job
from ..tiling import Tiles


@dataclass(frozen=True)
class Decoded:
    """Finished pixels [B, H, W, 3] uint8, and for each picture whether the decoder's values were finite."""

    image: np.ndarray
    finite: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Decoded:
        """The pictures of several decoder runs, each (image, magnitude), in order."""
        images, magnitudes = zip(*parts)
        image = images[0] if len(images) == 1 else np.concatenate(images)
        return cls(image, np.isfinite(np.concatenate(magnitudes)))


class Lanes(Protocol):
    """Pictures of one size on one device, each at an evaluation of its own.

    A lane is free or has a job. Methods may return before the device has finished.
    """

    @property
    def path(self) -> str:
        """How the steps ran: "cuda_graph", or "plain" calls of the inference library."""

    @property
    def busy(self) -> bool:
        """Whether a lane has a job."""

    def admit(self, lane: int, job: Job) -> None:
        """Gives a free lane a job that has not started."""

    def step(self, at: Sequence[int | None]) -> None:
        """Runs one evaluation. `at` has an index into the job's table for each lane, or None for a lane that waits or
        is free."""

    def release(self, lane: int) -> None:
        """Frees a lane, whether its job is finished or not."""

    def latents(self, lanes: Sequence[int], slot: int = 0) -> np.ndarray:
        """Copies of the lanes' current latents, or of another slot of their states, [n, C, h, w] float32. Waits for the
        device."""

    def replace(self, lanes: Sequence[int], latents: np.ndarray) -> None:
        """Makes `latents` [n, C, h, w] float32 the lanes' current ones."""

    def decode(self, lanes: Sequence[int], tiles: Tiles | None = None) -> Callable[[], Decoded]:
        """Starts the decoder on the lanes' current latents. The function that it returns waits for the pixels, and may
        be called after the lanes were released. Tiles are decoded one after the other before it returns."""


class Stopwatch(Protocol):
    """Time on the device between marks."""

    def mark(self) -> None:
        """Sets a mark after all work that was started so far."""

    def seconds(self) -> list[float]:
        """The seconds between each mark and the next. The device must have finished."""


class Backend(Protocol):
    """Graphs on a device."""

    description: str
    """The library, its version and the device, for messages."""

    profiles: tuple[Shapes, ...]
    """The sizes that it serves."""

    @property
    def encodes_images(self) -> bool:
        """Whether there is a VAE encoder."""

    @property
    def build_command(self) -> str | None:
        """The beginning of the command that builds for other sizes, where that is not the one that builds the
        bundle."""

    def encode_text(self, inputs: Mapping[str, np.ndarray]) -> Sequence[Conditioning]:
        """Encodes n texts, given as the text encoder's inputs: one embedding each, for `Job.rows`."""

    def encode_image(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Images [n, H, W, 3] float32 in -1..1 -> mean and standard deviation of their latents, [n, C, h, w] float32,
        scaled as the U-Net sees them. For bundles with a VAE encoder."""

    def decode(self, latents: np.ndarray) -> Decoded:
        """Latents [n, C, h, w] float32 -> pixels."""

    def change_weights(self, weights: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """From now on the components' weights are the bundle's, but for these: by component, by the weight's name in
        the graph. No lane may have a job. If it fails the weights are those from before."""

    def lanes(self, count: int, height: int, width: int) -> Lanes:
        """`count` free lanes for latents of h x w elements. Several sets of lanes may be in use at the same time."""

    def stopwatch(self) -> Stopwatch:
        """A stopwatch without marks. An earlier one may not be used any more."""

    def close(self) -> None:
        """Frees everything."""


def decode_in_tiles(decode: Callable[[np.ndarray], Decoded], latents: np.ndarray, tiles: Tiles) -> Decoded:
    """Latents [n, C, h, w] float32 -> pixels, by `Backend.decode` on their tiles."""

    def run(some: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        part = decode(some)
        return part.image, part.finite

    return Decoded(*tiles.decode(run, latents))


def encode_in_parts(
    run: Callable[[np.ndarray], Sequence[np.ndarray]], images: np.ndarray, together: int
) -> tuple[np.ndarray, np.ndarray]:
    """`Backend.encode_image` by runs of the VAE encoder on up to so many images."""
    parts = [run(images[i : i + together]) for i in range(0, len(images), together)]
    mean, std = (np.concatenate(one) for one in zip(*parts))
    return mean, std


class HostStopwatch:
    """A stopwatch for backends whose calls return when the work is done."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(perf_counter())

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self._marks, self._marks[1:])]
