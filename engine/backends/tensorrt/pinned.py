"""Pinned memory on its way to and from the GPU. The host never waits for it, but where it runs very far ahead."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable

import numpy as np

from .cuda import Device, Event, PinnedMemory, Stream, align

BLOCK_BYTES = 1 << 18
AHEAD_BYTES = 32 << 20
"""How much may be under way to the GPU in one ring."""


class Block(PinnedMemory):
    """Pinned memory with an event behind the last use of it."""

    def __init__(self, device: Device, nbytes: int, what: str) -> None:
        super().__init__(device, nbytes, what)
        self.event: Event | None = None

    def leave(self, stream: Stream) -> None:
        """Notes that the GPU is done with it when it has done all that was started so far."""
        if self.event is None:
            self.event = Event(self._device)
        stream.record(self.event)

    def close(self) -> None:
        if self.event is not None:
            self.event.close()
        super().close()


class Ring:
    """Pinned blocks that the host fills in turn.

    A block comes again when the GPU has passed all that was started while it was the current one. Until then there are
    more of them, up to `limit` bytes; at the limit the host waits for the oldest."""

    def __init__(self, device: Device, stream: Stream, limit: int, what: str) -> None:
        self._device, self._stream, self._limit, self._what = device, stream, limit, what
        self._left: deque[Block] = deque()
        self.current: Block | None = None

    @property
    def nbytes(self) -> int:
        """The size of all blocks."""
        return sum(block.nbytes for block in (*self._left, self.current) if block is not None)

    def turn(self, nbytes: int) -> Block:
        """Leaves the current block. The new one has at least `nbytes`; its content is arbitrary, zeros at first."""
        if self.current is not None:
            self.current.leave(self._stream)
            self._left.append(self.current)
            self.current = None
        self.current = self._reused(nbytes) or self._new(nbytes)
        return self.current

    def _reused(self, nbytes: int) -> Block | None:
        """The oldest block, if the GPU is done with it and it is large enough."""
        if not self._left:
            return None
        event = self._left[0].event
        if event is not None and not event.passed():
            if self.nbytes + nbytes <= self._limit:
                return None
            event.wait("waiting for pinned memory")
        block = self._left.popleft()
        if block.nbytes >= nbytes:
            return block
        block.close()
        return None

    def _new(self, nbytes: int) -> Block:
        block = Block(self._device, nbytes, self._what)
        block.bytes[:] = 0
        return block

    def close(self) -> None:
        """Frees all blocks. The GPU may not be reading them."""
        while self._left:
            self._left.pop().close()
        if self.current is not None:
            self.current.close()
            self.current = None


class Uploads:
    """The way of arrays to the GPU."""

    def __init__(self, device: Device, stream: Stream) -> None:
        self._stream, self._used = stream, 0
        self._ring = Ring(device, stream, AHEAD_BYTES, "uploads")

    def put(self, target: int, array: np.ndarray) -> None:
        """Starts copying the array's bytes to `target`. The array may change afterwards."""
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        block = self._ring.current
        if block is None or self._used + content.nbytes > block.nbytes:
            block, self._used = self._ring.turn(max(BLOCK_BYTES, align(content.nbytes))), 0
        block.bytes[self._used : self._used + content.nbytes] = content
        self._stream.upload(target, block.address + self._used, content.nbytes)
        self._used += align(content.nbytes)


class Result:
    """Pinned memory of one download, until nobody refers to it."""

    def __init__(self, block: Block, stream: Stream) -> None:
        self._block, self._stream = block, stream
        self.address, self.bytes = block.address, block.bytes

    def end(self) -> None:
        """All downloads into it have been started."""
        self._block.leave(self._stream)

    def wait(self, doing: str) -> None:
        """Waits until everything before `end` is done, and for nothing that was started later."""
        assert self._block.event is not None, "end() comes first"
        self._block.event.wait(doing)


class Results:
    """Pinned memory for what comes back. What nobody refers to any more is used again, whether it was waited for or
    not: the stream fills it in order."""

    def __init__(self, device: Device, stream: Stream, retire: Callable[[Callable[[], None]], None]) -> None:
        self._device, self._stream, self._retire = device, stream, retire
        self._free: list[Block] = []

    def take(self, nbytes: int) -> Result:
        """Room for so many bytes."""
        block = self._best_free(nbytes)
        if block is not None and block.nbytes < nbytes:
            self._retire(block.close)
            block = None
        if block is None:
            block = Block(self._device, nbytes, "results")
        result = Result(block, self._stream)
        weakref.finalize(result, self._free.append, block)
        return result

    def _best_free(self, nbytes: int) -> Block | None:
        """The smallest free block that is large enough; where none is, the largest, to be replaced."""
        if not self._free:
            return None
        self._free.sort(key=lambda block: block.nbytes)
        enough = [block for block in self._free if block.nbytes >= nbytes]
        block = enough[0] if enough else self._free[-1]
        self._free.remove(block)
        return block
