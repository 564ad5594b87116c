"""What a call returns, and how long its stages took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from time import perf_counter
from typing import Any

from .backends.interface import HostStopwatch, Stopwatch


class _ByName(Mapping[str, Any]):
    """Makes the fields of a dataclass readable as a mapping's items."""

    def __getitem__(self, name: str) -> Any:
        if name not in set(self):
            raise KeyError(name)
        return getattr(self, name)

    def __iter__(self) -> Iterator[str]:
        return (field.name for field in fields(self))  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class HostTimings(_ByName):
    """Seconds that the host took to start each stage. Waiting for the device is not included."""

    text_encoder: float
    prepare: float
    denoise: float
    vae_decoder: float


@dataclass(frozen=True, eq=False)
class Timings(_ByName):
    """Seconds of each stage of a call; `timings["denoise"]` and `dict(timings)` work too.

    tokenize: of the host. text_encoder, prepare, denoise and vae_decoder: of the device. `text_encoder` has the time of
    the VAE encoder too, where a call starts from an image. `prepare` is for buffers and tables, for compiling the
    denoiser where a size is new, and for switching adapters. Each is the sum of both passes, where there are two.
    steps: each step of `denoise`. total: from the call to its return. host: see HostTimings. path: how the steps ran,
    as a "cuda_graph" or as "plain" calls of the inference library.
    """

    tokenize: float
    text_encoder: float
    prepare: float
    denoise: float
    vae_decoder: float
    steps: list[float]
    host: HostTimings
    path: str
    total: float


@dataclass(frozen=True)
class Result:
    """The pictures of a call.

    images: a list of PIL images, or [B, H, W, 3] float32 in 0..1 ("np"), or latents [B, C, h, w] ("latent"); seeds: the
    one seed of the call or one for each picture; evaluations: how often the U-Net ran; interrupted: whether a callback
    stopped the loop.
    """

    images: Any
    timings: Timings
    seeds: list[int]
    evaluations: int
    interrupted: bool


class Clock:
    """Marks the ends of a call's stages, on the device and on the host."""

    def __init__(self, device: Stopwatch, started: float) -> None:
        """`started`: when the call began, by `perf_counter`."""
        self._device, self._host, self._started = device, HostStopwatch(), started
        self._stages: list[str] = []
        self._device.mark()
        self._host.mark()

    def mark(self, stage: str) -> None:
        """The end of a part of a stage: a field of `Timings`, "denoise" for each step."""
        self._stages.append(stage)
        self._device.mark()
        self._host.mark()

    def timings(self, path: str) -> Timings:
        """The timings. The device must have finished."""
        device, host = self._device.seconds(), self._host.seconds()
        on_device, on_host = partial(self._total, device), partial(self._total, host)
        return Timings(
            tokenize=on_host("tokenize"),
            text_encoder=on_device("text_encoder"),
            prepare=on_device("prepare"),
            denoise=on_device("denoise"),
            vae_decoder=on_device("vae_decoder"),
            steps=[seconds for seconds, stage in zip(device, self._stages) if stage == "denoise"],
            host=HostTimings(*map(on_host, ("text_encoder", "prepare", "denoise", "vae_decoder"))),
            path=path,
            total=perf_counter() - self._started,
        )

    def _total(self, seconds: Sequence[float], stage: str) -> float:
        return sum(part for part, name in zip(seconds, self._stages) if name == stage)
