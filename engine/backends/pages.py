"""Gives pages of mapped files back to the system while a library reads them: what it has copied need not stay resident.

Only what a process has mapped is dropped, never data: a page that is read again comes back from the file. Linux only; elsewhere
nothing happens.
"""
from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MADV_DONTNEED = 4
INTERVAL = 0.1
"""Seconds between two sweeps; a page that is still needed costs a microsecond to map again."""


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
    """Bytes of the mappings that were dropped. Writable ones are left alone: they may hold what the file does not."""
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
