"""Lanes whose denoiser reads NumPy arrays: those of ONNX Runtime and OpenVINO."""

from __future__ import annotations

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..contract import PROMPT_TOKENS, Family, Shapes, Sizes
from ..job import Job, Phase
from ..tiling import Tiles
from .interface import Decoded, decode_in_tiles, encode_in_parts
from .packing import Packing, pack

PIXELS_PER_DECODE = 512 * 512
"""Pictures are decoded together up to this size; larger ones one by one, which costs no time and bounds the memory."""


class HostCall(Protocol):
    """The denoiser at one size, with its buffers.

    inputs: for each input except the state, an array that stays in place, or an object that accepts the same
    assignments. states: two arrays [B, K, C, h, w]; each step reads one and writes the other.
    """

    @property
    def inputs(self) -> Mapping[str, Any]: ...

    @property
    def states(self) -> tuple[np.ndarray, np.ndarray]: ...

    owner: Callable[[], HostLanes | None]
    """Returns the lanes whose jobs are in the buffers, or None."""

    @property
    def path(self) -> str:
        """See `Lanes.path`."""

    def enter(self) -> None:
        """Called after inputs that change once a loop were written."""

    def run(self, current: int) -> None:
        """One step, from state number `current` to the other. The inputs that change with a step were written
        before."""

    def read(self, current: int) -> np.ndarray:
        """The array of state number `current`, as the last step left it."""

    def write(self, current: int) -> None:
        """Called after the array of state number `current` was written."""


class HostBackend(Protocol):
    """What `HostLanes` asks of its backend."""

    family: Family
    profiles: tuple[Shapes, ...]

    def call(self, sizes: Sizes) -> HostCall:
        """The denoiser at these sizes."""

    def decode(self, latents: np.ndarray) -> Decoded:
        """Latents [n, C, h, w] -> pixels."""


