"""`cuda.bindings.driver` in host memory: the real calling convention, and semantics that make mistakes visible.

    cuda = FakeCuda()
    driver = cuda.module()                                                 # stands in for cuda.bindings.driver
    cuda.fail("cuMemAlloc", driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY, at=3)  # the third call from now
    cuda.counts, cuda.calls, cuda.log, cuda.live()                         # what happened, why it failed, what leaked

cuda_device.py says when work runs. Stricter than the real driver: work that uses freed memory breaks the context (the
real cuMemFree waits), a stream is good for calls under its own context only, and a destroyed object is an error, never
undefined. Errors that only the device can find surface when the host waits, and from every later call.
"""

from __future__ import annotations

import ctypes
import functools
import operator
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np

from . import cuda_types
from .cuda_device import Capture, CudaError, Event, Graph, Record, Stream, Wait, Work, caller
from .cuda_machine import FakeMachine, api
from .cuda_types import (
    CUcontext,
    CUdevice,
    CUdevice_attribute,
    CUdeviceptr,
    CUevent,
    CUevent_flags,
    CUgraph,
    CUgraphExec,
    CUresult,
    CUstream,
    CUstream_flags,
    CUstreamCaptureMode,
    CUstreamCaptureStatus,
)

DRIVER_VERSION = 13000


def unsigned(value: Any) -> int:
    number = operator.index(value)
    if number < 0:
        raise OverflowError("can't convert negative value to size_t")
    return number


def host_pointer(value: Any) -> int:
    """The address that the real module takes from an int, None, a device pointer or an object with a buffer."""
    if value is None:
        return 0
    if isinstance(value, (int, np.integer, CUdeviceptr)):
        return int(value)
    try:
        view = memoryview(value)
    except TypeError:
        raise TypeError(
            f"Provided argument is of type {type(value)} but expected Type None, int or object with Buffer Protocol"
        ) from None
    if not view.contiguous:
        raise ValueError("ndarray is not contiguous")
    return np.frombuffer(view, np.uint8).ctypes.data if view.nbytes else 0


