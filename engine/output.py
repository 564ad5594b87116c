"""Files for pictures: which names are allowed, what may be replaced, and how a picture is written whole or not at
all."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import OutputFileError, OutputPathError


@dataclass(frozen=True)
class Format:
    """A file format: Pillow's name for saving, the feature of Pillow that it needs, and the options of saving."""

    name: str
    feature: str
    options: Mapping[str, Any] = field(default_factory=dict)


FORMATS = {
    ".png": Format("PNG", "zlib"),
    ".jpg": Format("JPEG", "jpg", {"quality": 95}),
    ".jpeg": Format("JPEG", "jpg", {"quality": 95}),
    ".webp": Format("WEBP", "webp", {"lossless": True}),
}
"""By the extension of a file's name, in lower case."""

ALLOWED = "pass a name that ends in .png, .jpg, .jpeg or .webp"

KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link that leads to itself",
}
"""What a picture never replaces."""


def check_output(output: str, count: int) -> list[Path]:
    """The files for `count` pictures: `output` itself for one, numbered from 0 for several. As far as can be known,
    each can be written.

    OutputPathError for names that are not allowed and for targets that are never replaced. OutputFileError if the
    folder is missing or not writable.
    """
    file = _plain_path(output)
    several = count > 1 and file.suffix.lower() in FORMATS
    files = [file.with_stem(f"{file.stem}-{i}") for i in range(count)] if several else [file]
    targets: dict[Path, Path] = {}
    for file in files:
        other = targets.setdefault(find_target(file), file)
        if other != file:
            raise OutputPathError(
                f"{other} and {file} are the same file, and would get two pictures; pass another --output"
            )
    _check_encoder(FORMATS[file.suffix.lower()])
    return files


def _plain_path(output: str) -> Path:
    if output == "-":
        raise OutputPathError(f"--output - would be standard output, where no picture is written; {ALLOWED}")
    if "\0" in output:
        raise OutputPathError(f"--output {output!r} holds a NUL character, which no file's name can; {ALLOWED}")
    try:
        os.fsencode(output)
    except UnicodeEncodeError as error:
        raise OutputPathError(f"--output {output!r} is not valid Unicode; {ALLOWED}") from error
    with suppress(RuntimeError):  # no user of that name: the file is called ~something
        output = os.path.expanduser(output)
    if Path(output).name in ("", "..") or output.endswith(os.sep):
        raise OutputPathError(f"--output {output!r} names no file; {ALLOWED}")
    return Path(output)


def _check_encoder(wanted: Format) -> None:
    from PIL import features

    if not features.check(wanted.feature):
        raise OutputPathError(f"Pillow was installed without {wanted.name} here; pass an --output that ends in .png")


def find_target(file: Path) -> Path:
    """The file that a picture called `file` is written to: itself, or the target of a symbolic link. Raises the errors
    of `check_output`."""
    target = Path(os.path.realpath(file))
    link = f" (a symbolic link to {target})" if os.path.islink(file) else ""
    kind = _kind(file, target)
    if kind is not None and kind != stat.S_IFREG:
        raise OutputPathError(f"{file}{link} is {KINDS.get(kind, 'no regular file')} and is not replaced; {ALLOWED}")
    if file.suffix.lower() not in FORMATS:
        extension = f"the extension {file.suffix!r} is no format of pictures" if file.suffix else "it has no extension"
        raise OutputPathError(f"--output {str(file)!r} does not say which format: {extension}; {ALLOWED}")
    folder = target.parent
    if not os.path.isdir(folder):
        raise OutputFileError(
            f"{file}{link} cannot be written: {folder} is not a folder; make it, or pass another --output"
        )
    for place in (folder, target):
        if os.path.lexists(place) and not os.access(place, os.W_OK):
            raise OutputFileError(
                f"{file}{link} cannot be written: {place} {_why_not_writable(place)}; pass another --output"
            )
    return target


def _kind(file: Path, target: Path) -> int | None:
    """The file type bits of the target's mode. None if nothing is there."""
    try:
        return stat.S_IFMT(os.lstat(target).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise OutputFileError(f"{str(file)!r} cannot be written ({error.strerror}); pass another --output") from error


def _why_not_writable(place: Path) -> str:
    with suppress(OSError):
        if os.statvfs(place).f_flag & os.ST_RDONLY:
            return "is on a read-only file system"
    return "is write-protected"


def write_picture(image: Any, file: Path) -> None:
    """Writes a PIL image in the format of the file's extension. A temporary file is renamed at the end, so a failure
    leaves the old file. A symbolic link stays, and its target is written. Raises the errors of `check_output`."""
    target = find_target(file)
    unfinished = target.with_name(f".{target.name[:50]}.{os.getpid()}.tmp")
    wanted = FORMATS[file.suffix.lower()]
    try:
        unfinished.unlink(missing_ok=True)  # of a killed process that had this number
        with open(unfinished, "xb") as stream:
            image.save(stream, format=wanted.name, **wanted.options)
        if target.exists():
            shutil.copymode(target, unfinished)
        os.replace(unfinished, target)
    except (OSError, ValueError) as error:  # Pillow raises ValueError for what a format cannot hold
        raise OutputFileError(
            f"{file} cannot be written ({getattr(error, 'strerror', None) or error}); pass another --output"
        ) from error
    finally:
        with suppress(OSError):
            unfinished.unlink()
