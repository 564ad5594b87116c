"""The machine behind the fake driver: memory, contexts, and streams that run late.

Nothing runs when it is enqueued. Work runs when somebody waits for it, so a host that reads or overwrites pinned memory
too early sees what it would see on a slow GPU. An eager machine runs work at once, as the fastest GPU would: a host
that fills memory only after it started the copy sees its mistake there. Device memory is at addresses where the host
has nothing; pinned memory is real. New memory is filled with 0xFF, which is NaN in every float type.
"""

from __future__ import annotations

import bisect
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .cuda_types import STICKY, CUresult, CUstreamCaptureMode, CUstreamCaptureStatus

DEVICE_MEMORY_START = 0x7000_0000_0000
DEVICE_MEMORY_STRIDE = 0x0100_0000_0000
DEVICE_ALIGNMENT, PINNED_ALIGNMENT = 256, 4096
POISON = 0xFF
HERE = str(Path(__file__).parent)

Work = Callable[[], None]


class CudaError(Exception):
    """A call that returns an error at once."""

    def __init__(self, result: CUresult, reason: str) -> None:
        super().__init__(reason)
        self.result, self.reason = result, reason


class DeviceFault(CudaError):
    """An error of running work: it breaks the context."""


@dataclass(frozen=True)
class Device:
    """What a device says of itself; `memory` in bytes."""

    name: str = "NVIDIA H200"
    capability: tuple[int, int] = (9, 0)
    memory: int = 8 << 30
    multiprocessors: int = 132


@dataclass
class Counts:
    """What the device did (copies, kernels, graphs: replayed ones too) and what the host waited for
    (synchronizations)."""

    synchronizations: int = 0
    queries: int = 0
    kernels: Counter[str] = field(default_factory=Counter)
    graph_launches: int = 0
    graph_uploads: int = 0
    memsets: int = 0
    copies: Counter[str] = field(default_factory=Counter)
    """By kind: "H2D", "D2H", "D2D"."""
    copied_bytes: Counter[str] = field(default_factory=Counter)
    pageable_copies: int = 0


def caller() -> str:
    """Where the code under test stands: file and line of the innermost frame outside of the fakes."""
    frame = sys._getframe(1)
    while frame.f_back and (frame.f_code.co_filename.startswith(HERE) or frame.f_code.co_filename == "<string>"):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


@dataclass(eq=False)
class Allocation:
    """A block of device memory, or of pinned memory where `ordinal` is None."""

    address: int
    data: np.ndarray
    size: int
    ordinal: int | None
    site: str
    freed: bool = False

    def __str__(self) -> str:
        where = "pinned memory" if self.ordinal is None else f"memory of device {self.ordinal}"
        freed = ", freed" if self.freed else ""
        return f"{self.size} bytes of {where} at {self.address:#x}, allocated at {self.site}{freed}"


