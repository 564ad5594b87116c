"""Pictures on one GPU, each at a step of its own. A step is one copy to the GPU and one launch; no step waits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ...contract import PROMPT_TOKENS
from ...job import Job, Phase
from ...tiling import Tiles
from ..interface import Decoded, decode_in_tiles
from ..packing import Packing, pack
from .places import Place
from .steps import Step

if TYPE_CHECKING:
    from .backend import TensorRtBackend


class TensorRtLanes:
    """Lanes whose jobs lie side by side in the denoiser's buffers.

    A job's state is in one of three places: on the host before its first step, in the buffers of the step that it takes
    part in, or in a place of its own on the GPU while others step."""

    def __init__(self, backend: TensorRtBackend, count: int, height: int, width: int) -> None:
        self._backend, self._size = backend, (height, width)
        denoiser = backend.family["denoiser"]
        self._state = denoiser.state
        shape = self._state.shape(self._sizes(1, 1))
        self._plane = shape[2:]
        self._state_bytes, self._plane_bytes = 4 * math.prod(shape), 4 * math.prod(self._plane)
        self._jobs: list[Job | None] = [None] * count
        self._fresh: dict[Job, np.ndarray] = {}
        self._parked: dict[Job, Place] = {}
        self._step: Step | None = None
        self._packing: Packing | None = None
        """How jobs lie in the step."""
        self._phases: list[Phase] = []
        """The phases whose embeddings are in the step."""
        self._path = "plain"

    @property
    def path(self) -> str:
        return self._path if self._step is None else self._step.path

    @property
    def busy(self) -> bool:
        return any(job is not None for job in self._jobs)

    def admit(self, lane: int, job: Job) -> None:
        self._jobs[lane], self._fresh[job] = job, job.latents

    def release(self, lane: int) -> None:
        job, self._jobs[lane] = self._jobs[lane], None
        if job is not None:
            self._fresh.pop(job, None)
            self._parked.pop(job, None)

    def step(self, at: Sequence[int | None]) -> None:
        """Starts an evaluation. While the GPU works on it, the noise of the next one is drawn."""
        jobs = [job for job, index in zip(self._jobs, at) if job is not None and index is not None]
        indices = [index for job, index in zip(self._jobs, at) if job is not None and index is not None]
        if not jobs:
            return
        phases = [job.phases[index] for job, index in zip(jobs, indices)]
        with self._backend.device:
            self._enter(jobs, phases).run(indices)
        for job, index in zip(jobs, indices):
            job.draw_ahead(index + 1)

    def _enter(self, jobs: list[Job], phases: list[Phase]) -> Step:
        """The step in which exactly these jobs lie, with what they take in these phases."""
        step, packing = self._step, self._packing
        if step is None or packing is None or not packing.holds(jobs, phases):
            return self._pack(jobs, phases)
        for position, (old, new) in enumerate(zip(self._phases, phases)):
            if old is not new:
                step.change(packing, position, new)
        self._phases = phases
        return step

    def _pack(self, jobs: list[Job], phases: list[Phase]) -> Step:
        """Moves the jobs into the smallest step for these phases."""
        self.leave()
        backend, (height, width) = self._backend, self._size
        factor = backend.family.factor
        packing = pack(jobs, phases, height * factor, width * factor, backend.profiles)
        step = backend.denoising(self._sizes(packing.batch, packing.rows, packing.tokens))
        step.enter(packing, self)
        for position, job in enumerate(jobs):
            self._place(job, step.execution.part(self._state.name, position)[0])
        for job in jobs:
            self._fresh.pop(job, None)
            self._parked.pop(job, None)
        self._packing, self._phases, self._step = packing, phases, step
        return step

    def _place(self, job: Job, address: int) -> None:
        """Writes a job's state into the denoiser's."""
        backend = self._backend
        if job in self._fresh:
            backend.stream.clear(address, self._state_bytes)
            backend.uploads.put(address, self._fresh[job])
        else:
            backend.stream.copy(address, self._parked[job].address, self._state_bytes)

    def leave(self) -> None:
        """Takes the jobs out of the step's buffers, since those are needed otherwise."""
        if self._step is None:
            return
        parked = {}
        for job in self._entered:
            if job in self._jobs:
                parked[job] = self._backend.states.take(1 << (self._state_bytes - 1).bit_length())
                self._backend.stream.copy(parked[job].address, self._address(job), self._state_bytes)
        self._parked |= parked
        self._path = self._step.path
        self._step.free()
        self._step, self._packing = None, None

    @property
    def _entered(self) -> tuple[Job, ...]:
        """The jobs that lie in the step, by their sample."""
        return () if self._packing is None else self._packing.jobs

    def _address(self, job: Job) -> int:
        """Where the state of a job lies that is not fresh. Its latents come first in it."""
        if job in self._parked:
            return self._parked[job].address
        assert self._step is not None
        return self._step.execution.part(self._state.name, self._entered.index(job))[0]

    def _job(self, lane: int) -> Job:
        job = self._jobs[lane]
        assert job is not None, f"lane {lane} is free"
        return job

    def latents(self, lanes: Sequence[int], slot: int = 0) -> np.ndarray:
        jobs, backend = [self._job(lane) for lane in lanes], self._backend
        with backend.device:
            result = backend.results.take(len(jobs) * self._plane_bytes)
            for position, job in enumerate(jobs):
                if job not in self._fresh:
                    target = result.address + position * self._plane_bytes
                    source = self._address(job) + slot * self._plane_bytes
                    backend.stream.download(target, source, self._plane_bytes)
            backend.synchronize("waiting for the latents")
        content = result.bytes[: len(jobs) * self._plane_bytes].copy()
        latents = content.view(np.float32).reshape(len(jobs), *self._plane)
        for position, job in enumerate(jobs):
            if job in self._fresh:
                latents[position] = 0 if slot else self._fresh[job]
        return latents

    def replace(self, lanes: Sequence[int], latents: np.ndarray) -> None:
        with self._backend.device:
            for lane, value in zip(lanes, latents):
                job = self._job(lane)
                if job in self._fresh:
                    self._fresh[job] = value.copy()
                else:
                    self._backend.uploads.put(self._address(job), value)

    def decode(self, lanes: Sequence[int], tiles: Tiles | None = None) -> Callable[[], Decoded]:
        if tiles is not None:
            decoded = decode_in_tiles(self._backend.decode, self.latents(lanes), tiles)
            return lambda: decoded
        jobs = [self._job(lane) for lane in lanes]
        sources = [self._fresh[job] if job in self._fresh else self._address(job) for job in jobs]
        return self._backend.start_decode(sources, *self._size)

    def _sizes(self, batch: int, rows: int, tokens: int = PROMPT_TOKENS) -> dict[str, int]:
        height, width = self._size
        return {"batch": batch, "rows": rows, "tokens": tokens, "height": height, "width": width}
