"""CUDA, as far as a backend needs it: a device, its memory, one stream, events and captured graphs.

A thin layer over the driver API in cuda-bindings (the driver is on every machine with a GPU; no CUDA toolkit is
needed). Everything belongs to a `Device`, whose `closing` frees what is left. Calls are made inside `with device:`,
which makes the device current for this thread and restores what was current before, so that several devices and other
CUDA libraries get along.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from ...errors import BackendError, CudaError, CudaMemoryError, DeviceError, DeviceLostError
from ...libraries import install_command

ALIGNMENT = 256
"""Bytes; TensorRT wants its inputs and outputs at such addresses."""

STICKY = frozenset(
    {
        "ECC_UNCORRECTABLE",
        "ILLEGAL_ADDRESS",
        "LAUNCH_TIMEOUT",
        "CONTEXT_IS_DESTROYED",
        "ASSERT",
        "HARDWARE_STACK_ERROR",
        "ILLEGAL_INSTRUCTION",
        "MISALIGNED_ADDRESS",
        "INVALID_ADDRESS_SPACE",
        "INVALID_PC",
        "LAUNCH_FAILED",
    }
)
"""Errors (after CUDA_ERROR_) that every later call of the process on this device repeats."""


def align(size: int) -> int:
    """`size` rounded up to ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def load_driver() -> ModuleType:
    """`cuda.bindings.driver`, initialised. BackendError says what is missing."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise BackendError(
            f"CUDA's Python bindings cannot be imported ({error}); install them: {install_command('tensorrt')}"
        ) from error
    try:
        (status,) = driver.cuInit(0)
    except Exception as error:  # of cuda-pathfinder, where there is no driver library
        raise BackendError(
            f"there is no NVIDIA driver here ({type(error).__name__}: {error}); install one, or use "
            "backend='onnxruntime'"
        ) from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise BackendError(f"CUDA does not start: {_describe(driver, status)}; `nvidia-smi` should list a GPU here")
    return driver


def count_devices() -> int:
    """How many GPUs there are; 0 without a driver."""
    try:
        driver = load_driver()
    except BackendError:
        return 0
    status, count = driver.cuDeviceGetCount()
    return int(count) if status == driver.CUresult.CUDA_SUCCESS else 0


def _describe(driver: ModuleType, status: Any) -> str:
    _, text = driver.cuGetErrorString(status)
    return f"{status.name} ({text.decode() if text else 'unknown'})"


class Device:
    """One GPU, by its number."""

    def __init__(self, number: int) -> None:
        self._driver, self.number = load_driver(), number
        self._success = self._driver.CUresult.CUDA_SUCCESS
        self._lost: str | None = None
        self._owned: dict[Any, Callable[[], None]] = {}
        count = self._call("counting GPUs", "cuDeviceGetCount")
        if number >= count:
            raise DeviceError(
                f"device 'cuda:{number}' does not exist; this machine has {count} GPU{'s' * (count != 1)}, numbered "
                "from 0"
            )
        self._handle = self._call("opening the GPU", "cuDeviceGet", number)
        self.name: str = (
            self._call("reading the GPU's name", "cuDeviceGetName", 256, self._handle).split(b"\0")[0].decode()
        )
        attributes = self._driver.CUdevice_attribute
        self.compute_capability = ".".join(
            str(self._call("reading the compute capability", "cuDeviceGetAttribute", attribute, self._handle))
            for attribute in (
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        version = self._call("reading the driver's version", "cuDriverGetVersion")
        self.driver_version = f"{version // 1000}.{version % 1000 // 10}"
        self._context = self._call("opening the GPU", "cuDevicePrimaryCtxRetain", self._handle)
        self._open = True

    def __enter__(self) -> Device:
        if not self._open:
            raise BackendError(f"GPU {self.number} was given back by close(); load the pipeline again")
        self._start("making the GPU current", "cuCtxPushCurrent", self._context)
        return self

    def __exit__(self, *exception: object) -> None:
        self._driver.cuCtxPopCurrent()

    def _call(self, doing: str, function: str, *arguments: Any) -> Any:
        """One call of the driver; its value, or the CudaError that its status means."""
        self._refuse_lost()
        status, *values = getattr(self._driver, function)(*arguments)
        if status != self._success:
            raise self._error(status, doing, function)
        return values[0] if len(values) == 1 else values

    def _start(self, doing: str, function: str, *arguments: Any) -> None:
        """One call that has no value: a few of these are all that the host does for a step."""
        if self._lost:
            self._refuse_lost()
        (status,) = getattr(self._driver, function)(*arguments)
        if status != self._success:
            raise self._error(status, doing, function)

    def _refuse_lost(self) -> None:
        if self._lost:
            raise DeviceLostError(f"GPU {self.number} is lost to this process since {self._lost}; start a new process")

    def _error(self, status: Any, doing: str, function: str) -> CudaError:
        """The error that a status means."""
        message = f"{_describe(self._driver, status)} while {doing} ({function}) on GPU {self.number}"
        name = status.name.removeprefix("CUDA_ERROR_")
        if name in STICKY:
            self._lost = message
            return DeviceLostError(
                f"{message}; this process has lost the GPU: start a new one. If it happens again, set "
                "CUDA_LAUNCH_BLOCKING=1 and report it"
            )
        if name == "OUT_OF_MEMORY":
            return CudaMemoryError(
                f"{message}{self._free_memory()}; close other programs or pipelines on this GPU, or build for smaller "
                "sizes"
            )
        return CudaError(message)

    def _free_memory(self) -> str:
        status, *values = self._driver.cuMemGetInfo()
        return (
            f", {values[0] / 2**30:.2f} of {values[1] / 2**30:.1f} GiB are free"
            if status == self._driver.CUresult.CUDA_SUCCESS
            else ""
        )

    def memory(self) -> tuple[int, int]:
        """Bytes free and in all."""
        free, total = self._call("asking for free memory", "cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, nbytes: int, what: str) -> DeviceMemory:
        """Memory on the GPU, 256-byte aligned, with arbitrary content."""
        return DeviceMemory(self, nbytes, what)

    def _own(self, resource: Any, free: Callable[[], None]) -> None:
        self._owned[resource] = free

    def _release(self, resource: Any) -> None:
        """Frees a resource once; errors are left to the next call that matters."""
        if free := self._owned.pop(resource, None):
            free()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Waits for what was started; the device is current inside, lost or not; afterwards all that was allocated here
        is freed, and the device itself. A second time does nothing but run what is inside."""
        if not self._open:
            yield
            return
        self._driver.cuCtxPushCurrent(self._context)
        for stream in [resource for resource in self._owned if isinstance(resource, Stream)]:
            self._driver.cuStreamSynchronize(stream.handle)
        try:
            yield
        finally:
            for free in reversed(list(self._owned.values())):
                free()
            self._owned.clear()
            self._driver.cuCtxPopCurrent()
            self._driver.cuDevicePrimaryCtxRelease(self._handle)
            self._open = False


