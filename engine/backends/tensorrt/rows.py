"""The inputs that change with every step: how they lie in memory, and their way there in one copy a step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ...errors import TensorRtError
from ...job import Job
from ..packing import Packing
from .cuda import Device, Stream, align
from .engines import Execution
from .pinned import AHEAD_BYTES, BLOCK_BYTES, Ring

AHEAD_STEPS = 1024
"""How many steps the host may be ahead: as many as a picture has, so that it is waited for once."""

STEPS_PER_BLOCK = 64


class Sample:
    """A job's inputs of each step, as bytes: in a step the host only moves them."""

    def __init__(self, job: Job, steps: Mapping[str, np.ndarray], types: Mapping[str, np.dtype[Any]]) -> None:
        self._job = job
        self._draws = [False] * len(job.table) if job.noise is None else job.table.draws.tolist()
        self.steps = {name: as_bytes(array, types[name]) for name, array in steps.items()}
        self.names = tuple(self.steps)

    @property
    def draws(self) -> bool:
        """Whether an evaluation takes more than `steps`."""
        return any(self._draws)

    def drawn(self, index: int) -> Mapping[str, np.ndarray]:
        """What an evaluation takes besides `steps`: its noise, if it has some."""
        return self._job.drawn(index) if self._draws[index] else {}


def as_bytes(array: np.ndarray, dtype: np.dtype[Any]) -> list[bytes]:
    """The content of array[0], array[1], ..."""
    content, size = np.ascontiguousarray(array, dtype).tobytes(), math.prod(array.shape[1:]) * dtype.itemsize
    return [content[start : start + size] for start in range(0, len(content), size)]


class Slot:
    """Pinned memory of one step: its address, and for each input the memory of all samples and of each of them."""

    def __init__(self, address: int, arrays: dict[str, np.ndarray]) -> None:
        self.address, self.arrays = address, arrays
        self.samples = {name: sample_memory(array) for name, array in arrays.items()}


def sample_memory(array: np.ndarray) -> list[memoryview]:
    """The bytes of array[0], array[1], ..., to be written to."""
    return [array[i : i + 1].reshape(-1).view(np.uint8).data for i in range(len(array))]


class Span:
    """A run of the execution's memory that is copied at once: from the first to the last of some of its inputs."""

    def __init__(self, device: Device, stream: Stream, execution: Execution, names: Sequence[str]) -> None:
        self.names, self.target = tuple(names), execution.address[names[0]]
        self._places = {name: execution.address[name] - self.target for name in names}
        self._execution, self.nbytes = execution, self._places[names[-1]] + execution.nbytes[names[-1]]
        self._pitch = align(self.nbytes)
        self._count = max(1, min(STEPS_PER_BLOCK, BLOCK_BYTES // self._pitch))
        limit = max(2 * self._count, min(AHEAD_STEPS, AHEAD_BYTES // self._pitch)) * self._pitch
        self._ring = Ring(device, stream, limit, "steps")
        self._slots: dict[int, list[Slot]] = {}
        self._current: list[Slot] = []
        self._used = 0

    def next(self) -> Slot:
        """A slot that the GPU does not read. Its arrays hold zeros, or what an earlier step put there."""
        if self._used == len(self._current):
            block = self._ring.turn(self._count * self._pitch)
            if block.address not in self._slots:
                starts = range(0, block.nbytes, self._pitch)
                self._slots[block.address] = [self._slot(block.address, block.bytes, start) for start in starts]
            self._current, self._used = self._slots[block.address], 0
        slot = self._current[self._used]
        self._used += 1
        return slot

    def _slot(self, address: int, content: np.ndarray, start: int) -> Slot:
        arrays = {}
        for name, offset in self._places.items():
            place = content[start + offset : start + offset + self._execution.nbytes[name]]
            arrays[name] = place.view(self._execution.types[name]).reshape(self._execution.shape[name])
        return Slot(address + start, arrays)

    def close(self) -> None:
        self._ring.close()


class Rows:
    """The rows of an execution: each step's inputs, for all its samples."""

    def __init__(self, device: Device, stream: Stream, execution: Execution) -> None:
        self._device, self._stream, self._execution = device, stream, execution
        self._names = in_one_run(execution, [tensor.name for tensor in execution.component.stepped])
        self._batch = execution.shape[self._names[0]][0]
        self._spans: dict[tuple[str, ...], Span] = {}
        self._samples: list[Sample] = []
        self._draws = False

    def enter(self, packing: Packing) -> None:
        """The samples are those of these jobs from now on. The others are idle."""
        types = self._execution.types
        self._samples = [Sample(job, packing.steps(i), types) for i, job in enumerate(packing.jobs)]
        self._draws = any(sample.draws for sample in self._samples)

    def leave(self) -> None:
        """Every sample is idle from now on."""
        self._samples = []

    def send(self, indices: Sequence[int]) -> None:
        """Starts the one copy of what the jobs take at these evaluations; idle samples get zeros. What no job takes
        keeps what it holds, or something else that is finite."""
        samples = self._samples
        drawn = [sample.drawn(index) for sample, index in zip(samples, indices)] if self._draws else []
        span = self._span(samples[0].names, drawn)
        slot = span.next()
        for position, index in enumerate(indices):
            for name, rows in samples[position].steps.items():
                slot.samples[name][position][:] = rows[index]
        for position, values in enumerate(drawn):
            for name, value in values.items():
                slot.arrays[name][position] = value
        if len(samples) < self._batch:
            for array in slot.arrays.values():
                array[len(samples) :] = 0
        self._stream.upload(span.target, slot.address, span.nbytes)

    def _span(self, names: tuple[str, ...], drawn: Sequence[Mapping[str, np.ndarray]]) -> Span:
        """The shortest run that holds these inputs and what was drawn."""
        for values in drawn:
            if values:
                names = tuple(dict.fromkeys((*names, *values)))
        span = self._spans.get(names)
        if span is None:
            span = self._spans[names] = self._find(names)
        return span

    def _find(self, needed: Iterable[str]) -> Span:
        places = sorted(self._names.index(name) for name in needed)
        names = self._names[places[0] : places[-1] + 1]
        for span in self._spans.values():
            if span.names == tuple(names):
                return span
        return Span(self._device, self._stream, self._execution, names)

    def close(self) -> None:
        for span in self._spans.values():
            span.close()


def in_one_run(execution: Execution, names: Iterable[str]) -> list[str]:
    """The tensors in the order of their addresses. TensorRtError where something lies between them."""
    ordered = sorted(names, key=lambda name: execution.address[name])
    for name, following in pairwise(ordered):
        if execution.address[following] != execution.address[name] + align(execution.nbytes[name]):
            raise TensorRtError(
                f"the {execution.component.name}'s inputs {name} and {following} change with every step, but do not "
                f"lie side by side: they are at {execution.address[name]:#x} and {execution.address[following]:#x}"
            )
    return ordered
