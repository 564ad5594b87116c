"""What the pipeline asks of a backend. The loop in pipeline.py is the same for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, Protocol

import numpy as np

from ..contract import Shapes


@dataclass(frozen=True)
class Denoising:
    """All that the device needs for one denoising loop: E evaluations, B samples, N U-Net rows.

    latents [B, 4, h, w]; contexts: the N rows' texts, as `encode_text` returned them; row_sample [N] int32; mixing [B,
    N]; timesteps [E, N]; updates [E, B, K, K+2]; noise [E, B, 4, h, w] or None for samplers without; float32 unless
    said otherwise.
    """

    latents: np.ndarray
    contexts: Sequence[Any]
    row_sample: np.ndarray
    mixing: np.ndarray
    timesteps: np.ndarray
    updates: np.ndarray
    noise: np.ndarray | None


@dataclass(frozen=True)
class Decoded:
    """Finished pixels [B, H, W, 3] uint8, and for each picture whether the decoder's values were finite."""

    image: np.ndarray
    finite: np.ndarray

    @classmethod
    def join(cls, parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Decoded:
        """The pictures of several decoder runs, each (image, magnitude), in order."""
        images, magnitudes = zip(*parts)
        return cls(images[0] if len(images) == 1 else np.concatenate(images), np.isfinite(np.concatenate(magnitudes)))


class Session(Protocol):
    """One denoising loop. `step` may return before the device has done the work."""

    @property
    def path(self) -> str:
        """How the steps of this session ran, for `Result.timings`."""

    def step(self, index: int) -> None:
        """Evaluation `index` of the table."""

    @property
    def latents(self) -> np.ndarray:
        """A copy of the current latents, [B, 4, h, w]; waits for the device."""

    @latents.setter
    def latents(self, value: np.ndarray) -> None: ...

    def decode(self) -> Callable[[], Decoded]:
        """Starts the VAE decoder on the current latents; the function that it returns waits for the pixels."""


class Stopwatch(Protocol):
    """Time on the device between marks."""

    def mark(self) -> None:
        """Sets a mark behind all work that was started so far."""

    def seconds(self) -> list[float]:
        """What passed between each mark and the next; to be asked when the device has finished."""


class Backend(Protocol):
    """Graphs on a device."""

    description: str
    """The library, its version and the device, for people."""

    profiles: tuple[Shapes, ...]
    """The sizes that it serves."""

    @property
    def rebuild(self) -> str | None:
        """The beginning of the command that builds for other sizes, where that is not the one that builds the
        bundle."""

    def encode_text(self, input_ids: np.ndarray) -> Sequence[Any]:
        """Token ids [n, 77] int32 -> one text embedding for each, to be given back in `Denoising.contexts`."""

    def start(self, denoising: Denoising) -> Session:
        """A loop over the evaluations of `denoising`, none of them done yet. It ends the one before."""

    def stopwatch(self) -> Stopwatch:
        """A stopwatch without marks. It ends the one before."""

    def close(self) -> None:
        """Frees everything."""


class HostStopwatch:
    """For backends whose calls return when the work is done."""

    def __init__(self) -> None:
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(perf_counter())

    def seconds(self) -> list[float]:
        return [b - a for a, b in zip(self._marks, self._marks[1:])]
