"""TensorRT engines: deserialized plans, ready for the sizes that they are used at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ...contract import Component, Shape
from ...errors import TensorRtError
from ..recent import Recent
from . import versions as versions
from .cuda import DeviceMemory, align

if TYPE_CHECKING:
    from .runtime import TensorRtRuntime

SHAPES_KEPT = 8
"""The eight most recently used sizes of a component stay ready, with their buffers and graphs: the five that a number
of pictures has with and without guidance (packing.PARTS), and others. They share their scratch memory."""


class Attached(Protocol):
    """What else belongs to an engine at one size."""

    def leave(self) -> None:
        """Saves what is needed of the buffers, which are about to go."""

    def close(self) -> None:
        """Frees everything. The GPU may not be using it."""


class Engine:
    """A deserialized plan, and the sizes that it is ready for."""

    def __init__(self, backend: TensorRtRuntime, component: Component, engine: Any, contract: bool) -> None:
        if engine is None:
            raise TensorRtError(
                f"the plan of the {component.name} could not be deserialized; {backend.log.tail()}. Build it again: "
                f"{backend.build_command}"
            )
        self.component, self._backend, self._engine = component, backend, engine
        self._ready: Recent[tuple[tuple[str, Shape], ...], Execution] = Recent(SHAPES_KEPT, self._drop)
        self.scratch_bytes = versions.scratch_bytes(backend.trt, engine)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        kinds = backend.trt.DataType
        known = {kinds.FLOAT: np.float32, kinds.HALF: np.float16, kinds.INT32: np.int32, kinds.UINT8: np.uint8}
        self.types: dict[str, Any] = {
            name: np.dtype(known.get(engine.get_tensor_dtype(name), np.void)) for name in names
        }
        self.outputs = tuple(name for name in names if name not in component.input_names)
        if contract:
            self._check_contract()
        self._profiles = [
            {
                name: [tuple(shape) for shape in engine.get_tensor_profile_shape(name, i)]
                for name in component.input_names
            }
            for i in range(engine.num_optimization_profiles)
        ]

    def _check_contract(self) -> None:
        """The plan's inputs and outputs are those of the contract; the outputs are put into its order."""
        component = self.component
        expected = {tensor.name: np.dtype(tensor.dtype) for tensor in (*component.inputs, *component.outputs)}
        if self.types != expected:
            raise TensorRtError(
                f"the plan of the {component.name} has the tensors {self.types} instead of {expected}. "
                f"Build it again: {self._backend.build_command}"
            )
        self.outputs = component.output_names

    @property
    def model_sizes(self) -> dict[str, int]:
        """The sizes of the dimensions that are the model's."""
        return self.component.model_sizes({name: limits[2] for name, limits in self._profiles[0].items()})

    def allowed(self, tensor: str, axis: int, shape: Shape | None = None) -> tuple[int, int]:
        """Smallest and largest size of an input's dimension over all profiles; with `shape`, over those that serve its
        other dimensions. TensorRtError where none does."""
        limits = [profile[tensor] for profile in self._profiles]
        if shape is not None:
            limits = [each for each in limits if _serves(each, shape, axis)]
        if not limits:
            raise TensorRtError(
                f"no profile of the {self.component.name} serves {tensor} of {shape}; built were {self._built()}. "
                f"Build for these sizes: {self._backend.build_command}"
            )
        return min(low[axis] for low, _, _ in limits), max(high[axis] for _, _, high in limits)

    def at(self, shapes: Mapping[str, Shape]) -> Execution:
        """The engine ready for inputs of these shapes."""
        return self._ready.get(tuple(shapes.items()), lambda: Execution(self._backend, self, shapes))

    def _drop(self, execution: Execution) -> None:
        """Another size needs the room."""
        try:
            execution.leave()
        finally:
            self._backend.retire(execution.close)

    def open_context(self, shapes: Mapping[str, Shape]) -> Any:
        """An execution context for inputs of these shapes, on the shared scratch memory."""
        backend, log = self._backend, self._backend.log
        context = versions.create_context(backend.trt, self._engine)
        if context is None:
            raise TensorRtError(f"TensorRT made no execution context for the {self.component.name}; {log.tail()}")
        versions.set_scratch(backend.trt, context, backend.scratch.address, backend.scratch.nbytes)
        if problem := self._refusal(context, shapes):
            del context  # a traceback would keep it, and with it the engine's memory
            raise TensorRtError(f"TensorRT refused {problem}; {log.tail()}")
        return context

    def _refusal(self, context: Any, shapes: Mapping[str, Shape]) -> str | None:
        """Gives a context its profile and shapes: what it does not take, in words."""
        profile = self._profile(shapes)
        if not versions.accepted(context.set_optimization_profile_async, profile, self._backend.stream.number):
            return f"profile {profile} of the {self.component.name}"
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                return f"shape {shape} for the {self.component.name}'s input {name}"
        return None

    def _profile(self, shapes: Mapping[str, Shape]) -> int:
        """The number of the first profile that serves these shapes."""
        for i, profile in enumerate(self._profiles):
            if all(_serves(profile[name], shape) for name, shape in shapes.items()):
                return i
        raise TensorRtError(
            f"no profile of the {self.component.name} serves {dict(shapes)}; built were {self._built()}. "
            f"Build for these sizes: {self._backend.build_command}"
        )

    def _built(self) -> str:
        """The sizes of all profiles, in words."""
        return "; ".join(str({name: limits[::2] for name, limits in profile.items()}) for profile in self._profiles)

    def inspect(self) -> str:
        """What the engine inspector tells of the layers, as JSON."""
        return str(
            self._engine.create_engine_inspector().get_engine_information(self._backend.trt.LayerInformationFormat.JSON)
        )

    def close(self) -> None:
        """Drops the engine and all that is ready. The GPU may not be using it."""
        for execution in self._ready:
            execution.close()
        self._engine = None


