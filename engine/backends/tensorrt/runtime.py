"""TensorRT on one GPU: a stream, the ways to and from it, and engines. Builder and runtime both use it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ...contract import Family
from ...errors import TensorRtError
from ...family import STABLE_DIFFUSION
from ...plans import Machine
from . import versions as versions
from .cuda import Device, Event, Stream, align
from .engines import Engine, Execution
from .pinned import Results, Uploads

LOG_LINES = 12


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

    build_command = "python build_engines.py --backend tensorrt"

    def __init__(self, gpu: int = 0, family: Family = STABLE_DIFFUSION) -> None:
        """Raises BackendError where TensorRT or a driver is missing, and DeviceError where there is no such GPU."""
        self.trt, self.family = versions.load_tensorrt(), family
        self.device = Device(gpu)
        self.machine = Machine(self.device.name, self.device.compute_capability, self.trt.__version__)
        self.description = f"TensorRT {self.machine.tensorrt} on GPU {gpu}, {self.machine.gpu}"
        self.log = open_log(self.trt)
        self.engines: dict[str, Engine] = {}
        self._events: list[Event] = []
        self._retired: deque[tuple[Event, Callable[[], None]]] = deque()
        try:
            versions.require_driver(self.trt, self.device.driver_version)
            with self.device:
                self.stream = Stream(self.device)
                self.uploads = Uploads(self.device, self.stream)
                self.results = Results(self.device, self.stream, self.retire)
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
            for name, content in plans:
                plan = self._runtime.deserialize_cuda_engine(content)
                self.engines[name] = Engine(self, self.family[name], plan, contract)
                del plan, content
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
            return self._downloaded(execution, engine.outputs)

    def _downloaded(self, execution: Execution, names: Sequence[str]) -> list[np.ndarray]:
        """Copies of an execution's tensors, after a wait."""
        starts, end = {}, 0
        for name in names:
            starts[name], end = end, end + align(execution.nbytes[name])
        result = self.results.take(end)
        for name, start in starts.items():
            self.stream.download(result.address + start, execution.address[name], execution.nbytes[name])
        self.synchronize(f"running the {execution.component.name}")
        copies = []
        for name, start in starts.items():
            content = result.bytes[start : start + execution.nbytes[name]].copy()
            copies.append(content.view(execution.types[name]).reshape(execution.shape[name]))
        return copies

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
        self.sweep()

    def retire(self, close: Callable[[], None]) -> None:
        """Closes something as soon as it is known that the GPU has done all that was started so far."""
        event = Event(self.device)
        self.stream.record(event)
        self._retired.append((event, close))
        self.sweep()

    def sweep(self) -> None:
        """Closes what was retired and is not in use any more."""
        while self._retired and self._retired[0][0].passed():
            event, close = self._retired.popleft()
            event.close()
            close()

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


class Stopwatch:
    """CUDA events between the work of a picture."""

    def __init__(self, device: Device, stream: Stream, events: list[Event]) -> None:
        self._device, self._stream, self._events, self._count = device, stream, events, 0

    def mark(self) -> None:
        """Records an event behind all that was started so far."""
        with self._device:
            if self._count == len(self._events):
                self._events.append(Event(self._device, timing=True))
            self._stream.record(self._events[self._count])
            self._count += 1

    def seconds(self) -> list[float]:
        """GPU time between the marks. Waits for the last one where the GPU has not come to it yet."""
        with self._device:
            if self._count and not self._events[self._count - 1].passed():
                self._events[self._count - 1].wait("reading times")
            return [b.seconds_since(a) for a, b in zip(self._events, self._events[1 : self._count])]