def decoded_together(height: int, width: int, factor: int) -> int:
    """How many latents of that size go through the decoder at once."""
    return max(1, PIXELS_PER_DECODE // (height * width * factor**2))


class HostCoder(ABC):
    """The VAE's two graphs, for backends that run a component on NumPy arrays."""

    family: Family
    graphs: Mapping[str, Path]

    @abstractmethod
    def run(self, component: str, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
        """One run of a component: its outputs in the order of the contract."""

    @property
    def encodes_images(self) -> bool:
        """See `Backend.encodes_images`."""
        return "vae_encoder" in self.graphs

    def encode_image(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `Backend.encode_image`."""
        factor = self.family.factor
        together = decoded_together(images.shape[1] // factor, images.shape[2] // factor, factor)
        return encode_in_parts(lambda some: self.run("vae_encoder", {"image": some}), images, together)

    def decode(self, latents: np.ndarray) -> Decoded:
        """Latents [n, C, h, w] float32 -> pixels."""
        size = decoded_together(latents.shape[2], latents.shape[3], self.family.factor)
        parts = [self.run("vae_decoder", {"latents": latents[i : i + size]}) for i in range(0, len(latents), size)]
        return Decoded.join([(image, magnitude) for image, magnitude in parts])


def nobody() -> None:
    """The owner of buffers that are free."""


class HostLanes:
    """Lanes that share one call of the denoiser, or take turns if `together` is False. A large model on a CPU gains
    nothing from sharing, and each further size of it takes gigabytes: a second one pays where guidance has an interval,
    outside of which half the rows take half the time."""

    def __init__(self, backend: HostBackend, count: int, height: int, width: int, together: bool = True) -> None:
        self._backend, self._together, self._size = backend, together, (height, width)
        self._denoiser = backend.family["denoiser"]
        self._jobs: list[Job | None] = [None] * count
        self._states: dict[Job, np.ndarray] = {}
        """States that lie in no call: [K, C, h, w] of each job."""
        self._call: HostCall | None = None
        self._packing: Packing | None = None
        """How jobs lie in the call."""
        self._phases: list[Phase] = []
        """The phases whose embeddings are in the call."""
        self._lanes: list[int] = []
        """The jobs' lanes, as long as those have had no other job since."""
        self._rows: list[tuple[int, list[Phase], Callable[[int], None]]] = []
        """For each lane its job's phases, and what writes its inputs of a step."""
        self._current = 0
        self._path = "plain"

    @property
    def path(self) -> str:
        return self._path if self._call is None else self._call.path

    @property
    def busy(self) -> bool:
        return any(job is not None for job in self._jobs)

    def admit(self, lane: int, job: Job) -> None:
        state = np.zeros(self._denoiser.state.shape(self._sizes(1, 1))[1:], np.float32)
        state[0] = job.latents
        self._jobs[lane], self._states[job], self._lanes = job, state, []

    def release(self, lane: int) -> None:
        job, self._jobs[lane], self._lanes = self._jobs[lane], None, []
        if job is not None:
            self._states.pop(job, None)

    def step(self, at: Sequence[int | None]) -> None:
        lanes = [lane for lane, index in enumerate(at) if index is not None]
        if not lanes:
            return
        for turn in [lanes] if self._together else [[lane] for lane in lanes]:
            call = self._call
            if call is None or not self._prepared(turn, at):
                call = self._enter(turn, [index for lane in turn if (index := at[lane]) is not None])
            for lane, _, write in self._rows:
                write(at[lane])  # type: ignore[arg-type]
            call.run(self._current)
            self._current = 1 - self._current

    def _prepared(self, lanes: list[int], at: Sequence[int | None]) -> bool:
        """Whether the call holds all that these lanes' jobs take, but for the inputs of a step."""
        if lanes != self._lanes:
            return False
        return self._phases == [phases[at[lane]] for lane, phases, _ in self._rows]  # type: ignore[index]

    def _enter(self, lanes: list[int], indices: list[int]) -> HostCall:
        """The call in which exactly these lanes' jobs lie, with what they take at these evaluations."""
        jobs = [self._job(lane) for lane in lanes]
        phases = [job.phases[index] for job, index in zip(jobs, indices)]
        if self._call is None or self._packing is None or not self._packing.holds(jobs, phases):
            self._call, self._packing = self._pack(jobs, phases)
        else:
            self._change_texts(self._call, self._packing, phases)
        self._phases = phases
        if self._lanes != lanes:
            steps = [writer(self._call, job, self._packing.steps(i), i) for i, job in enumerate(jobs)]
            self._rows = [(lane, job.phases, write) for lane, job, write in zip(lanes, jobs, steps)]
            self._lanes = lanes
        return self._call

    def _pack(self, jobs: list[Job], phases: list[Phase]) -> tuple[HostCall, Packing]:
        """Moves the jobs into the smallest call for these phases."""
        self.leave()
        height, width = (side * self._backend.family.factor for side in self._size)
        packing = pack(
            jobs, phases, height, width, self._backend.profiles, self._least_rows(phases), self._least_tokens()
        )
        call = self._backend.call(self._sizes(packing.batch, packing.rows, packing.tokens))
        if (other := call.owner()) is not None:
            other.leave()
        self._fill(call, packing)
        call.owner, self._current = weakref.ref(self), 0
        return call, packing

    def _fill(self, call: HostCall, packing: Packing) -> None:
        """Writes the states and the inputs that change once a loop. Idle samples and rows get zeros."""
        for tensor in self._denoiser.inputs:
            if not tensor.fed_by:
                call.inputs[tensor.name][...] = 0
        for name, value in packing.inputs.items():
            call.inputs[name][...] = value
        for name, place, value in packing.values(self._denoiser):
            call.inputs[name][place] = value
        call.states[0][...] = 0
        for position, job in enumerate(packing.jobs):
            call.states[0][position] = self._states.pop(job)
        call.write(0)
        call.enter()

    def _change_texts(self, call: HostCall, packing: Packing, phases: list[Phase]) -> None:
        """Writes the embeddings of the jobs whose phase is another one than before."""
        changed = [i for i, (old, new) in enumerate(zip(self._phases, phases)) if old is not new]
        for position in changed:
            for name, place, value in packing.row_values(self._denoiser, position, phases[position]):
                call.inputs[name][place] = value
        if changed:
            call.enter()

    def _least_rows(self, phases: list[Phase]) -> int:
        """Lanes that take turns use calls of one size, so they all need the rows of the largest job. If a job has
        evaluations with fewer rows, those have a second size."""
        if self._together:
            return 0
        fewest = self._fewest_rows()
        if fewest is not None and len(phases[0].rows) <= fewest:
            return fewest
        return max(len(job.rows) for job in self._jobs if job is not None)

    def _least_tokens(self) -> int:
        """Those of all lanes' texts, where lanes take turns."""
        return 1 if self._together else math.lcm(*(job.tokens for job in self._jobs if job is not None))

    def _fewest_rows(self) -> int | None:
        """The fewest rows of an evaluation, among the jobs in which this number changes. None if there are none."""
        counts = [{len(phase.rows) for phase in job.phases} for job in self._jobs if job is not None]
        return min((min(one) for one in counts if len(one) > 1), default=None)

    def leave(self) -> None:
        """Takes the jobs out of the call, since it or its buffers are needed otherwise."""
        if self._call is None:
            return
        states = self._call.read(self._current)
        for position, job in enumerate(self.entered):
            if job in self._jobs:
                self._states[job] = states[position].copy()
        self._path, self._call.owner = self._call.path, nobody
        self._call, self._packing, self._lanes, self._rows = None, None, [], []

    @property
    def entered(self) -> tuple[Job, ...]:
        """The jobs that lie in the call, by their sample."""
        return () if self._packing is None else self._packing.jobs

    def latents(self, lanes: Sequence[int], slot: int = 0) -> np.ndarray:
        states = self._every_state()
        return np.stack([states[self._job(lane)][slot] for lane in lanes])

    def replace(self, lanes: Sequence[int], latents: np.ndarray) -> None:
        states = self._every_state()
        for lane, value in zip(lanes, latents):
            states[self._job(lane)][0] = value
        if self._call is not None:
            self._call.write(self._current)

    def _job(self, lane: int) -> Job:
        job = self._jobs[lane]
        assert job is not None, f"lane {lane} is free"
        return job

    def _every_state(self) -> dict[Job, np.ndarray]:
        """The state [K, C, h, w] of each job, wherever it lies."""
        if self._call is None:
            return self._states
        return {**self._states, **dict(zip(self.entered, self._call.read(self._current)))}

    def decode(self, lanes: Sequence[int], tiles: Tiles | None = None) -> Callable[[], Decoded]:
        latents, backend = self.latents(lanes), self._backend
        decoded = backend.decode(latents) if tiles is None else decode_in_tiles(backend.decode, latents, tiles)
        return lambda: decoded

    def _sizes(self, batch: int, rows: int, tokens: int = PROMPT_TOKENS) -> dict[str, int]:
        height, width = self._size
        return {"batch": batch, "rows": rows, "tokens": tokens, "height": height, "width": width}


def writer(call: HostCall, job: Job, steps: Mapping[str, np.ndarray], position: int) -> Callable[[int], None]:
    """What writes a job's inputs of a step, at an evaluation, as the call's sample at that position. It is called with
    every step, so all that stays the same is looked up once."""
    inputs = call.inputs
    steady = [(inputs[name], array) for name, array in steps.items()]

    def write(index: int) -> None:
        for target, array in steady:
            target[position] = array[index]

    if job.noise is None:
        return write

    def write_with_noise(index: int) -> None:
        write(index)
        for name, value in job.drawn(index).items():
            inputs[name][position] = value

    return write_with_noise