def _serves(limits: Sequence[Shape], shape: Shape, but: int | None = None) -> bool:
    """Whether a profile's smallest, best and largest shape of an input allow this one, apart from one dimension."""
    low, _, high = limits
    return all(low[axis] <= size <= high[axis] for axis, size in enumerate(shape) if axis != but)


class Execution:
    """An engine at one set of shapes: a context, and inputs and outputs on the GPU, bound once.

    `address`, `shape` and `nbytes` are by tensor. Inputs and outputs lie in one block, and those inputs side by side
    that change with every step. They hold zeros at first."""

    def __init__(self, backend: TensorRtRuntime, engine: Engine, shapes: Mapping[str, Shape]) -> None:
        self._backend, self._engine, self.component = backend, engine, engine.component
        self._memory: DeviceMemory | None = None
        self.attached: Attached | None = None
        self._context = engine.open_context(shapes)
        try:
            self._measure(shapes)
            self._bind()
        except BaseException:
            self.close()
            raise

    def _measure(self, shapes: Mapping[str, Shape]) -> None:
        """The shapes of all tensors, in the order in which they lie in memory."""
        stepped = {tensor.name: shapes[tensor.name] for tensor in self.component.stepped if tensor.name in shapes}
        others = {name: shape for name, shape in shapes.items() if name not in stepped}
        outputs = {name: tuple(self._context.get_tensor_shape(name)) for name in self._engine.outputs}
        self.shape: dict[str, Shape] = {**others, **stepped, **outputs}
        if any(size < 1 for shape in self.shape.values() for size in shape):
            raise TensorRtError(
                f"TensorRT computed the shapes {self.shape} for the {self.component.name}; {self._backend.log.tail()}"
            )
        self.types = self._engine.types
        self.nbytes = {name: math.prod(shape) * self.types[name].itemsize for name, shape in self.shape.items()}

    def _bind(self) -> None:
        backend, name = self._backend, self.component.name
        memory = sum(map(align, self.nbytes.values()))
        self._memory = backend.device.allocate(memory, f"the {name}'s inputs and outputs")
        self.address: dict[str, int] = {}
        position = self._memory.address
        for tensor, nbytes in self.nbytes.items():
            self.address[tensor] = position
            position += align(nbytes)
            if not self._context.set_tensor_address(tensor, self.address[tensor]):
                raise TensorRtError(f"TensorRT refused an address for the {name}'s {tensor}; {backend.log.tail()}")
        backend.stream.clear(self._memory.address, self._memory.nbytes)

    def part(self, tensor: str, index: int) -> tuple[int, int]:
        """Address and bytes of one sample, or one row, of a tensor."""
        nbytes = self.nbytes[tensor] // self.shape[tensor][0]
        return self.address[tensor] + index * nbytes, nbytes

    def enqueue(self) -> None:
        """Starts the engine on what its inputs hold then."""
        if not self._context.execute_async_v3(self._backend.stream.number):
            raise TensorRtError(
                f"TensorRT did not start the {self.component.name} with inputs {self.shape}; {self._backend.log.tail()}"
            )

    def leave(self) -> None:
        """Lets what is attached save its part of the buffers."""
        if self.attached is not None:
            self.attached.leave()

    def close(self) -> None:
        """Frees the buffers, and what is attached. The GPU may not be using them."""
        if self.attached is not None:
            self.attached.close()
        self._context = None
        if self._memory is not None:
            self._memory.close()
