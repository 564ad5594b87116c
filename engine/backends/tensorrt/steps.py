"""A denoising step at one size, captured as a CUDA graph."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...contract import Shape
from ...errors import CudaError, DeviceLostError, TensorRtError
from ...job import Phase
from ..packing import Packing
from .cuda import Graph
from .engines import Execution
from .places import Place
from .rows import Rows

if TYPE_CHECKING:
    from .backend import TensorRtBackend


class Owner(Protocol):
    """Lanes whose jobs lie in the buffers."""

    def leave(self) -> None:
        """Takes the jobs out."""


def nobody() -> None:
    """The owner of buffers that are free."""


class Step:
    """The denoiser at one size, and the new state copied back into its input; captured when it can be."""

    def __init__(self, backend: TensorRtBackend, execution: Execution) -> None:
        self.execution, self._backend = execution, backend
        self._owner: Callable[[], Owner | None] = nobody
        self._graph: Graph | None = None
        self._plain = not backend.cuda_graphs
        self._rows = Rows(backend.device, backend.stream, execution)
        self._held: dict[tuple[str, int, int], Place | np.ndarray] = {}

    @property
    def path(self) -> str:
        """How the steps run; see `Lanes.path`."""
        return "plain" if self._graph is None else "cuda_graph"

    def enter(self, packing: Packing, owner: Owner) -> None:
        """Makes the buffers those of other jobs; their states are the owner's business. What changes once a loop is
        written, but for what the inputs hold already."""
        self.leave()
        for name, value in packing.inputs.items():
            self._write(name, (), value)
        for name, place, value in packing.values(self.execution.component):
            self._write(name, place, value)
        self._rows.enter(packing)
        self._owner = weakref.ref(owner)

    def change(self, packing: Packing, position: int, phase: Phase) -> None:
        """Writes the embeddings of the job at that position in another phase with the same rows."""
        for name, place, value in packing.row_values(self.execution.component, position, phase):
            self._write(name, place, value)

    def _write(self, name: str, place: tuple[Any, ...], value: Place | np.ndarray) -> None:
        """Writes an input, or one of its samples or rows, or some tokens of a row."""
        start, shape = self._part(name, place)
        address, kind = self.execution.address[name] + start, self.execution.types[name]
        end = start + math.prod(shape) * kind.itemsize
        if same(self._held.get((name, start, end)), value):
            return
        self._forget(name, start, end)
        if isinstance(value, Place):
            self._backend.stream.copy(address, value.address, end - start)
            self._held[name, start, end] = value
            return
        array = np.empty(shape, kind)
        array[...] = value
        self._backend.uploads.put(address, array)
        self._held[name, start, end] = array

    def _forget(self, name: str, start: int, end: int) -> None:
        """These bytes of an input are about to hold something else."""
        for key in [key for key in self._held if key[0] == name and key[1] < end and start < key[2]]:
            del self._held[key]

    def _part(self, name: str, place: tuple[Any, ...]) -> tuple[int, Shape]:
        """Where a part of an input starts, in bytes, and its shape."""
        shape, start = self.execution.shape[name], 0
        for axis, index in enumerate(place):
            stride = math.prod(shape[axis + 1 :]) * self.execution.types[name].itemsize
            first = index.start if isinstance(index, slice) else index
            start += first * stride
        last = place[-1] if place else None
        if isinstance(last, slice):
            return start, (last.stop - last.start, *shape[len(place) :])
        return start, shape[len(place) :]

    def run(self, indices: Sequence[int]) -> None:
        """Starts one step, in which each job is at its own evaluation. The first of a size runs plainly, as TensorRT
        wants before a capture."""
        self._rows.send(indices)
        if self._graph is not None:
            self._graph.launch(self._backend.stream)
            return
        self._enqueue()
        if not self._plain:
            self._capture()

    def _enqueue(self) -> None:
        execution, state = self.execution, self.execution.component.state
        execution.enqueue()
        source, target = execution.address[str(state.fed_by)], execution.address[state.name]
        self._backend.stream.copy(target, source, execution.nbytes[state.name])

    def _capture(self) -> None:
        stream = self._backend.stream
        try:
            with stream.capture() as made:
                self._enqueue()
            made[0].upload(stream)
            self._graph = made[0]
        except DeviceLostError:
            raise
        except (CudaError, TensorRtError) as error:
            self._plain = True
            warnings.warn(
                f"the denoising step could not be captured as a CUDA graph ({error}); its kernels are launched one by "
                "one",
                RuntimeWarning,
                stacklevel=2,
            )

    def leave(self) -> None:
        """Makes the owner take its jobs out, since the buffers are needed otherwise."""
        if (owner := self._owner()) is not None:
            owner.leave()
        self.free()

    def free(self) -> None:
        """The jobs are out, or gone."""
        self._owner = nobody
        self._rows.leave()

    def close(self) -> None:
        """Frees the graph and the pinned memory. The GPU may not be using them."""
        self._rows.close()
        if self._graph is not None:
            self._graph.close()


def same(held: Place | np.ndarray | None, value: Place | np.ndarray) -> bool:
    """Whether an input holds a value already, which may be one number for all elements."""
    if isinstance(held, np.ndarray) and isinstance(value, np.ndarray):
        return np.array_equal(held, np.broadcast_to(value, held.shape))
    return held is value
