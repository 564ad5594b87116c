"""manifest.json: what it must hold, field by field. Nothing of a bundle is used before all of it has been checked.

format            2
name              what the bundle is called
source            {kind, id, path?, options?}: which model it was built from, and with which of the builder's options
                  for a model
precision         "fp32", "fp16" or "bf16"
shapes            height, width (pixels) and batch, each [min, opt, max]
scheduler         the model's scheduler_config.json, which `Schedule.from_config` checks
components        for each: onnx, and what the builder notes besides
tokenizer         file, and the ids of the start, end and padding tokens
verification      done, and if so backend, precision, components and picture; else the reason
openvino          precision of each component there; only where the builder measured it
files             SHA-256 and size of every other file of the bundle
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from .contract import COMPONENTS, VAE_FACTOR, Range, Shapes
from .errors import BundleNotFoundError, ManifestError, ManifestVersionError, UnsafePathError

FORMAT = 2
"""Version of the manifest. It changes whenever an older runtime would misread a newer bundle."""

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer/tokenizer.json"

PRECISIONS = ("fp32", "fp16", "bf16")
SOURCE_OPTIONS = ("tokenizer", "prediction-type", "scheduler")
OPENVINO_PRECISIONS = ("fp32", "bf16")

SMALLEST_SIDE, LARGEST_SIDE, LARGEST_BATCH = 16, 16384, 1024
"""Pixels, and pictures in one call. A side of 16 is four latents, which is the least that torch draws as a block."""

LARGEST_MANIFEST = 1 << 24
"""Bytes. A manifest has some kilobytes."""

LONGEST_NAME = 255
"""Bytes of one part of a path: more than file systems take."""

SHA256 = re.compile(r"[0-9a-f]{64}")


class Field:
    """A value of a manifest and the way to it. The methods return it in the type that is asked for, or raise
    ManifestError."""

    def __init__(self, value: Any, path: str = "") -> None:
        self.value, self._path = value, path

    def fail(self, rule: str) -> ManifestError:
        """The error for a value that breaks `rule`."""
        shown = (
            json.dumps(self.value, default=repr)
            if not isinstance(self.value, int) or abs(self.value) < 10**20
            else "a huge integer"
        )
        return ManifestError(
            f"{self._path or 'the whole'} is {shown if len(shown) <= 80 else shown[:77] + '...'}; it must be {rule}"
        )

    def object(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.fail("an object")
        return self.value

    def __getitem__(self, key: str) -> Field:
        """The field of that name in an object."""
        path = f"{self._path}.{key}" if self._path else key
        fields = self.object()
        if key not in fields:
            raise ManifestError(f"{path} is missing")
        return Field(fields[key], path)

    def __contains__(self, key: str) -> bool:
        return key in self.object()

    def items(self) -> list[tuple[str, Field]]:
        return [(key, self[key]) for key in self.object()]

    def text(self, allowed: tuple[str, ...] = ()) -> str:
        """A string that is not empty, one of `allowed` where some are given."""
        if not isinstance(self.value, str) or (allowed and self.value not in allowed):
            raise self.fail(f"one of {', '.join(map(repr, allowed))}" if allowed else "a string")
        if not self.value or len(self.value) > 4096:
            raise self.fail("a string of 1 to 4096 characters")
        return self.value

    def integer(self, low: int, high: int) -> int:
        if not isinstance(self.value, int) or isinstance(self.value, bool) or not low <= self.value <= high:
            raise self.fail(f"an integer from {low} to {high}")
        return self.value

    def number(self) -> float:
        if not isinstance(self.value, (int, float)) or isinstance(self.value, bool) or not math.isfinite(self.value):
            raise self.fail("a finite number")
        return float(self.value)

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.fail("true or false")
        return self.value

    def range(self, low: int, high: int, multiple: int = 1) -> Range:
        """[min, opt, max]."""
        if not isinstance(self.value, list) or len(self.value) != 3:
            raise self.fail("a list of three integers, min, opt and max")
        smallest, best, largest = (
            Field(value, f"{self._path}[{i}]").integer(low, high) for i, value in enumerate(self.value)
        )
        if not smallest <= best <= largest or any(side % multiple for side in (smallest, best, largest)):
            raise self.fail(f"min <= opt <= max, each a multiple of {multiple}")
        return Range(smallest, best, largest)


def read(folder: Path) -> dict[str, Any]:
    """The checked content of `folder`/manifest.json. BundleNotFoundError, ManifestError, ManifestVersionError or
    UnsafePathError say what is wrong, without saying how it is mended."""
    manifest = parse(folder)
    version = manifest.get("format")
    if version != FORMAT or isinstance(version, bool):
        raise _other_version(folder / MANIFEST, version)
    try:
        check(Field(manifest))
    except ManifestError as error:
        raise ManifestError(f"{folder / MANIFEST} is not right: {error}") from error
    return manifest


def parse(folder: Path) -> dict[str, Any]:
    """The JSON object in `folder`/manifest.json, unchecked."""
    file = folder / MANIFEST
    try:
        if not folder.is_dir():
            raise BundleNotFoundError(
                f"there is no bundle at {shorten(folder)}" + (", which is no folder" if folder.exists() else "")
            )
    except PermissionError as error:
        raise BundleNotFoundError(
            f"{shorten(folder)} cannot be looked at (Permission denied); allow it: chmod u+rx {folder.parent}"
        ) from error
    except OSError as error:  # too long, links that go round in a circle
        raise BundleNotFoundError(f"there is no bundle at {shorten(folder)} ({error.strerror})") from error
    try:
        if file.is_symlink():
            raise UnsafePathError(f"{file} is a symbolic link; a bundle holds plain files only. Do not use this bundle")
        if not file.is_file():
            raise BundleNotFoundError(f"{folder} has no {MANIFEST}, so it is not a finished bundle")
        if file.stat().st_size > LARGEST_MANIFEST:
            raise ManifestError(f"{file} has more than {LARGEST_MANIFEST} bytes, so it is no manifest of a bundle")
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except PermissionError as error:
        raise ManifestError(
            f"{error.filename or file} cannot be read (Permission denied); let this user read it: chmod -R u+rX "
            f"{folder}"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ManifestError(f"{shorten(file)} is not readable ({error})") from error
    if not isinstance(manifest, dict):
        raise ManifestError(f"{file} holds a {type(manifest).__name__}, not an object")
    return manifest


def shorten(path: Path | str) -> str:
    """A path as messages show it: not more than a line or two of it."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


