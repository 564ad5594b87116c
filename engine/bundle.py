"""Bundles: a folder with the graphs of one model, and the manifest that says what they are.

    <name>/manifest.json            what engine/manifest.py says
    <name>/tokenizer/tokenizer.json   for models with texts, and embeddings.npy: the vectors of the tokens
    <name>/onnx/<component>.onnx    and <component>.onnx.data

The manifest is read and checked before any other file is touched. If a builder replaces the bundle during loading,
loading starts again.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from .commands import build_again, build_anything
from .contract import Family, Range, Shapes
from .errors import (
    BackendError,
    BundleChangedError,
    BundleError,
    BundleNotFoundError,
    HashMismatchError,
    ManifestError,
    MissingFileError,
    UnsafePathError,
)
from .manifest import FORMAT, MANIFEST, TOKEN_TABLE, TOKENIZER, File, Manifest, SpecialTokens, own_files, read
from .sampling.schedule import Schedule, noising

__all__ = ["FORMAT", "MANIFEST", "Bundle", "SpecialTokens", "sha256", "while_replaced"]

SECONDS_OF_SWAPPING = 10.0
"""For how long loading is tried again while the bundle is being replaced. Replacing takes milliseconds."""

GRAPHS = "onnx/"
"""The folder of the files that libraries map."""

T = TypeVar("T")


class Seal(NamedTuple):
    """The properties of a file that change when it is replaced or written to."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, status: os.stat_result) -> Seal:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest has been checked. `manifest` is the JSON, `contents` the same as a dataclass.

    `seals` describes each file as it was when its hash was computed, so a file that has changed since is not used."""

    folder: Path
    manifest: Mapping[str, Any]
    contents: Manifest
    seals: dict[str, Seal]

    @classmethod
    def open(cls, folder: str | os.PathLike[str], verify: bool = True) -> Bundle:
        """Reads and checks the bundle in `folder`, where `~` is the user's home.

        `verify` computes the SHA-256 of every file (about a second for each 2 GB); without it only names and sizes are
        compared. Raises BundleNotFoundError, ManifestError, ManifestVersionError, UnsafePathError, MissingFileError or
        HashMismatchError.
        """
        path = as_path(folder)
        return while_replaced(path, lambda: cls._open(path, verify))

    @classmethod
    def _open(cls, folder: Path, verify: bool) -> Bundle:
        try:
            manifest = read(folder)
        except BundleError as error:
            raise type(error)(f"{error}{_several(folder)}; build it again: {build_anything(folder)}") from error
        contents = Manifest.of(manifest)
        try:
            seals = _check_files(folder, contents, verify)
        except UnsafePathError:
            raise
        except BundleError as error:
            raise type(error)(f"{error}; build it again: {build_again(folder, contents)}") from error
        return cls(folder, manifest, contents, seals)

    @property
    def name(self) -> str:
        return self.contents.name

    @property
    def family(self) -> Family:
        return self.contents.family

    @property
    def precision(self) -> str:
        return self.contents.precision

    @property
    def shapes(self) -> Shapes:
        return self.contents.shapes

    @property
    def scheduler(self) -> Mapping[str, Any]:
        return self.contents.scheduler

    def schedule(self) -> Schedule:
        """The model's noise and its own sampler's options. SchedulerConfigError if they cannot be used."""
        return Schedule.from_config(self.scheduler, self.family)

    def low_resolution(self) -> tuple[Schedule, int] | None:
        """For an upscaler: the noise that it adds to what it makes larger, and the highest level of that.
        SchedulerConfigError if it cannot be used."""
        given = self.contents.low_resolution
        return None if given is None else (noising(given.scheduler), given.max_noise_level)

    @property
    def special_tokens(self) -> SpecialTokens:
        """Those of a model with texts."""
        assert self.contents.tokenizer is not None
        return self.contents.tokenizer

    @property
    def graphs(self) -> dict[str, Path]:
        """The ONNX file of each component of the bundle. Its weights lie beside it."""
        return {component: self.folder / graph.onnx for component, graph in self.contents.components.items()}

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / TOKENIZER

    @property
    def token_table_file(self) -> Path:
        return self.folder / TOKEN_TABLE

    def command(self, **sizes: Range) -> str:
        """The command that builds this bundle for other `sizes` (height, width, batch)."""
        return build_again(self.folder, self.contents, sizes)

    def recheck(self, component: str) -> None:
        """BundleChangedError unless the files of a component are those that were checked when the bundle was opened.
        Files whose seal is the same are not read; others are, and their SHA-256 must be the manifest's."""
        for name in self.contents.files_of(component):
            self._recheck(name, replaced_too=True)

    def recheck_tokenizer(self) -> None:
        """The same for the tokenizer's files."""
        for name in (TOKENIZER, TOKEN_TABLE):
            self._recheck(name, replaced_too=True)

    def recheck_in_place(self) -> None:
        """BundleChangedError if a file that is mapped was written to. Files that were replaced or deleted do not
        matter: what is mapped stays as it was."""
        for name in self.seals:
            if name.startswith(GRAPHS) or name == TOKEN_TABLE:
                self._recheck(name, replaced_too=False)

    def _recheck(self, name: str, replaced_too: bool) -> None:
        sealed = self.seals[name]
        try:
            found = Seal.of(os.stat(f"{self.folder}/{name}"))  # a string: it is done for every file of every call
        except OSError as error:
            if not replaced_too:
                return
            raise self._changed(self.folder / name) from error
        if found == sealed or (not replaced_too and (found.device, found.inode) != (sealed.device, sealed.inode)):
            return
        file = self.folder / name
        if sha256(file) != self.contents.files[name].sha256:
            raise self._changed(file)
        self.seals[name] = found

    def _changed(self, file: Path) -> BundleChangedError:
        return BundleChangedError(
            f"{file} is no longer the file that was loaded: the bundle was replaced, changed or deleted. "
            "Load it again: "
            f"Pipeline.load({str(self.folder)!r})"
        )


