"""Packs pictures, each at a step of its own, side by side into one call of the denoiser, of the smallest size that is
served."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..contract import PROMPT_TOKENS, Component, Shapes, Tensor
from ..errors import BackendError
from ..job import Job, Phase, spans

PARTS = 4
"""Rows of a call beyond one for each sample come in quarters of the samples, so that a number of samples has five
sizes of call with and without guidance, and pictures that change between the two do not need one after the other."""


Place = tuple[int] | tuple[int, slice]
"""A sample or a row of an input, or some of a row's tokens."""


@dataclass(frozen=True)
class Packing:
    """Jobs in one call of `batch` samples, `rows` rows and so many tokens, as long as each is in its phase.

    The job at position p has sample p and the rows from starts[p] on. Samples and rows after the last job's are idle:
    their weight is 0, and idle rows repeat sample 0. The U-Net evaluates rows, not samples.
    """

    jobs: tuple[Job, ...]
    phases: tuple[Phase, ...]
    batch: int
    rows: int
    starts: tuple[int, ...]
    tokens: int = PROMPT_TOKENS

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        """The inputs that describe the packing: the sample of each row, and the rows whose standard deviation stays."""
        row_sample = np.zeros(self.rows, np.int32)
        rescale = np.zeros((self.batch, self.rows), np.float32)
        for position, job in enumerate(self.jobs):
            place, rows = self._place(position), self.phases[position].rows
            row_sample[place] = position
            rescale[position, place] = [job.rows[row].rescale for row in rows]
        return {"row_sample": row_sample, "rescale": rescale}

    def steps(self, position: int) -> dict[str, np.ndarray]:
        """A job's `steps`, [E, ...] by name, with its rows' weights at their places among all rows."""
        job = self.jobs[position]
        mixing = np.zeros((len(job.table), self.rows), np.float32)
        mixing[:, self._place(position)] = job.weights[:, list(self.phases[position].rows)]
        return {**job.steps, "mixing": mixing}

    def holds(self, jobs: Sequence[Job], phases: Sequence[Phase]) -> bool:
        """Whether exactly these jobs lie here, with the rows of these phases."""
        if self.jobs != tuple(jobs):
            return False
        return all(own.rows == other.rows for own, other in zip(self.phases, phases))

    def values(self, denoiser: Component) -> Iterator[tuple[str, Place, Any]]:
        """The jobs' values for the inputs that change once a loop: (input, where in it, value)."""
        for position, job in enumerate(self.jobs):
            for tensor in self._looped(denoiser):
                if tensor.dims[0] != "rows":
                    yield tensor.name, (position,), _extra(job, tensor)
            yield from self.row_values(denoiser, position, self.phases[position])

    def row_values(self, denoiser: Component, position: int, phase: Phase) -> Iterator[tuple[str, Place, Any]]:
        """The same for the rows of the job at that position, with the embeddings of a phase that has these rows."""
        job, start = self.jobs[position], self.starts[position]
        for tensor in self._looped(denoiser):
            if tensor.dims[0] != "rows":
                continue
            for i, (row, text) in enumerate(zip(phase.rows, phase.texts)):
                own = text.get(tensor.name)
                value = _extra(job, tensor)[row] if own is None else own
                if "tokens" not in tensor.names:
                    yield tensor.name, (start + i,), value
                    continue
                for span, part in spans(value, self.tokens):
                    yield tensor.name, (start + i, span), part

    def _looped(self, denoiser: Component) -> list[Tensor]:
        """The inputs that have a value of the jobs for each loop."""
        return [one for one in denoiser.inputs if one.changes != "step" and one.name not in self.inputs]

    def _place(self, position: int) -> slice:
        """The rows of the job at that position."""
        start = self.starts[position]
        return slice(start, start + len(self.phases[position].rows))


def _extra(job: Job, tensor: Tensor) -> np.ndarray:
    if tensor.name in job.extras:
        return job.extras[tensor.name]
    if tensor.default is None:
        raise BackendError(f"the denoiser's input {tensor.name} has no value; jobs of this family have one in `extras`")
    return np.full(1, tensor.default, tensor.dtype)


def pack(
    jobs: Sequence[Job],
    phases: Sequence[Phase],
    height: int,
    width: int,
    profiles: Sequence[Shapes],
    least_rows: int = 0,
    tokens: int = 1,
) -> Packing:
    """Packs the jobs, each in its phase, into the smallest call that a profile serves at this size in pixels, with at
    least `least_rows` rows and a multiple of `tokens`. BackendError if no profile does."""
    starts, rows = [], 0
    for phase in phases:
        starts.append(rows)
        rows += len(phase.rows)
    rows = max(rows, least_rows)
    tokens = math.lcm(tokens, *(job.tokens for job in jobs))
    long_enough = [profile for profile in profiles if profile.tokens(tokens) is not None]
    if profiles and not long_enough:
        raise BackendError(
            f"texts of {tokens} tokens in a call fit no profile; served: {'; '.join(map(str, profiles))}"
        )
    batch, rows = smallest(len(jobs), rows, height, width, long_enough)
    served = [one.tokens(tokens) for one in long_enough if one.allows(height, width, batch, rows)]
    tokens = min((count for count in served if count is not None), default=tokens)
    return Packing(tuple(jobs), tuple(phases), batch, rows, tuple(starts), tokens)


def smallest(batch: int, rows: int, height: int, width: int, profiles: Sequence[Shapes]) -> tuple[int, int]:
    """The smallest numbers of samples and rows, at least these, that a profile serves at that size. Without profiles
    every number is served. More than PARTS samples take rows in steps of a PARTS-th of them. BackendError if no profile
    fits."""
    if not profiles:
        return batch, _rounded(rows, batch)
    fitting = []
    for profile in profiles:
        if height not in profile.height or width not in profile.width or batch > profile.batch.max:
            continue
        if profile.rows is not None and rows > profile.rows.max:
            continue
        samples = max(batch, profile.batch.min)
        least = _rounded(rows, samples)
        if profile.rows is not None:
            least = min(max(least, profile.rows.min), profile.rows.max)
        fitting.append((samples, least))
    if not fitting:
        served = "; ".join(map(str, profiles))
        raise BackendError(
            f"{batch} pictures of {height} x {width} in {rows} U-Net rows fit no profile; served: {served}"
        )
    return min(fitting)


def _rounded(rows: int, batch: int) -> int:
    """The next number of rows that calls of so many samples have: with guidance for all it is twice the samples."""
    if rows <= batch:
        return rows
    step = math.ceil(batch / PARTS)
    rounded = batch + math.ceil((rows - batch) / step) * step
    return min(rounded, 2 * batch) if rows <= 2 * batch else rounded