class DeviceMemory:
    """A block of the GPU's memory."""

    def __init__(self, device: Device, nbytes: int, what: str) -> None:
        self.nbytes, self._device = max(nbytes, 1), device
        self.address = int(device._call(f"allocating {nbytes / 2**20:.1f} MiB for {what}", "cuMemAlloc", self.nbytes))
        device._own(self, lambda address=self.address: device._driver.cuMemFree(address))  # type: ignore[misc]

    def close(self) -> None:
        """Frees it. Nothing that was started may still use it."""
        self._device._release(self)


class PinnedMemory:
    """Page-locked memory of the host, which the GPU reads and writes without the host's help."""

    def __init__(self, device: Device, nbytes: int, what: str) -> None:
        self.nbytes, self._device = max(nbytes, 1), device
        self.address = int(
            device._call(
                f"allocating {nbytes / 2**20:.1f} MiB of pinned memory for {what}", "cuMemHostAlloc", self.nbytes, 0
            )
        )
        device._own(self, lambda address=self.address: device._driver.cuMemFreeHost(address))  # type: ignore[misc]
        self.bytes = np.ctypeslib.as_array((ctypes.c_uint8 * self.nbytes).from_address(self.address))

    def close(self) -> None:
        """Frees it. Nothing that was started may still use it."""
        self._device._release(self)


