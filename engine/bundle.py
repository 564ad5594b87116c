"""Bundles: a folder with the graphs of one model, and the manifest that says what they are.

    <name>/manifest.json            format, source, precision, shapes, scheduler, verification, SHA-256 of every file
    <name>/tokenizer/tokenizer.json
    <name>/onnx/<component>.onnx    and <component>.onnx.data

The manifest is read and checked before any other file is touched.
"""
from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .contract import COMPONENTS, Range, Shapes
from .errors import BundleNotFoundError, HashMismatchError, ManifestError, ManifestVersionError, MissingFileError, UnsafePathError

FORMAT = 2
"""Version of the manifest. It changes whenever an older runtime would misread a newer bundle."""

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens around a text: SD 1.x pads with the end token, SD 2.x with 0."""

    start: int
    end: int
    pad: int


@dataclass(frozen=True)
class Bundle:
    """A bundle whose manifest has been checked. `manifest` is its whole content, for what has no attribute here."""

    folder: Path
    manifest: Mapping[str, Any]
    name: str
    precision: str
    shapes: Shapes
    scheduler: Mapping[str, Any]
    special_tokens: SpecialTokens

    @classmethod
    def open(cls, folder: str | Path, verify: bool = True) -> Bundle:
        """Reads and checks the bundle in `folder`.

        `verify` computes the SHA-256 of every file (about a second for each 2 GB); without it only names and sizes are
        compared. Raises BundleNotFoundError, ManifestError, ManifestVersionError, UnsafePathError, MissingFileError or
        HashMismatchError.
        """
        folder = Path(folder)
        manifest = _read_manifest(folder)
        for name, expected in _entries(manifest, "files").items():
            _check_file(folder, name, expected, verify)
        return _from_manifest(folder, manifest)

    @property
    def graphs(self) -> dict[str, Path]:
        """The ONNX file of each component; its weights lie beside it."""
        return {component: self.folder / self.manifest["components"][component]["onnx"] for component in COMPONENTS}

    @property
    def tokenizer_file(self) -> Path:
        return self.folder / self.manifest["tokenizer"]["file"]


def _repair(folder: Path) -> str:
    return f"build it again: python build_engines.py [MODEL] --output {folder.parent}"


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not folder.is_dir():
        raise BundleNotFoundError(f"there is no bundle at {folder}; {_repair(folder)}")
    if not file.is_file():
        raise BundleNotFoundError(f"{folder} has no {MANIFEST}, so it is not a finished bundle; {_repair(folder)}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ManifestError(f"{file} is not readable ({error}); {_repair(folder)}") from error
    if not isinstance(manifest, dict):
        raise ManifestError(f"{file} holds a {type(manifest).__name__}, not an object; {_repair(folder)}")
    version = manifest.get("format")
    if version != FORMAT:
        age = "a newer" if isinstance(version, int) and version > FORMAT else "another"
        cure = "update LatentRT, or " if age == "a newer" else ""
        raise ManifestVersionError(f"{file} has format {version!r}, {age} one than this version reads ({FORMAT}); {cure}{_repair(folder)}")
    return manifest


def _entries(manifest: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = manifest.get(key)
    if not isinstance(value, dict):
        raise ManifestError(f"the manifest's {key!r} is {value!r}, not an object; build the bundle again")
    return value


def _check_file(folder: Path, name: str, expected: Any, verify: bool) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or ":" in name or ".." in parts:
        raise UnsafePathError(f"the manifest in {folder} names {name!r}, which is not a plain path inside the bundle; do not use this bundle")
    file = folder
    for part in parts:
        file = file / part
        if file.is_symlink():
            raise UnsafePathError(f"{file} is a symbolic link; a bundle holds plain files only. Do not use this bundle")
    if not file.is_file():
        raise MissingFileError(f"{file} is missing; {_repair(folder)}")
    if not isinstance(expected, dict) or not {"sha256", "bytes"} <= expected.keys():
        raise ManifestError(f"the manifest in {folder} has no size and SHA-256 for {name}; {_repair(folder)}")
    size = file.stat().st_size
    if size != expected["bytes"]:
        raise HashMismatchError(f"{file} has {size} bytes instead of {expected['bytes']}; {_repair(folder)}")
    if verify and (actual := sha256(file)) != expected["sha256"]:
        raise HashMismatchError(f"{file} has SHA-256 {actual[:12]}... instead of {expected['sha256'][:12]}...; {_repair(folder)}")


def _from_manifest(folder: Path, manifest: Mapping[str, Any]) -> Bundle:
    files = manifest["files"]
    try:
        named = [manifest["components"][component]["onnx"] for component in COMPONENTS] + [manifest["tokenizer"]["file"]]
        shapes = Shapes(**{side: Range(*manifest["shapes"][side]) for side in ("height", "width", "batch")})
        tokenizer = manifest["tokenizer"]
        bundle = Bundle(folder, manifest, manifest["name"], manifest["precision"], shapes, manifest["scheduler"],
                        SpecialTokens(tokenizer["start"], tokenizer["end"], tokenizer["pad"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ManifestError(f"{folder / MANIFEST} lacks or garbles {error}; {_repair(folder)}") from error
    for name in named:
        if name not in files:
            raise ManifestError(f"{folder / MANIFEST} uses {name!r} without a SHA-256 for it; {_repair(folder)}")
    return bundle


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