def as_path(folder: Any) -> Path:
    """The user's argument as a path. BundleNotFoundError if it is no path."""
    if isinstance(folder, bytes) or not isinstance(folder, (str, os.PathLike)):
        kind = type(folder).__name__
        raise BundleNotFoundError(
            f"the folder of a bundle is {'None' if folder is None else f'a value of type {kind}'}; pass a string or a "
            "path, for "
            f"example 'engines/demo'"
        )
    try:
        return Path(folder).expanduser()
    except (RuntimeError, TypeError) as error:  # no such user's home; a path of bytes
        raise BundleNotFoundError(f"there is no folder {os.fspath(folder)!r} ({error})") from error


def while_replaced(folder: Path, load: Callable[[], T]) -> T:
    """The result of `load`, which is called again if it failed because a builder was replacing the bundle in
    `folder`."""
    until = time.monotonic() + SECONDS_OF_SWAPPING
    while True:
        before = _identity(folder)
        try:
            return load()
        except (BundleError, BackendError):
            swapping = (
                before is None
                and folder.name != ""
                and _identity(folder.with_name(f".{folder.name}.replaced")) is not None
            )
            if time.monotonic() > until or (_identity(folder) == before and not swapping):
                raise
        time.sleep(0.01)


def _identity(folder: Path) -> tuple[int, int] | None:
    try:
        status = folder.stat()
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _several(folder: Path) -> str:
    """The hint for a `folder` that holds bundles and is none itself."""
    try:
        found = sorted(file.parent.name for file in folder.glob(f"[!.]*/{MANIFEST}"))
    except (OSError, ValueError, RecursionError):
        found = []
    return (
        f" (it holds the bundles {', '.join(found[:5])}{' and others' if len(found) > 5 else ''}: pass "
        f"{folder / found[0]})"
        if found
        else ""
    )


def _check_files(folder: Path, contents: Manifest, verify: bool) -> dict[str, Seal]:
    """The seal of every file that the manifest names, after its size and hash were compared with the manifest's. All
    files are opened before the first is read, so they belong together even if the bundle is replaced meanwhile."""
    seals: dict[str, Seal] = {}
    with ExitStack() as opened:
        streams = {name: opened.enter_context(_open(folder, name)) for name in contents.files}
        _refuse_files_without_hash(folder, contents)
        for name, stream in streams.items():
            seals[name] = Seal.of(os.fstat(stream.fileno()))
            _check_file(folder / name, stream, seals[name].size, contents.files[name], verify)
    return seals


def _check_file(file: Path, stream: BinaryIO, size: int, expected: File, verify: bool) -> None:
    """HashMismatchError if a file is not the one that was built."""
    if size != expected.bytes:
        raise HashMismatchError(f"{file} has {size} bytes instead of {expected.bytes}")
    if verify and (actual := _digest(stream)) != expected.sha256:
        raise HashMismatchError(f"{file} has SHA-256 {actual[:12]}... instead of {expected.sha256[:12]}...")


def _open(folder: Path, name: str) -> BinaryIO:
    """Opens a file of the bundle. UnsafePathError if a symbolic link is on the way to it."""
    file = folder
    try:
        for part in name.split("/"):
            file = file / part
            if file.is_symlink():
                raise UnsafePathError(
                    f"{file} is a symbolic link; a bundle holds plain files only. Do not use this bundle"
                )
        if not stat.S_ISREG(file.stat().st_mode):
            raise MissingFileError(f"{file} is not a plain file")
        return open(file, "rb")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingFileError(f"{file} is missing") from error
    except PermissionError as error:
        raise MissingFileError(
            f"{file} cannot be read (Permission denied); let this user read it (chmod -R u+rX {folder})"
        ) from error
    except OSError as error:
        raise MissingFileError(f"{file} cannot be read ({error.strerror})") from error


def _refuse_files_without_hash(folder: Path, contents: Manifest) -> None:
    """ManifestError for weights that a library would read although the manifest does not name them."""
    for name in own_files(contents.family) - contents.files.keys():
        if name.startswith(GRAPHS) and (folder / name).exists():
            raise ManifestError(f"{folder / name} is there, and {MANIFEST} has no SHA-256 for it")


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open(file, "rb") as stream:
        return _digest(stream)


def _digest(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
