"""Checks disk space, and turns errors of the file system into named errors."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import OutputError


def require_disk(folder: Path, needed: int) -> None:
    """OutputError if a component of `needed` bytes does not fit on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if free < 1.1 * needed:
        raise OutputError(
            f"{folder.parent} has {megabytes(free)} free; the next component needs {megabytes(needed)}. Free some, or "
            "pass another --output"
        )


def megabytes(count: int) -> str:
    """A number of bytes as text, for example "1.2 GB"."""
    unit, name = next(((size, name) for size, name in ((1e9, "GB"), (1e6, "MB")) if count >= size), (1e3, "kB"))
    return f"{count / unit:.1f} {name}"


@contextmanager
def as_output_errors(output: Path) -> Iterator[None]:
    """Turns OSErrors into OutputErrors that name the file and what to do."""
    try:
        yield
    except OSError as error:
        file = Path(os.fsdecode(error.filename)) if isinstance(error.filename, (str, bytes, os.PathLike)) else output
        if error.errno == errno.ENOSPC:
            raise OutputError(
                f"the disk of {output} is full; nothing was changed. Free some space, or pass another --output"
            ) from error
        if error.errno == errno.EFBIG:
            raise OutputError(
                f"{output} may not take files of that size (ulimit -f); nothing was changed. Raise it, or pass another "
                "--output"
            ) from error
        inside = output.absolute() in [file.absolute(), *file.absolute().parents]
        cure = "pass another --output" if inside else "let this user read it"
        raise OutputError(
            f"{file} cannot be {'written or read' if inside else 'read'} ({error.strerror or error}); {cure}"
        ) from error
