"""A folder is replaced as a whole: written beside the old one, then renamed into its place."""
from __future__ import annotations

import os
import shutil
from pathlib import Path


def link(source: str | Path, target: str | Path) -> None:
    """The same file in another place: a hard link where the file system has them, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def recover(target: Path, unfinished: Path, replaced: Path) -> None:
    """Clears up after a builder that was killed."""
    if replaced.exists() and not target.exists():
        replaced.rename(target)
    for leftover in (unfinished, replaced):
        shutil.rmtree(leftover, ignore_errors=True)


def swap(target: Path, unfinished: Path, replaced: Path) -> None:
    """Puts `unfinished` in the place of `target`, which is `replaced` for a moment."""
    if target.exists():
        target.rename(replaced)
    unfinished.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)