class AddressSpace:
    """All blocks, living and freed. Addresses are never given out twice, so that every use after a free is found."""

    def __init__(self, devices: int) -> None:
        self._next = [DEVICE_MEMORY_START + i * DEVICE_MEMORY_STRIDE for i in range(devices)]
        self._addresses: list[int] = []
        self.blocks: dict[int, Allocation] = {}

    def allocate(self, size: int, ordinal: int | None) -> Allocation:
        if ordinal is None:
            backing = np.full(size + PINNED_ALIGNMENT, POISON, np.uint8)
            skip = -backing.ctypes.data % PINNED_ALIGNMENT
            data = backing[skip : skip + size]
            address = data.ctypes.data
        else:
            data = np.full(size, POISON, np.uint8)
            address = self._next[ordinal]
            self._next[ordinal] += (size + 2 * DEVICE_ALIGNMENT - 1) // DEVICE_ALIGNMENT * DEVICE_ALIGNMENT
        block = Allocation(address, data, size, ordinal, caller())
        bisect.insort(self._addresses, address)
        self.blocks[address] = block
        return block

    def free(self, block: Allocation) -> None:
        block.freed = True
        if block.ordinal is None:
            block.data[:] = POISON  # the pages stay, so that no other memory takes the address
        else:
            block.data = np.empty(0, np.uint8)

    def find(self, address: int) -> Allocation | None:
        """The block that the address lies in, freed or not."""
        index = bisect.bisect_right(self._addresses, address) - 1
        if index < 0:
            return None
        block = self.blocks[self._addresses[index]]
        return block if address < block.address + block.size else None

    def is_device_address(self, address: int) -> bool:
        return DEVICE_MEMORY_START <= address < DEVICE_MEMORY_START + len(self._next) * DEVICE_MEMORY_STRIDE

    def check(self, address: int, size: int, ordinal: int | None) -> Allocation:
        """The living block of that device (None: pinned) that holds the whole range; ValueError says what is wrong with
        it."""
        block = self.find(address)
        wanted = "pinned memory" if ordinal is None else f"memory of device {ordinal}"
        if block is None:
            raise ValueError(f"{address:#x} is no address of {wanted}")
        if block.freed:
            raise ValueError(f"{address:#x} is in {block}")
        if block.ordinal != ordinal:
            raise ValueError(f"{address:#x} is not {wanted} but in {block}")
        if address + size > block.address + block.size:
            raise ValueError(f"{size} bytes from {address:#x} run past the end of {block}")
        return block

    def view(self, address: int, size: int, ordinal: int | None) -> np.ndarray:
        block = self.check(address, size, ordinal)
        return block.data[address - block.address : address - block.address + size]

    def used(self, ordinal: int) -> int:
        return sum(
            -(-block.size // DEVICE_ALIGNMENT) * DEVICE_ALIGNMENT
            for block in self.blocks.values()
            if block.ordinal == ordinal and not block.freed
        )


class DeviceMemory:
    """What a kernel sees: the memory of its device, every access checked when it happens."""

    def __init__(self, space: AddressSpace, ordinal: int) -> None:
        self._space, self._ordinal = space, ordinal

    def view(self, address: int, size: int) -> np.ndarray:
        """The bytes themselves, [size] uint8."""
        try:
            return self._space.view(address, size, self._ordinal)
        except ValueError as error:
            raise DeviceFault(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS, str(error)) from None


@dataclass(eq=False)
class Context:
    """A device's primary context; `error` is the sticky one."""

    handle: int
    ordinal: int
    log: list[str]
    eager: bool
    retained: int = 0
    implicit: bool = False
    error: CUresult | None = None
    streams: list[Stream] = field(default_factory=list)

    def execute(self, work: Work) -> None:
        if self.error is not None:
            return
        try:
            work()
        except CudaError as error:
            self.error = error.result if error.result in STICKY else CUresult.CUDA_ERROR_LAUNCH_FAILED
            self.log.append(f"device {self.ordinal}: {self.error.name}: {error.reason}")
        except Exception as error:
            self.error = CUresult.CUDA_ERROR_LAUNCH_FAILED
            self.log.append(f"device {self.ordinal}: {self.error.name}: {type(error).__name__}: {error}")

    def check(self) -> None:
        if self.error is not None:
            raise CudaError(
                self.error, f"the context of device {self.ordinal} is broken: {self.log[-1] if self.log else ''}"
            )

    def legacy_waits(self, stream: Stream) -> None:
        """The order between the legacy default stream and the blocking ones: each waits for what the other has
        queued."""
        if stream.non_blocking:
            return
        for other in self.streams:
            if (
                other is not stream
                and not other.non_blocking
                and (stream.legacy or other.legacy)
                and other.queue
                and not other.capture
            ):
                stream.queue.append(Wait(other.tail()))


@dataclass(eq=False)
class Record:
    """The point in a stream that an event marks; as work, passing it."""

    stream: Stream
    time: float | None = None

    def __call__(self) -> None:
        self.time = time.perf_counter()

    @property
    def done(self) -> bool:
        return self.time is not None


@dataclass(eq=False)
class Wait:
    """Work that runs another stream up to a record."""

    record: Record

    def __call__(self) -> None:
        self.record.stream.run(until=self.record)


@dataclass(eq=False)
class Stream:
    handle: int
    context: Context
    non_blocking: bool
    legacy: bool = False
    site: str = ""
    queue: deque[Work] = field(default_factory=deque)
    capture: Capture | None = None

    def push(self, work: Work) -> None:
        """Enqueues, or records where the stream is capturing."""
        if self.capture:
            self.capture.check()
            self.capture.add(self, work)
            return
        if self.legacy:
            for other in self.context.streams:
                if other.capture and not other.non_blocking:
                    other.capture.valid = False
                    raise CudaError(
                        CUresult.CUDA_ERROR_STREAM_CAPTURE_IMPLICIT,
                        "work on the legacy stream while a blocking stream captures",
                    )
        self.context.legacy_waits(self)
        self.queue.append(work)
        if self.context.eager:
            self.run()

    def tail(self) -> Record:
        record = Record(self)
        self.queue.append(record)
        return record

    def run(self, until: Record | None = None, at_most: int | None = None) -> None:
        """Runs queued work, in order: all of it, up to a record, or so many pieces."""
        while self.queue and not (until and until.done) and at_most != 0:
            self.context.execute(self.queue.popleft())
            at_most = None if at_most is None else at_most - 1


@dataclass(eq=False)
class Capture:
    """Work being recorded, on the stream where that began and on those that joined it through events."""

    origin: Stream
    mode: CUstreamCaptureMode
    thread: int = field(default_factory=threading.get_ident)
    work: list[Work] = field(default_factory=list)
    valid: bool = True
    joined: dict[Stream, bool] = field(default_factory=dict)
    """The other streams, and whether the origin waits for all that they do."""

    @property
    def status(self) -> CUstreamCaptureStatus:
        names = CUstreamCaptureStatus
        return names.CU_STREAM_CAPTURE_STATUS_ACTIVE if self.valid else names.CU_STREAM_CAPTURE_STATUS_INVALIDATED

    def check(self) -> None:
        if not self.valid:
            raise CudaError(CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, "the capture was invalidated before")

    def add(self, stream: Stream, work: Work) -> None:
        self.work.append(work)
        if stream in self.joined:
            self.joined[stream] = False

    def join(self, stream: Stream, recorded_on: Stream) -> None:
        """`stream` waits for an event that was recorded on another stream of the capture."""
        if stream is self.origin:
            if recorded_on in self.joined:
                self.joined[recorded_on] = True
            return
        stream.capture = self
        self.joined[stream] = False

    def refuse(self, reason: str, result: CUresult = CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED) -> None:
        self.valid = False
        raise CudaError(result, reason)

    def end(self) -> list[Work]:
        """The work, where the capture went well; the streams are out of it either way."""
        unjoined = [stream for stream, joined in self.joined.items() if not joined]
        for stream in (self.origin, *self.joined):
            stream.capture = None
        self.check()
        if unjoined:
            raise CudaError(
                CUresult.CUDA_ERROR_STREAM_CAPTURE_UNJOINED,
                f"{len(unjoined)} stream(s) of the capture were not joined to its origin",
            )
        return self.work


@dataclass(eq=False)
class Event:
    handle: int
    context: Context
    timing: bool
    site: str = ""
    record: Record | None = None
    captured: tuple[Capture, Stream] | None = None
    """Where it was last recorded, if that was in a capture; waiting for such an event orders captured work only."""


@dataclass(eq=False)
class Graph:
    """A captured graph, or an executable one."""

    handle: int
    work: list[Work]
    site: str = ""
