"""Everything of the fake driver that is no driver function: what tests ask and arrange, what the fake TensorRT uses,
and the way of a call."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import cuda_types
from .cuda_device import (
    AddressSpace,
    Allocation,
    Capture,
    Context,
    Counts,
    CudaError,
    Device,
    DeviceFault,
    DeviceMemory,
    Event,
    Graph,
    Stream,
    caller,
)
from .cuda_types import STICKY, CUdevice, CUdeviceptr, CUresult, CUstream, CUstreamCaptureMode

LEGACY_HANDLES = (0, cuda_types.CU_STREAM_LEGACY)


class DynamicLibNotFoundError(RuntimeError):
    """What the real module raises from every function where libcuda is missing (there it is cuda.pathfinder's)."""


def api(values: int = 0, needs: str = "context") -> Callable[[Callable], Callable]:
    """A driver function that returns so many values; it needs "nothing", cuInit ("init"), or a usable current
    "context"."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(self: FakeMachine, *args: Any, **kwargs: Any) -> tuple:
            with self.lock:
                return self._call(function, values, needs, args, kwargs)

        call.value_count = values  # type: ignore[attr-defined]
        return call

    return decorate


class FakeMachine:
    """One machine: its devices, and everything that was created on them."""

    def __init__(self, devices: Sequence[Device] = (Device(),), driver: bool = True, eager: bool = False) -> None:
        """`driver=False` is a machine without libcuda; with `eager`, work runs when it is enqueued, not when somebody
        waits."""
        self.devices, self.driver = tuple(devices), driver
        self.counts = Counts()
        self.calls: list[str] = []
        """The name of every driver function that was called, in order, and "cudaMalloc" for TensorRT's own
        allocations."""
        self.log: list[str] = []
        """The reason of every error."""
        self.lock = threading.RLock()
        self.space = AddressSpace(len(self.devices))
        self._handles = itertools.count(0x5500_0000, 0x100)
        self._contexts = [
            Context(next(self._handles), ordinal, self.log, eager) for ordinal in range(len(self.devices))
        ]
        for context in self._contexts:
            context.streams.append(Stream(0, context, non_blocking=False, legacy=True))
        self._objects: dict[int, Stream | Event | Graph] = {}
        self._executables: dict[int, Graph] = {}
        self._captures: list[Capture] = []
        self._faults: dict[str, list[list]] = {}
        self._initialized = False
        self._thread = threading.local()

    # What tests ask and arrange

    def fail(self, name: str, result: CUresult, at: int = 1) -> None:
        """The `at`-th call of this function from now returns `result` and does nothing. "cudaMalloc" is TensorRT's own
        allocation."""
        self._faults.setdefault(name, []).append([at, result])

    def empty_graphs(self) -> None:
        """Graphs that exist already do nothing when they are launched, for tests of the host's part alone."""
        for graph in self._executables.values():
            graph.work.clear()

    def live(self) -> dict[str, list[str]]:
        """All that was created and not freed, by kind, with where it was created; {} when nothing is left."""
        blocks = [block for block in self.space.blocks.values() if not block.freed]
        objects = list(self._objects.values())
        found = {
            "device memory": [str(b) for b in blocks if b.ordinal is not None],
            "pinned memory": [str(b) for b in blocks if b.ordinal is None],
            "streams": [o.site for o in objects if isinstance(o, Stream)],
            "events": [o.site for o in objects if isinstance(o, Event)],
            "graphs": [o.site for o in objects if isinstance(o, Graph)],
            "executable graphs": [graph.site for graph in self._executables.values()],
            "contexts": [f"device {c.ordinal}, {c.retained} times" for c in self._contexts if c.retained],
        }
        return {kind: sites for kind, sites in found.items() if sites}

    # What the fake TensorRT uses, and tests that play a kernel

    def current_ordinal(self) -> int | None:
        """The GPU that is current in this thread."""
        return self._stack[-1].ordinal if self._stack else None

    def runtime_context(self) -> Context:
        """The current context, or device 0's as the CUDA runtime creates it for a thread that has none."""
        with self.lock:
            if not self._stack:
                if not self.driver or not self.devices:
                    raise CudaError(CUresult.CUDA_ERROR_NO_DEVICE, "no CUDA driver or no device")
                self._initialized = True
                self._contexts[0].implicit = True
                self._stack.append(self._contexts[0])
            self._stack[-1].check()
            return self._stack[-1]

    def allocate(self, size: int) -> Allocation:
        """Memory of the current device for a library (the runtime's cudaMalloc)."""
        with self.lock:
            self.calls.append("cudaMalloc")
            self._fault("cudaMalloc")
            return self._allocate(size, self.runtime_context())

    def release(self, block: Allocation) -> None:
        """Frees it, from any thread, whatever state the context is in."""
        with self.lock:
            if not block.freed:
                self.space.free(block)

    def stream(self, handle: int) -> Stream:
        """The stream of a handle, usable under the current context."""
        context = self.runtime_context()
        if handle in LEGACY_HANDLES:
            return context.streams[0]
        stream = self._get(handle, Stream)
        if stream.context is not context:
            raise CudaError(
                CUresult.CUDA_ERROR_INVALID_CONTEXT,
                f"a stream of device {stream.context.ordinal} while device {context.ordinal} is current",
            )
        return stream

    def launch(self, handle: int, name: str, kernel: Callable[[DeviceMemory], None]) -> None:
        """Enqueues a Python function on a stream as a kernel; on a capturing stream it is recorded. CudaError where
        that fails."""
        with self.lock:
            stream = self.stream(handle)
            memory = DeviceMemory(self.space, stream.context.ordinal)

            def run() -> None:
                self.counts.kernels[name] += 1
                kernel(memory)

            stream.push(run)

    # The machinery of a call

    def _call(self, function: Callable, values: int, needs: str, args: tuple, kwargs: dict) -> tuple:
        name = function.__name__
        self.calls.append(name)
        if not self.driver:
            raise DynamicLibNotFoundError('"cuda" is an NVIDIA driver library and can only be found via system search.')
        try:
            self._fault(name)
            if needs != "nothing" and not self._initialized:
                raise CudaError(CUresult.CUDA_ERROR_NOT_INITIALIZED, "cuInit was not called")
            if needs == "context":
                self._current.check()
            result = function(self, *args, **kwargs)
        except CudaError as error:
            if error.result != CUresult.CUDA_ERROR_NOT_READY:
                self.log.append(f"{name} at {caller()}: {error.result.name}: {error.reason}")
            return (error.result, *[None] * values)
        return (CUresult.CUDA_SUCCESS, *(result if isinstance(result, tuple) else () if values == 0 else (result,)))

    def _fault(self, name: str) -> None:
        for fault in self._faults.get(name, []):
            fault[0] -= 1
            if fault[0] == 0:
                if fault[1] in STICKY and self._stack:
                    self._stack[-1].error = fault[1]
                raise CudaError(fault[1], "the test wants it so")

    @property
    def _stack(self) -> list[Context]:
        if not hasattr(self._thread, "stack"):
            self._thread.stack = []
        return self._thread.stack

    @property
    def _current(self) -> Context:
        if not self._stack:
            raise CudaError(CUresult.CUDA_ERROR_INVALID_CONTEXT, "no context is current in this thread")
        context = self._stack[-1]
        if not context.retained and not context.implicit:
            raise CudaError(
                CUresult.CUDA_ERROR_CONTEXT_IS_DESTROYED, f"the context of device {context.ordinal} was released"
            )
        return context

    def _get(self, handle: Any, kind: type) -> Any:
        found = self._objects.get(int(handle))
        if not isinstance(found, kind):
            raise CudaError(CUresult.CUDA_ERROR_INVALID_HANDLE, f"{handle!r} is no living {kind.__name__.lower()}")
        return found

    def _stream(self, handle: Any) -> Stream:
        return self.stream(0 if handle is None else int(CUstream(handle)))

    def _device(self, dev: Any) -> int:
        ordinal = int(CUdevice(dev))
        if ordinal >= len(self.devices):
            raise CudaError(CUresult.CUDA_ERROR_INVALID_DEVICE, f"there is no device {ordinal}")
        return ordinal

    def _allocate(self, size: int, context: Context) -> Allocation:
        if size <= 0:
            raise CudaError(CUresult.CUDA_ERROR_INVALID_VALUE, "an allocation of 0 bytes")
        limit, used = self.devices[context.ordinal].memory, self.space.used(context.ordinal)
        if used + size > limit:
            raise CudaError(CUresult.CUDA_ERROR_OUT_OF_MEMORY, f"{size} bytes, {limit - used} of {limit} are free")
        return self.space.allocate(size, context.ordinal)

    def _refuse_in_capture(self) -> None:
        """For calls that the rules of stream capture call potentially unsafe (see
        cuThreadExchangeStreamCaptureMode)."""
        here, modes = threading.get_ident(), CUstreamCaptureMode
        for capture in self._captures:
            local = capture.thread == here and capture.mode != modes.CU_STREAM_CAPTURE_MODE_RELAXED
            if local or (capture.thread != here and capture.mode == modes.CU_STREAM_CAPTURE_MODE_GLOBAL):
                capture.refuse("a call that may wait, during a capture")

    def _block(self, pointer: Any, size: int, ordinal: int | None) -> int:
        """A pointer as the driver checks it when it is called."""
        address = int(CUdeviceptr(pointer)) if ordinal is not None else pointer
        try:
            self.space.check(address, size, ordinal)
        except ValueError as error:
            raise CudaError(CUresult.CUDA_ERROR_INVALID_VALUE, str(error)) from None
        return address

    def _view(self, address: int, size: int, ordinal: int | None) -> np.ndarray:
        """Memory as work finds it when it runs."""
        try:
            return self.space.view(address, size, ordinal)
        except ValueError as error:
            raise DeviceFault(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, str(error)) from None

    def _pinned(self, address: int, size: int) -> bool:
        """Whether host memory is pinned, freed or not; CudaError for what is no host memory or leaves its block."""
        if address == 0:
            raise CudaError(CUresult.CUDA_ERROR_INVALID_VALUE, "the host pointer is NULL")
        if self.space.is_device_address(address):
            raise CudaError(
                CUresult.CUDA_ERROR_INVALID_VALUE, f"{address:#x} is a device pointer, given as host memory"
            )
        if self.space.find(address) is None:
            return False
        self._block(address, size, None)
        return True
