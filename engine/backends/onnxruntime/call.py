"""The denoiser's buffers on ONNX Runtime."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...contract import Sizes
from ...errors import BackendError
from ...tiling import Tiles
from ..host import HostLanes, nobody
from ..interface import Decoded
from .device import DeviceArray, DeviceInput

if TYPE_CHECKING:
    from .backend import OnnxRuntimeBackend


class Call:
    """The denoiser's buffers at one size, bound once: the state goes back and forth between two of them without being
    copied, so there are two bindings, and with CUDA graphs two graphs. The backend keeps it, so it does not keep the
    backend alive. On the CPU ONNX Runtime works on the arrays themselves."""

    def __init__(self, backend: OnnxRuntimeBackend, sizes: Sizes) -> None:
        denoiser = backend.family["denoiser"]
        self._state, self._stepped = denoiser.state, denoiser.stepped
        shapes = denoiser.shapes({**sizes, **denoiser.model_sizes(backend.input_shapes("denoiser"))})
        self.states = (np.zeros(shapes[self._state.name], np.float32), np.zeros(shapes[self._state.name], np.float32))
        arrays = {
            tensor.name: np.zeros(shapes[tensor.name], tensor.dtype)
            for tensor in denoiser.inputs
            if tensor is not self._state
        }
        self._values = {name: backend.on_device(array) for name, array in arrays.items()}
        self._state_values = [backend.on_device(array) for array in self.states]
        self.inputs: dict[str, Any] = self._assignable(arrays, backend)
        self.owner: Callable[[], HostLanes | None] = nobody
        self._bind(backend)

    def _assignable(self, arrays: dict[str, np.ndarray], backend: OnnxRuntimeBackend) -> dict[str, Any]:
        return dict(arrays)

    def _bind(self, backend: OnnxRuntimeBackend) -> None:
        """Binds the buffers to the denoiser's session."""
        self._backend: Callable[[], OnnxRuntimeBackend | None] = weakref.ref(backend)
        self._session, self._bindings = backend.load("denoiser"), []
        for state, next_state in (self._state_values, self._state_values[::-1]):
            binding = self._session.io_binding()
            for name, value in self._values.items():
                binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_input(self._state.name, state)
            binding.bind_ortvalue_output(str(self._state.fed_by), next_state)
            self._bindings.append((binding, backend.run_options()))

    @property
    def path(self) -> str:
        return "plain" if self._bindings[0][1] is None else "cuda_graph"

    def leave(self) -> None:
        """Takes jobs that lie in the buffers out of them."""
        if (lanes := self.owner()) is not None:
            lanes.leave()

    def enter(self) -> None:
        """The arrays are the buffers."""

    def read(self, current: int) -> np.ndarray:
        return self.states[current]

    def write(self, current: int) -> None:
        """The arrays are the buffers."""

    def run(self, current: int) -> None:
        """One step. The first two of a size may show that ONNX Runtime cannot capture them."""
        try:
            self._session.run_with_iobinding(*self._bindings[current])
        except Exception as error:
            backend = self._backend()
            if self.path == "plain" or backend is None:
                size = self.states[0].shape
                raise BackendError(f"ONNX Runtime failed in the denoiser with a state of {size}: {error}") from error
            backend.without_cuda_graph(error)
            self._bind(backend)
            self.run(current)


class DeviceCall(Call):
    """The same on a GPU, where the arrays are what is uploaded and downloaded."""

    inputs: dict[str, DeviceInput]

    def _assignable(self, arrays: dict[str, np.ndarray], backend: OnnxRuntimeBackend) -> dict[str, Any]:
        return {name: DeviceInput(array, self._values[name], backend.copier) for name, array in arrays.items()}

    def enter(self) -> None:
        for one in self.inputs.values():
            one.flush()

    def read(self, current: int) -> np.ndarray:
        self.states[current][...] = self._state_values[current].numpy()
        return self.states[current]

    def write(self, current: int) -> None:
        self._state_values[current].update_inplace(self.states[current])

    def run(self, current: int) -> None:
        for tensor in self._stepped:
            self.inputs[tensor.name].flush()
        super().run(current)

    def latents(self, current: int, position: int) -> DeviceArray:
        """A sample's latents, which are the first slot of its state."""
        _, slots, *plane = self.states[0].shape
        return DeviceArray(self._state_values[current], tuple(plane), position * slots)


class OnnxRuntimeLanes(HostLanes):
    """Lanes whose latents go from the denoiser to the decoder without leaving the device."""

    def decode(self, lanes: Sequence[int], tiles: Tiles | None = None) -> Callable[[], Decoded]:
        call, backend = self._call, self._backend
        jobs = [self._job(lane) for lane in lanes]
        if tiles is not None or not isinstance(call, DeviceCall) or not set(jobs) <= set(self.entered):
            return super().decode(lanes, tiles)
        sources = [call.latents(self._current, self.entered.index(job)) for job in jobs]
        decoded = backend.decode_on_device(sources)  # type: ignore[attr-defined]
        return lambda: decoded