class Event:
    """A mark in a stream; with `timing`, also the time at which the GPU passed it."""

    def __init__(self, device: Device, timing: bool = False) -> None:
        self._device, flags = device, device._driver.CUevent_flags
        kind = flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING
        self.handle = device._call("creating an event", "cuEventCreate", int(kind))
        device._own(self, lambda handle=self.handle: device._driver.cuEventDestroy(handle))  # type: ignore[misc]

    def passed(self) -> bool:
        """Whether the GPU has passed it, without waiting. One that was never recorded counts as passed."""
        device = self._device
        (status,) = device._driver.cuEventQuery(self.handle)
        if status == device._driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        if status != device._success:
            raise device._error(status, "asking for an event", "cuEventQuery")
        return True

    def wait(self, doing: str) -> None:
        """Waits until the GPU has passed it; an error of anything before it appears here."""
        self._device._start(doing, "cuEventSynchronize", self.handle)

    def seconds_since(self, earlier: Event) -> float:
        """Time on the GPU from `earlier` to this event; both must have passed."""
        return float(self._device._call("reading a time", "cuEventElapsedTime", earlier.handle, self.handle)) / 1000

    def close(self) -> None:
        self._device._release(self)


class Stream:
    """A queue of work on the GPU. Methods return before the work is done, but for `synchronize`."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.handle = device._call(
            "creating a stream", "cuStreamCreate", int(device._driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        )
        device._own(self, lambda handle=self.handle: device._driver.cuStreamDestroy(handle))  # type: ignore[misc]
        self.number = int(self.handle)

    def upload(self, target: int, source: int, nbytes: int) -> None:
        """Pinned host memory to the GPU."""
        self._device._start("copying to the GPU", "cuMemcpyHtoDAsync", target, source, nbytes, self.handle)

    def download(self, target: int, source: int, nbytes: int) -> None:
        """The GPU's memory to pinned host memory."""
        self._device._start("copying from the GPU", "cuMemcpyDtoHAsync", target, source, nbytes, self.handle)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """From one place on the GPU to another."""
        self._device._start("copying on the GPU", "cuMemcpyDtoDAsync", target, source, nbytes, self.handle)

    def clear(self, target: int, nbytes: int) -> None:
        """Zeros."""
        self._device._start("clearing memory", "cuMemsetD8Async", target, 0, nbytes, self.handle)

    def record(self, event: Event) -> None:
        """Sets `event` behind all that was started so far."""
        self._device._start("recording an event", "cuEventRecord", event.handle, self.handle)

    def synchronize(self, doing: str) -> None:
        """Waits until all is done; an error of any of it appears here."""
        self._device._start(doing, "cuStreamSynchronize", self.handle)

    @contextmanager
    def capture(self) -> Iterator[list[Graph]]:
        """What is started inside goes into a graph instead, which the list holds afterwards. Garbage is not collected
        meanwhile: memory of another pipeline that it frees would spoil the capture."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            yield from self._capture()
        finally:
            if collecting:
                gc.enable()

    def _capture(self) -> Iterator[list[Graph]]:
        call, made = self._device._call, list[Graph]()
        call(
            "starting a capture",
            "cuStreamBeginCapture",
            self.handle,
            self._device._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
        )
        try:
            yield made
        except BaseException:
            # Leaves the stream usable; the error inside is the one to tell.
            _, graph = self._device._driver.cuStreamEndCapture(self.handle)
            if graph is not None and int(graph):
                self._device._driver.cuGraphDestroy(graph)
            raise
        made.append(Graph(self._device, call("ending a capture", "cuStreamEndCapture", self.handle)))

    def close(self) -> None:
        self._device._release(self)


class Graph:
    """Captured work, launched as a whole."""

    def __init__(self, device: Device, captured: Any) -> None:
        self._device = device
        try:
            self.handle = device._call("instantiating a graph", "cuGraphInstantiate", captured, 0)
        finally:
            device._driver.cuGraphDestroy(captured)
        device._own(self, lambda handle=self.handle: device._driver.cuGraphExecDestroy(handle))  # type: ignore[misc]

    def upload(self, stream: Stream) -> None:
        """Makes the first launch as quick as the others."""
        self._device._start("uploading a graph", "cuGraphUpload", self.handle, stream.handle)

    def launch(self, stream: Stream) -> None:
        self._device._start("launching a graph", "cuGraphLaunch", self.handle, stream.handle)

    def close(self) -> None:
        """Destroys it. It may not be running."""
        self._device._release(self)
