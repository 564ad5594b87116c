"""Replaces a folder as a whole: the new one is written beside the old one, then exchanged with it. Files that are not
ours stay.

target       what is replaced
unfinished   beside it, hidden: what is being written; after the exchange, what is being thrown away
replaced     beside it, hidden: where the old one is for a moment on file systems that cannot exchange two names
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from .errors import TargetError

AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2
"""Linux's and macOS's flags of a rename that exchanges two names at once."""


def link(source: str | Path, target: str | Path) -> None:
    """Makes `target` a hard link to `source`, or a copy if the file system has no hard links."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def files_of(folder: Path) -> Iterator[str]:
    """The names of all files in a folder, and of its empty folders with a / at the end. Links are not followed."""
    for place, folders, files in os.walk(folder):
        here = Path(place)
        linked = [name for name in folders if (here / name).is_symlink()]
        for name in [*files, *linked]:
            yield (here / name).relative_to(folder).as_posix()
        if not folders and not files and here != folder:
            yield here.relative_to(folder).as_posix() + "/"


def carry_over(old: Path, new: Path, ours: Callable[[str], bool], done: frozenset[str] = frozenset()) -> frozenset[str]:
    """Links files that are not ours from the old folder into the new one, except the names in `done`. If the new one
    has a file of that name, the old file gets another name beside it. Returns the names. TargetError for a device or a
    pipe that cannot be linked."""
    taken = [name for name in files_of(old) if not ours(name.rstrip("/")) and name not in done]
    for name in taken:
        target = new / name
        if name.endswith("/"):
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        _take(old / name, free_name(target, "kept"))
    return frozenset(taken)


def _take(source: Path, target: Path) -> None:
    kind = source.lstat().st_mode
    if stat.S_ISREG(kind) or stat.S_ISLNK(kind):
        link(source, target)
        return
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        raise TargetError(
            f"{source} is no plain file and cannot be kept in a new bundle ({error.strerror}); move it away"
        ) from error


def free_name(path: Path, word: str) -> Path:
    """`path`, or if that exists, the first of `path`.word, `path`.word-2, ... that does not."""
    names = itertools.chain(
        [path], (path.with_name(f"{path.name}.{word}{f'-{i}' if i > 1 else ''}") for i in itertools.count(1))
    )
    return next(name for name in names if not os.path.lexists(name))


def recover(target: Path, unfinished: Path, replaced: Path, ours: Callable[[str], bool] = lambda name: True) -> None:
    """Clears up after a killed builder. TargetError if a leftover folder holds a file that is not ours and that the
    target lacks."""
    if replaced.is_dir() and not replaced.is_symlink() and not os.path.lexists(target):
        replaced.rename(target)
    for leftover in (unfinished, replaced):
        if not os.path.lexists(leftover):
            continue
        if leftover.is_symlink() or not leftover.is_dir():
            raise TargetError(f"{leftover} is in the way: the builder writes a folder there; move it away")
        for name in files_of(leftover):
            if not ours(name.rstrip("/")) and not os.path.lexists(target / name):
                raise TargetError(
                    f"{leftover} holds {name}, which no builder wrote and {target} does not have; move it away"
                )
        shutil.rmtree(leftover, ignore_errors=True)


def swap(target: Path, unfinished: Path, replaced: Path, ours: Callable[[str], bool] = lambda name: True) -> None:
    """Puts `unfinished` in the place of `target`, atomically if the file system can, and keeps the files that are not
    ours."""
    if not os.path.lexists(target):
        unfinished.rename(target)
        return
    taken = carry_over(target, unfinished, ours)
    old = unfinished
    if not exchange(target, unfinished):
        old = replaced
        target.rename(replaced)
        unfinished.rename(target)
    carry_over(old, target, ours, taken)  # what came meanwhile
    shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders in one step. False if the system or file system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        return bool(library.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], ctypes.c_uint(RENAME_EXCHANGE)) == 0)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return bool(library.renamex_np(*names, ctypes.c_uint(RENAME_SWAP)) == 0)
    return False
