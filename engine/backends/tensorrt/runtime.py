"""TensorRT engines on one GPU: deserialized plans, ready for the sizes that they are used at. Builder and runtime both
use it."""

from __future__ import annotations

import math
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from ...contract import INPUTS, OUTPUTS, dtype
from ...errors import TensorRtError
from ...plans import Machine
from . import versions as versions
from .cuda import Device, DeviceMemory, Event, PinnedMemory, Stream, align

SHAPES_KEPT = 4
"""Sizes of a component that stay ready, with their buffers and graphs; the one that was not used for longest makes
way."""

LOG_LINES = 12

Shape = tuple[int, ...]


def open_log(trt: Any) -> Any:
    """A logger that keeps TensorRT's last warnings and errors for our own messages, in `lines`."""
    severities = trt.ILogger.Severity
    kept = {severities.INTERNAL_ERROR, severities.ERROR, severities.WARNING}

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: deque[str] = deque(maxlen=LOG_LINES)

        def log(self, severity: Any, msg: str) -> None:
            if severity in kept:
                self.lines.append(msg)

        def tail(self) -> str:
            """The lines, for the end of a message."""
            return "TensorRT's log ends with: " + " | ".join(self.lines) if self.lines else "TensorRT logged nothing"

    return Log()


class TensorRtRuntime:
    """Plans on one GPU: its stream, the ways to and from it, and the engines with the scratch memory that they
    share."""

    rebuild = "python build_engines.py --backend tensorrt"

    def __init__(self, gpu: int = 0) -> None:
        """Raises BackendError where TensorRT or a driver is missing, and DeviceError where there is no such GPU."""
        self.trt = versions.load_tensorrt()
        self.device = Device(gpu)
        self.machine = Machine(self.device.name, self.device.compute_capability, self.trt.__version__)
        self.description = f"TensorRT {self.machine.tensorrt} on GPU {gpu}, {self.machine.gpu}"
        self.log = open_log(self.trt)
        self.engines: dict[str, Engine] = {}
        self._result: PinnedMemory | None = None
        self._events: list[Event] = []
        self._retired: list[Callable[[], None]] = []
        try:
            versions.require_driver(self.trt, self.device.driver_version)
            with self.device:
                self.stream = Stream(self.device)
                self.uploads = Uploads(self.device, self.stream)
                versions.register_plugins(self.trt)
                self._runtime = versions.none_for_null(self.trt.Runtime, self.log)
            if self._runtime is None:
                raise TensorRtError(f"TensorRT {self.trt.__version__} does not start on GPU {gpu}; {self.log.tail()}")
        except BaseException:
            self.close()
            raise

    def load(self, plans: Iterable[tuple[str, bytes]], contract: bool = True) -> None:
        """Deserializes plans, by component; each is dropped from the host's memory before the next is asked for.
        `contract` wants exactly the contract's inputs and outputs of them."""
        with self.device:
            for component, content in plans:
                self.engines[component] = Engine(
                    self, component, self._runtime.deserialize_cuda_engine(content), contract
                )
            needed = max(engine.scratch_bytes for engine in self.engines.values())
            self.scratch = self.device.allocate(align(needed), "the engines' scratch memory")

    def run(self, component: str, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """One run of a component: its outputs in the order of `Engine.outputs`, after a wait."""
        with self.device:
            engine = self.engines[component]
            execution = engine.at({name: value.shape for name, value in inputs.items()})
            for name, value in inputs.items():
                self.uploads.put(execution.address[name], value)
            execution.enqueue()
            starts, end = {}, 0
            for name in engine.outputs:
                starts[name], end = end, end + align(execution.nbytes[name])
            result = self.result(end)
            for name, start in starts.items():
                self.stream.download(result.address + start, execution.address[name], execution.nbytes[name])
            self.synchronize(f"running the {component}")
            return [
                result.bytes[start : start + execution.nbytes[name]]
                .view(engine.types[name])
                .reshape(execution.shape[name])
                .copy()
                for name, start in starts.items()
            ]

    def seconds(self, component: str, inputs: Mapping[str, np.ndarray], repeats: int) -> list[float]:
        """GPU time of each of `repeats` runs on inputs of these shapes, one behind the other, with whatever content
        they have."""
        with self.device:
            execution = self.engines[component].at({name: value.shape for name, value in inputs.items()})
            watch = self.stopwatch()
            for _ in range(repeats):
                watch.mark()
                execution.enqueue()
            watch.mark()
            self.synchronize(f"timing the {component}")
            return watch.seconds()

    def synchronize(self, doing: str) -> None:
        """Waits for the GPU. An error of anything that was started before appears here."""
        self.stream.synchronize(doing)
        self.uploads.reset()
        while self._retired:
            self._retired.pop()()

    def retire(self, close: Callable[[], None]) -> None:
        """Closes something after the next wait, since the GPU may still be using it."""
        self._retired.append(close)

    def result(self, nbytes: int) -> PinnedMemory:
        """Pinned memory for what comes back."""
        if self._result is None or self._result.nbytes < nbytes:
            if self._result is not None:
                self.retire(self._result.close)
            self._result = PinnedMemory(self.device, nbytes, "results")
        return self._result

    def stopwatch(self) -> Stopwatch:
        return Stopwatch(self.device, self.stream, self._events)

    def close(self) -> None:
        """Frees everything on the GPU. A second call does nothing."""
        with self.device.closing():
            self._retired.clear()
            for engine in self.engines.values():
                engine.close()
            self.engines.clear()
            self._runtime = None

    def __del__(self) -> None:
        if hasattr(self, "_retired") and not sys.is_finalizing():
            with suppress(Exception):  # nobody could catch it here
                self.close()


class Engine:
    """A deserialized plan, and the sizes that it is ready for."""

    def __init__(self, backend: TensorRtRuntime, component: str, engine: Any, contract: bool) -> None:
        if engine is None:
            raise TensorRtError(
                f"the plan of the {component} could not be deserialized; {backend.log.tail()}. Build it again: "
                f"{backend.rebuild}"
            )
        self.component, self._backend, self._engine = component, backend, engine
        self._ready: OrderedDict[tuple[tuple[str, Shape], ...], Execution] = OrderedDict()
        self.scratch_bytes = versions.scratch_bytes(backend.trt, engine)
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        kinds = backend.trt.DataType
        known = {kinds.FLOAT: np.float32, kinds.HALF: np.float16, kinds.INT32: np.int32, kinds.UINT8: np.uint8}
        self.types: dict[str, Any] = {
            name: np.dtype(known.get(engine.get_tensor_dtype(name), np.void)) for name in names
        }
        self.outputs = tuple(name for name in names if name not in INPUTS[component])
        if contract:
            self._check_contract()
        self._profiles = [
            {name: [tuple(shape) for shape in engine.get_tensor_profile_shape(name, i)] for name in INPUTS[component]}
            for i in range(engine.num_optimization_profiles)
        ]

    def _check_contract(self) -> None:
        """The plan's inputs and outputs are those of the contract; the outputs are put into its order."""
        expected = {name: np.dtype(dtype(name)) for name in (*INPUTS[self.component], *OUTPUTS[self.component])}
        if self.types != expected:
            raise TensorRtError(
                f"the plan of the {self.component} has the tensors {self.types} instead of {expected}. "
                f"Build it again: {self._backend.rebuild}"
            )
        self.outputs = OUTPUTS[self.component]

    def allowed(self, tensor: str, axis: int) -> tuple[int, int]:
        """Smallest and largest size of an input's dimension over all profiles."""
        shapes = [profile[tensor] for profile in self._profiles]
        return min(low[axis] for low, _, _ in shapes), max(high[axis] for _, _, high in shapes)

    def output_row(self, tensor: str) -> Shape:
        """An output's shape without its first dimension."""
        return tuple(self._engine.get_tensor_shape(tensor))[1:]

    def at(self, shapes: Mapping[str, Shape]) -> Execution:
        """The engine ready for inputs of these shapes."""
        key = tuple(shapes.items())
        if key not in self._ready:
            while len(self._ready) >= SHAPES_KEPT:
                self._backend.retire(self._ready.popitem(last=False)[1].close)
            self._ready[key] = Execution(self._backend, self, shapes)
        self._ready.move_to_end(key)
        return self._ready[key]

    def open_context(self, shapes: Mapping[str, Shape]) -> Any:
        """An execution context for inputs of these shapes, on the shared scratch memory."""
        backend, log = self._backend, self._backend.log
        context = versions.create_context(backend.trt, self._engine)
        if context is None:
            raise TensorRtError(f"TensorRT made no execution context for the {self.component}; {log.tail()}")
        versions.set_scratch(backend.trt, context, backend.scratch.address, backend.scratch.nbytes)
        if problem := self._refusal(context, shapes):
            del context  # a traceback would keep it, and with it the engine's memory
            raise TensorRtError(f"TensorRT refused {problem}; {log.tail()}")
        return context

    def _refusal(self, context: Any, shapes: Mapping[str, Shape]) -> str | None:
        """Gives a context its profile and shapes: what it does not take, in words."""
        profile = self._profile(shapes)
        if not versions.accepted(context.set_optimization_profile_async, profile, self._backend.stream.number):
            return f"profile {profile} of the {self.component}"
        for name, shape in shapes.items():
            if not context.set_input_shape(name, shape):
                return f"shape {shape} for the {self.component}'s input {name}"
        return None

    def _profile(self, shapes: Mapping[str, Shape]) -> int:
        """The number of the first profile that serves these shapes."""
        for i, profile in enumerate(self._profiles):
            if all(
                low <= size <= high
                for name, shape in shapes.items()
                for low, size, high in zip(profile[name][0], shape, profile[name][2])
            ):
                return i
        built = "; ".join(str({name: limits[::2] for name, limits in profile.items()}) for profile in self._profiles)
        raise TensorRtError(
            f"no profile of the {self.component} serves {dict(shapes)}; built were {built}. "
            f"Build for these sizes: {self._backend.rebuild}"
        )

    def inspect(self) -> str:
        """What the engine inspector tells of the layers, as JSON."""
        return str(
            self._engine.create_engine_inspector().get_engine_information(self._backend.trt.LayerInformationFormat.JSON)
        )

    def close(self) -> None:
        """Drops the engine and all that is ready."""
        for execution in self._ready.values():
            execution.close()
        self._ready.clear()
        self._engine = None


class Execution:
    """An engine at one set of shapes: a context, and inputs and outputs on the GPU, bound once.

    `address` and `shape` are by tensor. All inputs and outputs lie in one block, in the order of the contract."""

    def __init__(self, backend: TensorRtRuntime, engine: Engine, shapes: Mapping[str, Shape]) -> None:
        self._backend, self._engine, self.component = backend, engine, engine.component
        self._memory: DeviceMemory | None = None
        self.attached: Any = None  # what else belongs to this size, and is closed with it
        self._context = engine.open_context(shapes)
        try:
            self._bind(shapes)
        except BaseException:
            self.close()
            raise

    def _bind(self, shapes: Mapping[str, Shape]) -> None:
        backend = self._backend
        self.shape: dict[str, Shape] = {
            **shapes,
            **{name: tuple(self._context.get_tensor_shape(name)) for name in self._engine.outputs},
        }
        if any(size < 1 for shape in self.shape.values() for size in shape):
            raise TensorRtError(
                f"TensorRT computed the shapes {self.shape} for the {self.component}; {backend.log.tail()}"
            )
        self.nbytes = {name: math.prod(shape) * self._engine.types[name].itemsize for name, shape in self.shape.items()}
        self._memory = backend.device.allocate(
            sum(map(align, self.nbytes.values())), f"the {self.component}'s inputs and outputs"
        )
        self.address: dict[str, int] = {}
        position = self._memory.address
        for name, nbytes in self.nbytes.items():
            self.address[name] = position
            position += align(nbytes)
            if not self._context.set_tensor_address(name, self.address[name]):
                raise TensorRtError(
                    f"TensorRT refused an address for the {self.component}'s {name}; {backend.log.tail()}"
                )
        backend.stream.clear(self._memory.address, self._memory.nbytes)

    def enqueue(self) -> None:
        """Starts the engine on what its inputs hold then."""
        if not self._context.execute_async_v3(self._backend.stream.number):
            raise TensorRtError(
                f"TensorRT did not start the {self.component} with inputs {self.shape}; {self._backend.log.tail()}"
            )

    def close(self) -> None:
        """Frees the buffers and the graph. The GPU may not be using them."""
        if self.attached is not None:
            self.attached.close()
        self._context = None
        if self._memory is not None:
            self._memory.close()


class Uploads:
    """The way to the GPU: each array is copied into pinned memory that nothing else uses until the GPU has read it."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device, self._stream = device, stream
        self._blocks: list[PinnedMemory] = []
        self._used = 0

    def put(self, target: int, array: np.ndarray) -> None:
        """Starts copying the array's bytes to `target`."""
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if not self._blocks or self._used + content.nbytes > self._blocks[-1].nbytes:
            last = self._blocks[-1].nbytes if self._blocks else 1 << 16
            self._blocks.append(PinnedMemory(self._device, max(2 * last, align(content.nbytes)), "uploads"))
            self._used = 0
        block = self._blocks[-1]
        block.bytes[self._used : self._used + content.nbytes] = content
        self._stream.upload(target, block.address + self._used, content.nbytes)
        self._used = min(block.nbytes, self._used + align(content.nbytes))

    def reset(self) -> None:
        """The GPU has read everything. The largest block is kept."""
        while len(self._blocks) > 1:
            self._blocks.pop(0).close()
        self._used = 0


class Stopwatch:
    """CUDA events between the work of a picture."""

    def __init__(self, device: Device, stream: Stream, events: list[Event]) -> None:
        self._device, self._stream, self._events, self._count = device, stream, events, 0

    def mark(self) -> None:
        """Records an event behind all that was started so far."""
        with self._device:
            if self._count == len(self._events):
                self._events.append(Event(self._device))
            self._stream.record(self._events[self._count])
            self._count += 1

    def seconds(self) -> list[float]:
        """GPU time between the marks; to be asked after the GPU has finished."""
        with self._device:
            return [b.seconds_since(a) for a, b in zip(self._events, self._events[1 : self._count])]
