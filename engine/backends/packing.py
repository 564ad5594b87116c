"""Packs pictures, each at a step of its own, side by side into one call of the denoiser, of the smallest size that is
served."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..contract import Component, Shapes
from ..errors import BackendError
from ..job import Job


@dataclass(frozen=True)
class Packing:
    """Jobs in one call of `batch` samples and `rows` rows of the U-Net.

    The job at position p has sample p and the rows from starts[p] on. Samples and rows after the last job's are idle:
    their weight is 0, and idle rows repeat sample 0. The U-Net evaluates rows, not samples.
    """

    jobs: tuple[Job, ...]
    batch: int
    rows: int
    starts: tuple[int, ...]

    @cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        """The inputs that describe the packing: the sample of each row, and its weight in the sample's output."""
        row_sample = np.zeros(self.rows, np.int32)
        mixing = np.zeros((self.batch, self.rows), np.float32)
        for position, (job, start) in enumerate(zip(self.jobs, self.starts)):
            stop = start + len(job.rows)
            row_sample[start:stop] = position
            mixing[position, start:stop] = [row.weight for row in job.rows]
        return {"row_sample": row_sample, "mixing": mixing}

    def values(self, denoiser: Component) -> Iterator[tuple[str, int, Any]]:
        """The jobs' values for the inputs that change once a loop: (input, index of the row or sample, value)."""
        for tensor in denoiser.inputs:
            if tensor.changes == "step" or tensor.name in self.inputs:
                continue
            for position, (job, start) in enumerate(zip(self.jobs, self.starts)):
                if tensor.dims[0] == "rows":
                    for i, row in enumerate(job.rows):
                        own = row.conditioning.get(tensor.name)
                        yield tensor.name, start + i, _extra(job, tensor.name)[i] if own is None else own
                else:
                    yield tensor.name, position, _extra(job, tensor.name)


def _extra(job: Job, name: str) -> np.ndarray:
    if name not in job.extras:
        raise BackendError(f"the denoiser's input {name} has no value; jobs of this family have one in `extras`")
    return job.extras[name]


def pack(jobs: Sequence[Job], height: int, width: int, profiles: Sequence[Shapes], least_rows: int = 0) -> Packing:
    """Packs the jobs into the smallest call that a profile serves at this size in pixels, with at least `least_rows`
    rows. BackendError if no profile does."""
    starts, rows = [], 0
    for job in jobs:
        starts.append(rows)
        rows += len(job.rows)
    rows = max(rows, least_rows)
    batch, rows = smallest(len(jobs), rows, height, width, profiles)
    return Packing(tuple(jobs), batch, rows, tuple(starts))


def smallest(batch: int, rows: int, height: int, width: int, profiles: Sequence[Shapes]) -> tuple[int, int]:
    """The smallest numbers of samples and rows, at least these, that a profile serves at that size. Without profiles
    every number is served. BackendError if no profile fits."""
    if not profiles:
        return batch, rows
    fitting = []
    for profile in profiles:
        if height not in profile.height or width not in profile.width or batch > profile.batch.max:
            continue
        if profile.rows is not None and rows > profile.rows.max:
            continue
        least = 1 if profile.rows is None else profile.rows.min
        fitting.append((max(batch, profile.batch.min), max(rows, least)))
    if not fitting:
        served = "; ".join(map(str, profiles))
        raise BackendError(
            f"{batch} pictures of {height} x {width} in {rows} U-Net rows fit no profile; served: {served}"
        )
    return min(fitting)