def _other_version(file: Path, version: Any) -> ManifestVersionError:
    if isinstance(version, int) and not isinstance(version, bool) and FORMAT < version < 10**6:
        return ManifestVersionError(
            f"{file} has format {version}, a newer one than this version reads ({FORMAT}); update LatentRT"
        )
    shown = version if isinstance(version, int) and abs(version) < 10**6 else type(version).__name__
    return ManifestVersionError(f"{file} has format {shown}, another one than this version reads ({FORMAT})")


def check(manifest: Field) -> None:
    """ManifestError or UnsafePathError for the first field that is not as the schema at the top of this file says."""
    manifest["name"].text()
    _check_source(manifest["source"])
    manifest["precision"].text(PRECISIONS)
    shapes(manifest)
    manifest["scheduler"].object()
    files = manifest["files"]
    for name, entry in files.items():
        _check_path(name)
        if not SHA256.fullmatch(entry["sha256"].text()):
            raise entry["sha256"].fail("a SHA-256 of 64 hexadecimal digits")
        entry["bytes"].integer(0, 1 << 50)
    for component in COMPONENTS:
        manifest["components"][component]["onnx"].text((graph_file(component),))
        _require_hash(files, graph_file(component))
        if "opset" in manifest["components"][component]:
            manifest["components"][component]["opset"].integer(1, 1000)
    tokenizer = manifest["tokenizer"]
    tokenizer["file"].text((TOKENIZER,))
    _require_hash(files, TOKENIZER)
    for token in ("start", "end", "pad"):
        tokenizer[token].integer(0, 2**31 - 1)
    _check_verification(manifest["verification"])
    if "openvino" in manifest:
        for component, precision in manifest["openvino"]["precision"].items():
            if component not in COMPONENTS:
                raise manifest["openvino"]["precision"].fail(f"about {', '.join(COMPONENTS)} only")
            precision.text(OPENVINO_PRECISIONS)


def shapes(manifest: Field) -> Shapes:
    """The sizes that a bundle is for."""
    sides = {
        side: manifest["shapes"][side].range(SMALLEST_SIDE, LARGEST_SIDE, VAE_FACTOR) for side in ("height", "width")
    }
    return Shapes(**sides, batch=manifest["shapes"]["batch"].range(1, LARGEST_BATCH))


def graph_file(component: str) -> str:
    """Where a component's graph lies in a bundle; its weights lie beside it, in a file of that name with `.data`
    behind."""
    return f"onnx/{component}.onnx"


def own_files() -> frozenset[str]:
    """Every file that the builder may write into a bundle, besides the plans."""
    graphs = [graph_file(component) for component in COMPONENTS]
    return frozenset([MANIFEST, TOKENIZER, "verification.png", *graphs, *(f"{name}.data" for name in graphs)])


def _check_source(source: Field) -> None:
    for name in ("kind", "id", *(("path",) if "path" in source else ())):
        source[name].text()
    for name, value in source["options"].items() if "options" in source else []:
        if name not in SOURCE_OPTIONS:
            raise source["options"].fail(f"about {', '.join(SOURCE_OPTIONS)} only")
        value.text()


def _check_verification(verification: Field) -> None:
    if not verification["done"].boolean():
        return
    picture = verification["picture"]
    for name in ("latents_max_abs", "pixels_within_1", "psnr_db"):
        picture[name].number()
    for name in ("steps", "seed"):
        picture[name].integer(0, 2**64)
    picture["scheduler"].text()


def _check_path(name: str) -> None:
    """UnsafePathError for a name that is not a plain path inside a bundle."""
    parts = PurePosixPath(name).parts
    plain = bool(parts) and not name.startswith("/") and ".." not in parts and not re.search(r"[\\:\x00-\x1f]", name)
    try:
        short = all(len(part.encode()) <= LONGEST_NAME for part in parts)
    except UnicodeEncodeError:
        plain = short = False
    if not plain or not short:
        raise UnsafePathError(
            f"the manifest names {shorten(name)!r}, which is not a plain path inside the bundle; do not use this bundle"
        )


def _require_hash(files: Field, name: str) -> None:
    if name not in files:
        raise ManifestError(f"files has no SHA-256 for {name!r}, which is used")


def is_ours(manifest: Mapping[str, Any]) -> bool:
    """Whether a JSON object is a manifest of a bundle, right or garbled, and not some other manifest.json."""
    return "format" in manifest and {"components", "files"} & manifest.keys() != set()
