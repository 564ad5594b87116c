"""Gives pages of mapped files back to the system after a library has copied what is in them.

No data is lost: a page that is read again comes back from the file. Works on Linux; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

MADV_DONTNEED = 4
INTERVAL = 0.1
"""Seconds between two sweeps. A page that is still needed takes a microsecond to map again."""


@contextmanager
def pages_given_back(file: Path) -> Iterator[None]:
    """Inside the block, and once at its end, drops the pages of the read-only mappings of `file`."""
    if sys.platform != "linux":
        yield
        return
    done = threading.Event()

    def sweep() -> None:
        while not done.wait(INTERVAL):
            drop_pages(file)

    thread = threading.Thread(target=sweep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        drop_pages(file)


def drop_pages(file: Path) -> int:
    """Drops the pages of the read-only mappings of `file`. Returns their bytes, 0 if the system is not Linux. Writable
    mappings stay, because they may hold data that the file does not."""
    if sys.platform != "linux":
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    dropped, name = 0, str(file.resolve())
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, rights, _, _, inode, *mapped = line.split(maxsplit=5)
        if inode != "0" and mapped == [name] and "w" not in rights:
            start, end = (int(part, 16) for part in addresses.split("-"))
            if madvise(start, end - start, MADV_DONTNEED) == 0:
                dropped += end - start
    return dropped


class Scratch:
    """Large arrays in temporary files without a name, so that their pages can be given back while they stay
    readable."""

    least = 1 << 20
    """Bytes. Smaller arrays stay in memory."""

    def __init__(self) -> None:
        self._mapped: list[mmap.mmap] = []

    def copy(self, array: np.ndarray) -> np.ndarray:
        """A contiguous copy, in a temporary file. It is in memory if it is small, or if the disk has no room."""
        if array.nbytes < self.least or sys.platform != "linux":
            return np.array(array, order="C")
        try:
            with tempfile.TemporaryFile() as file:
                os.posix_fallocate(
                    file.fileno(), 0, array.nbytes
                )  # a full disk is an error here, and the end of the process later
                mapped = mmap.mmap(file.fileno(), array.nbytes)
        except OSError:
            return np.array(array, order="C")
        self._mapped.append(mapped)
        copied = np.frombuffer(mapped, array.dtype).reshape(array.shape)
        copied[...] = array
        return copied

    def give_back(self) -> None:
        """Drops the pages of all copies."""
        for mapped in self._mapped:
            mapped.madvise(MADV_DONTNEED)
