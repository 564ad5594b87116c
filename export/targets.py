"""Decides where a bundle may be written. The user's files and other models' bundles are never overwritten or
removed."""

from __future__ import annotations

import os
import shlex
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from engine.errors import BundleError, ManifestError
from engine.manifest import MANIFEST, Origin, claimed_origin, holds_graphs, is_ours, named_files, parse

from .errors import OutputError, TargetError

SECONDS_BETWEEN_NOTES = 60
HOLDER = "process "
"""The beginning of our lock file while the lock is held."""


@dataclass(frozen=True)
class There:
    """The bundle at a target: the files that its manifest names, the model that it was built from, and the reason if
    its manifest cannot be read."""

    named: frozenset[str] = frozenset()
    source: Mapping[str, Any] | None = None
    broken: str = ""


def place(output: Path, name: str, inputs: Sequence[Path]) -> Path:
    """The folder of the bundle `name` in `output`. `output` is created, and a link is followed. TargetError if the
    folder is, holds or lies in something that the model is read from."""
    target = output / name
    try:
        target = target.resolve() if target.is_symlink() else target
        for path in inputs:
            _refuse_overlap(target, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target) and not target.is_dir():
            raise TargetError(f"{target} exists and is not a folder; pass another --name or --output, or move it away")
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # no permission; a NUL in the name; links that go round in a circle
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(f"{target} cannot be made ({reason}); pass another --output") from error
    return target


def _refuse_overlap(target: Path, read: Path) -> None:
    one, other = target.resolve(), read.resolve()
    same = one == other or (one.exists() and other.exists() and os.path.samefile(one, other))
    if same or one in other.parents or other in one.parents:
        how = "is" if same else "holds" if one in other.parents else "lies in"
        raise TargetError(
            f"the bundle would be written to {target}, which {how} what the model is read from ({read}); pass another "
            "--output, or --name NAME"
        )


def examine(target: Path) -> There:
    """TargetError unless the target is free, empty or a bundle."""
    if not target.is_dir() or not any(target.iterdir()):
        return There()
    try:
        content = parse(target)
    except ManifestError as error:
        if isinstance(error.__cause__, PermissionError):
            raise TargetError(str(error)) from error
        if holds_graphs(target):
            return There(broken=str(error))
        raise _not_ours(target) from error
    except BundleError as error:
        raise _not_ours(target) from error
    if not is_ours(content):
        raise _not_ours(target)
    named = named_files(content)
    if named is None:
        return There(broken=f"{target / MANIFEST} does not say which files are its own")
    return There(named, claimed_origin(content))


def _not_ours(target: Path) -> TargetError:
    return TargetError(
        f"{target} is not empty, and no {MANIFEST} there says that it is a bundle, so it stays as it is; pass another "
        "--name or --output"
    )


def require_same_model(target: Path, there: There, source: Origin, report: Callable[[str], None]) -> None:
    """TargetError if the bundle at the target belongs to another model: one of another kind, name or place with other
    weights."""
    old = there.source
    if old is None or all(old.get(key, getattr(source, key)) == getattr(source, key) for key in ("kind", "id", "path")):
        return
    if old.get("weights") == source.weights:
        report(
            f"{target} was built from {old.get('path') or old.get('id')}; {source.path or source.id} has the "
            "same weights and takes its place"
        )
        return
    raise TargetError(
        f"{target} is the bundle of another model ({old.get('kind')} {old.get('path') or old.get('id')}); give this "
        f"one another name with --name, or move that one away: mv {shlex.quote(str(target))} "
        f"{shlex.quote(f'{target}.old')}"
    )


@contextmanager
def locked(target: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Keeps two builders of one bundle apart. The waiting one reports which process it waits for."""
    file = target.with_name(f".{target.name}.lock")
    if os.path.lexists(file) and (file.is_symlink() or not file.is_file() or not _is_lock(file)):
        raise TargetError(f"{file} is in the way: the builder keeps its lock there; move it away")
    lock = FileLock(file)
    while not lock.is_locked:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            holder = file.read_text(encoding="utf-8", errors="replace")
            report(
                f"waiting for another builder of {target}"
                + (f": {holder.strip()}" if holder.startswith(HOLDER) else "")
            )
            try:
                lock.acquire(timeout=SECONDS_BETWEEN_NOTES)
            except Timeout:
                continue
    try:
        file.write_text(
            f"{HOLDER}{os.getpid()} on {socket.gethostname()}, since {time.strftime('%H:%M:%S')}\n", encoding="utf-8"
        )
        yield
        file.write_text("", encoding="utf-8")
    finally:
        lock.release()


def _is_lock(file: Path) -> bool:
    content = file.read_bytes()[: len(HOLDER)]
    return not content or content == HOLDER.encode()