class FakeCuda(FakeMachine):
    """The driver functions, by their real names and parameters."""

    def module(self) -> ModuleType:
        """A stand-in for the module `cuda.bindings.driver`."""
        module = ModuleType("cuda.bindings.driver", __doc__)
        for name, value in vars(cuda_types).items():
            if name.startswith("CU"):
                setattr(module, name, value)
        for name in dir(type(self)):
            if hasattr(getattr(type(self), name), "value_count"):
                setattr(module, name, getattr(self, name))
        return module

    # Devices and contexts

    @api(needs="nothing")
    def cuInit(self, Flags: int) -> None:
        if unsigned(Flags):
            raise CudaError(CUresult.CUDA_ERROR_INVALID_VALUE, "flags must be 0")
        if not self.devices:
            raise CudaError(CUresult.CUDA_ERROR_NO_DEVICE, "this machine has no device")
        self._initialized = True

    @api(values=1, needs="nothing")
    def cuDriverGetVersion(self) -> int:
        return DRIVER_VERSION

    @api(values=1, needs="init")
    def cuDeviceGetCount(self) -> int:
        return len(self.devices)

    @api(values=1, needs="init")
    def cuDeviceGet(self, ordinal: int) -> CUdevice:
        return CUdevice(self._device(ordinal))

    @api(values=1, needs="init")
    def cuDeviceGetName(self, length: int, dev: CUdevice) -> bytes:
        name = self.devices[self._device(dev)].name.encode()[: length - 1] + b"\0"
        return name.ljust(length)

    @api(values=1, needs="init")
    def cuDeviceGetAttribute(self, attrib: CUdevice_attribute, dev: CUdevice) -> int:
        device, names = self.devices[self._device(dev)], CUdevice_attribute
        return {
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: device.capability[0],
            names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: device.capability[1],
            names.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: device.multiprocessors,
            names.CU_DEVICE_ATTRIBUTE_CLOCK_RATE: 1_980_000,
            names.CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE: 3_201_000,
            names.CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE: 60 << 20,
            names.CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING: 1,
            names.CU_DEVICE_ATTRIBUTE_INTEGRATED: 0,
        }[names(attrib)]

    @api(values=1, needs="init")
    def cuDeviceTotalMem(self, dev: CUdevice) -> int:
        return self.devices[self._device(dev)].memory

    @api(values=1, needs="init")
    def cuDevicePrimaryCtxRetain(self, dev: CUdevice) -> CUcontext:
        context = self._contexts[self._device(dev)]
        context.retained += 1
        return CUcontext(context.handle)

    @api(needs="init")
    def cuDevicePrimaryCtxRelease(self, dev: CUdevice) -> None:
        context = self._contexts[self._device(dev)]
        if not context.retained:
            raise CudaError(CUresult.CUDA_ERROR_INVALID_CONTEXT, "released more often than retained")
        context.retained -= 1

    @api(needs="init")
    def cuCtxPushCurrent(self, ctx: CUcontext) -> None:
        for context in self._contexts:
            if context.handle == int(CUcontext(ctx)) and (context.retained or context.implicit):
                self._stack.append(context)
                return
        raise CudaError(CUresult.CUDA_ERROR_INVALID_CONTEXT, f"{ctx!r} is no living context")

    @api(values=1, needs="init")
    def cuCtxPopCurrent(self) -> CUcontext:
        if not self._stack:
            raise CudaError(CUresult.CUDA_ERROR_INVALID_CONTEXT, "no context is current in this thread")
        return CUcontext(self._stack.pop().handle)

    @api(values=1, needs="init")
    def cuCtxGetCurrent(self) -> CUcontext:
        return CUcontext(self._stack[-1].handle if self._stack else 0)

    @api()
    def cuCtxSynchronize(self) -> None:
        self._refuse_in_capture()
        self.counts.synchronizations += 1
        for stream in self._current.streams:
            stream.run()
        self._current.check()

    # Memory

    @api(values=2)
    def cuMemGetInfo(self) -> tuple[int, int]:
        ordinal = self._current.ordinal
        return self.devices[ordinal].memory - self.space.used(ordinal), self.devices[ordinal].memory

    @api(values=1)
    def cuMemAlloc(self, bytesize: int) -> CUdeviceptr:
        self._refuse_in_capture()
        return CUdeviceptr(self._allocate(unsigned(bytesize), self._current).address)

    @api()
    def cuMemFree(self, dptr: CUdeviceptr) -> None:
        self._refuse_in_capture()
        self._free(int(CUdeviceptr(dptr)), self._current.ordinal)

    @api(values=1)
    def cuMemHostAlloc(self, bytesize: int, Flags: int) -> int:
        self._refuse_in_capture()
        if not unsigned(bytesize):
            raise CudaError(CUresult.CUDA_ERROR_INVALID_VALUE, "an allocation of 0 bytes")
        return self.space.allocate(bytesize, None).address

    @api()
    def cuMemFreeHost(self, p: int) -> None:
        self._refuse_in_capture()
        self._free(host_pointer(p), None)

    def _free(self, address: int, ordinal: int | None) -> None:
        if address == 0:
            return
        block = self.space.blocks.get(address)
        if block is None or block.freed or block.ordinal != ordinal:
            raise CudaError(
                CUresult.CUDA_ERROR_INVALID_VALUE,
                f"{address:#x} is not the start of a living block there{f': {block}' if block else ''}",
            )
        self.space.free(block)

    @api()
    def cuMemsetD8Async(self, dstDevice: CUdeviceptr, uc: int, N: int, hStream: CUstream) -> None:
        if not 0 <= uc <= 255:
            raise OverflowError("value too large to convert to unsigned char")
        stream = self._stream(hStream)
        target = self._block(dstDevice, unsigned(N), stream.context.ordinal)

        def run() -> None:
            self.counts.memsets += 1
            self._view(target, N, stream.context.ordinal)[:] = uc

        stream.push(run)

    @api()
    def cuMemcpyHtoDAsync(self, dstDevice: CUdeviceptr, srcHost: Any, ByteCount: int, hStream: CUstream) -> None:
        stream, source, size = self._stream(hStream), host_pointer(srcHost), unsigned(ByteCount)
        ordinal = stream.context.ordinal
        target = self._block(dstDevice, size, ordinal)
        if self._pinned(source, size):
            read = functools.partial(self._view, source, size, None)
        else:
            self._pageable(stream)
            read = functools.partial(np.frombuffer, ctypes.string_at(source, size), np.uint8)
        stream.push(self._copy("H2D", size, read, functools.partial(self._view, target, size, ordinal)))

    @api()
    def cuMemcpyDtoHAsync(self, dstHost: Any, srcDevice: CUdeviceptr, ByteCount: int, hStream: CUstream) -> None:
        stream, target, size = self._stream(hStream), host_pointer(dstHost), unsigned(ByteCount)
        ordinal = stream.context.ordinal
        source = self._block(srcDevice, size, ordinal)
        pinned = self._pinned(target, size)
        if not pinned:
            self._pageable(stream)
        host = (
            functools.partial(self._view, target, size, None)
            if pinned
            else lambda: np.frombuffer((ctypes.c_uint8 * size).from_address(target), np.uint8)
        )
        stream.push(self._copy("D2H", size, functools.partial(self._view, source, size, ordinal), host))
        if not pinned:
            stream.run()
            stream.context.check()

    @api()
    def cuMemcpyDtoDAsync(
        self, dstDevice: CUdeviceptr, srcDevice: CUdeviceptr, ByteCount: int, hStream: CUstream
    ) -> None:
        stream, size = self._stream(hStream), unsigned(ByteCount)
        ordinal = stream.context.ordinal
        target, source = self._block(dstDevice, size, ordinal), self._block(srcDevice, size, ordinal)
        stream.push(
            self._copy(
                "D2D",
                size,
                functools.partial(self._view, source, size, ordinal),
                functools.partial(self._view, target, size, ordinal),
            )
        )

    def _pageable(self, stream: Stream) -> None:
        if stream.capture:
            stream.capture.refuse("a copy of pageable memory in a capture")
        self.counts.pageable_copies += 1

    def _copy(self, kind: str, size: int, source: Callable[[], np.ndarray], target: Callable[[], np.ndarray]) -> Work:
        def run() -> None:
            self.counts.copies[kind] += 1
            self.counts.copied_bytes[kind] += size
            target()[:] = source().copy()

        return run

    # Streams and events

    def _add(self, kind: type, **fields: Any) -> int:
        handle = next(self._handles)
        self._objects[handle] = kind(handle, site=caller(), **fields)
        return handle

    @api(values=1)
    def cuStreamCreate(self, Flags: int) -> CUstream:
        handle = self._add(
            Stream,
            context=self._current,
            non_blocking=CUstream_flags(unsigned(Flags)) == CUstream_flags.CU_STREAM_NON_BLOCKING,
        )
        self._current.streams.append(self._get(handle, Stream))
        return CUstream(handle)

    @api()
    def cuStreamDestroy(self, hStream: CUstream) -> None:
        stream = self._get(CUstream(hStream), Stream)
        if stream.capture:
            stream.capture.valid = False
        del self._objects[stream.handle]  # its queue stays with the context and still runs

    def _waitable(self, hStream: CUstream) -> Stream:
        stream = self._stream(hStream)
        if stream.capture:
            stream.capture.refuse("waiting for a stream that is capturing")
        self._refuse_in_capture()
        return stream

    @api()
    def cuStreamSynchronize(self, hStream: CUstream) -> None:
        stream = self._waitable(hStream)
        self.counts.synchronizations += 1
        if stream.legacy:
            stream.context.legacy_waits(stream)
        stream.run()
        stream.context.check()

    @api()
    def cuStreamQuery(self, hStream: CUstream) -> None:
        stream = self._waitable(hStream)
        self.counts.queries += 1
        stream.run(at_most=1)
        stream.context.check()
        if stream.queue:
            raise CudaError(CUresult.CUDA_ERROR_NOT_READY, f"{len(stream.queue)} pieces of work to go")

    @api()
    def cuStreamWaitEvent(self, hStream: CUstream, hEvent: CUevent, Flags: int) -> None:
        stream, event = self._stream(hStream), self._get(CUevent(hEvent), Event)
        if event.captured:
            capture, recorded_on = event.captured
            if stream.capture not in (None, capture):
                stream.capture.refuse("two captures would merge", CUresult.CUDA_ERROR_STREAM_CAPTURE_MERGE)
            capture.join(stream, recorded_on)
        elif stream.capture and event.record:
            stream.capture.refuse(
                "waiting in a capture for an event from outside of it", CUresult.CUDA_ERROR_STREAM_CAPTURE_ISOLATION
            )
        elif event.record:
            stream.push(Wait(event.record))

    @api(values=1)
    def cuEventCreate(self, Flags: int) -> CUevent:
        timing = not CUevent_flags.CU_EVENT_DISABLE_TIMING & unsigned(Flags)
        return CUevent(self._add(Event, context=self._current, timing=timing))

    @api()
    def cuEventDestroy(self, hEvent: CUevent) -> None:
        del self._objects[self._get(CUevent(hEvent), Event).handle]

    @api()
    def cuEventRecord(self, hEvent: CUevent, hStream: CUstream) -> None:
        event, stream = self._get(CUevent(hEvent), Event), self._stream(hStream)
        if event.context is not stream.context:
            raise CudaError(CUresult.CUDA_ERROR_INVALID_HANDLE, "event and stream are of different contexts")
        if stream.capture:
            stream.capture.check()
            event.captured, event.record = (stream.capture, stream), None
            return
        event.captured, event.record = None, Record(stream)
        stream.push(event.record)

    def _recorded(self, hEvent: CUevent) -> Event:
        event = self._get(CUevent(hEvent), Event)
        if event.captured:
            event.captured[0].refuse("waiting for an event of a capture", CUresult.CUDA_ERROR_CAPTURED_EVENT)
        self._refuse_in_capture()
        return event

    @api()
    def cuEventSynchronize(self, hEvent: CUevent) -> None:
        event = self._recorded(hEvent)
        self.counts.synchronizations += 1
        if event.record:
            event.record.stream.run(until=event.record)
        event.context.check()

    @api()
    def cuEventQuery(self, hEvent: CUevent) -> None:
        event = self._recorded(hEvent)
        self.counts.queries += 1
        if event.record and not event.record.done:
            event.record.stream.run(at_most=1)
        event.context.check()
        if event.record and not event.record.done:
            raise CudaError(CUresult.CUDA_ERROR_NOT_READY, "the stream has not come to the event")

    @api(values=1)
    def cuEventElapsedTime(self, hStart: CUevent, hEnd: CUevent) -> float:
        start, end = (self._get(CUevent(event), Event) for event in (hStart, hEnd))
        if not (start.timing and end.timing and start.record and end.record):
            raise CudaError(CUresult.CUDA_ERROR_INVALID_HANDLE, "an event without timing, or never recorded")
        if start.record.time is None or end.record.time is None:
            raise CudaError(CUresult.CUDA_ERROR_NOT_READY, "the stream has not come to the event")
        return 1000 * (end.record.time - start.record.time)

    # Captures and graphs

    @api()
    def cuStreamBeginCapture(self, hStream: CUstream, mode: CUstreamCaptureMode) -> None:
        stream = self._stream(hStream)
        if stream.legacy:
            raise CudaError(
                CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "the legacy default stream cannot be captured"
            )
        if stream.capture:
            raise CudaError(CUresult.CUDA_ERROR_INVALID_VALUE, "the stream is capturing already")
        stream.capture = Capture(stream, CUstreamCaptureMode(mode))
        self._captures.append(stream.capture)

    @api(values=1)
    def cuStreamEndCapture(self, hStream: CUstream) -> CUgraph:
        stream = self._stream(hStream)
        capture = stream.capture
        if capture is None:
            raise CudaError(CUresult.CUDA_ERROR_INVALID_VALUE, "the stream is not capturing")
        if capture.origin is not stream:
            capture.refuse("a capture ends on the stream where it began", CUresult.CUDA_ERROR_STREAM_CAPTURE_UNMATCHED)
        if (
            capture.mode != CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
            and capture.thread != threading.get_ident()
        ):
            capture.refuse(
                "a capture ends in the thread where it began", CUresult.CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD
            )
        self._captures.remove(capture)
        return CUgraph(self._add(Graph, work=capture.end()))

    @api(values=1)
    def cuStreamIsCapturing(self, hStream: CUstream) -> CUstreamCaptureStatus:
        capture = self._stream(hStream).capture
        return capture.status if capture else CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_NONE

    @api(values=1)
    def cuGraphInstantiate(self, hGraph: CUgraph, flags: int) -> CUgraphExec:
        graph = self._get(CUgraph(hGraph), Graph)
        executable = Graph(next(self._handles), list(graph.work), caller())
        self._executables[executable.handle] = executable
        return CUgraphExec(executable.handle)

    def _executable(self, hGraphExec: CUgraphExec) -> Graph:
        handle = int(CUgraphExec(hGraphExec))
        if handle not in self._executables:
            raise CudaError(CUresult.CUDA_ERROR_INVALID_VALUE, f"{handle:#x} is no living executable graph")
        return self._executables[handle]

    @api()
    def cuGraphUpload(self, hGraphExec: CUgraphExec, hStream: CUstream) -> None:
        self._executable(hGraphExec)
        stream = self._stream(hStream)
        if stream.capture:
            stream.capture.refuse("uploading a graph in a capture")
        self.counts.graph_uploads += 1

    @api()
    def cuGraphLaunch(self, hGraphExec: CUgraphExec, hStream: CUstream) -> None:
        graph, stream = self._executable(hGraphExec), self._stream(hStream)

        def run() -> None:
            self.counts.graph_launches += 1
            for work in graph.work:
                work()

        stream.push(run)

    @api()
    def cuGraphDestroy(self, hGraph: CUgraph) -> None:
        del self._objects[self._get(CUgraph(hGraph), Graph).handle]

    @api()
    def cuGraphExecDestroy(self, hGraphExec: CUgraphExec) -> None:
        del self._executables[self._executable(hGraphExec).handle]

    # Errors by name

    @api(values=1, needs="nothing")
    def cuGetErrorName(self, error: CUresult) -> bytes:
        return self._result(error).name.encode()

    @api(values=1, needs="nothing")
    def cuGetErrorString(self, error: CUresult) -> bytes:
        return self._result(error).name.removeprefix("CUDA_ERROR_").lower().replace("_", " ").encode()

    def _result(self, error: CUresult) -> CUresult:
        try:
            return CUresult(error)
        except ValueError:
            raise CudaError(CUresult.CUDA_ERROR_INVALID_VALUE, f"{error} is no CUresult") from None
