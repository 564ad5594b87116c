"""How bundles and plans are built: clear up after a killed builder, build a new folder beside the old one, keep what is
unchanged, and exchange the two."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .folders import link, recover, swap

Report = Callable[[str], None]
"""Prints a line about the progress of a build."""


class Replacement:
    """A new folder for `target`. The old one stays until `swap`. Its files that are not `ours` stay after that too."""

    def __init__(self, target: Path, ours: Callable[[str], bool], unfinished: str = "building") -> None:
        self.target, self._ours = target, ours
        self._unfinished, self._replaced = beside(target, unfinished), beside(target, "replaced")

    def recover(self) -> None:
        """Clears up after a killed builder. TargetError if something else is in the way."""
        recover(self.target, self._unfinished, self._replaced, self._ours)

    @contextmanager
    def begin(self) -> Iterator[Path]:
        """The new folder, empty. It is removed at the end of the block, unless `swap` has put it in the target's
        place."""
        try:
            self._unfinished.mkdir(parents=True)
            yield self._unfinished
        finally:
            shutil.rmtree(self._unfinished, ignore_errors=True)

    def swap(self, ours: Callable[[str], bool] | None = None) -> None:
        """Puts the new folder in the target's place. `ours` replaces the constructor's, if more is known by now."""
        swap(self.target, self._unfinished, self._replaced, ours or self._ours)


def beside(target: Path, state: str) -> Path:
    """The hidden folder beside a target for that state of its building."""
    return target.with_name(f".{target.name}.{state}")


def keep(names: Iterable[str], old: Path, new: Path) -> None:
    """Links unchanged files from one folder into another; copies them if the file system has no hard links."""
    for name in names:
        (new / name).unlink(missing_ok=True)
        link(old / name, new / name)
