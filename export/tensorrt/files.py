"""Files that a build of plans writes besides the plans, and its lock."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..building import Report


class TimingCache:
    """What TensorRT measured in earlier builds on this machine, kept beside the plans, with the seconds of the builds
    without it."""

    def __init__(self, folder: Path) -> None:
        self._file, self._log = (
            folder.with_name(f"{folder.name}.timing.cache"),
            folder.with_name(f"{folder.name}.timing.json"),
        )

    def attach(self, config: Any, report: Report) -> Any:
        """The cache in a builder's configuration; a new one where there is none, or none that this machine can use."""
        content = self._file.read_bytes() if self._file.is_file() else b""
        cache = config.create_timing_cache(content)
        if content and (cache is None or not config.set_timing_cache(cache, False)):
            report(f"{self._file} is not usable here and will be replaced")
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        elif not content:
            config.set_timing_cache(cache, False)
        return cache

    def save(self, cache: Any) -> None:
        """Writes it, whether or not the build succeeded."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write(self._file, bytes(memoryview(cache.serialize())))

    def note(self, key: str, seconds: float) -> float | None:
        """Seconds that a build was faster than the first of the same plan; None if it was the first."""
        try:
            first = json.loads(self._log.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            first = {}
        if key in first:
            return float(first[key]) - seconds
        write(self._log, json.dumps({**first, key: round(seconds, 2)}).encode())
        return None


def write(file: Path, content: bytes) -> None:
    """Writes a file at once: nobody ever reads half of it."""
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_bytes(content)
    os.replace(unfinished, file)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """The lock of the bundle's builder, which takes it with the library filelock; that is not installed where plans are
    built."""
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
