"""Reads and writes manifest.json. Only this file knows its keys. A bundle's content is reached through the `Manifest`,
and only after every field has been checked."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from .contract import JOINS, Family, Shapes
from .errors import BundleNotFoundError, ManifestError, ManifestVersionError, UnsafePathError
from .family import COMPONENTS, FAMILIES, KINDS, Traits
from .fields import Field

FORMAT = 6
"""Version of the manifest. It changes whenever an older runtime would misread a newer bundle.
3: names the family; the denoiser takes a timestep for each sample.
4: the denoiser takes `rescale`, and its state has five slots; models without texts have traits and no tokenizer.
6: the denoiser takes a mask; the text encoder takes vectors of tokens, which are in a file beside the tokenizer."""

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer/tokenizer.json"
TOKEN_TABLE = "tokenizer/embeddings.npy"
"""The vectors of the tokens [tokens, width], which the runtime looks up on the host."""

MOST_LAYERS = 1024
"""Of a text encoder."""

PICTURE = "verification.png"

PRECISIONS = ("fp32", "fp16", "bf16")
SOURCE_OPTIONS = ("tokenizer", "prediction-type", "scheduler", "vae", "ema", "lora")
OPENVINO_PRECISIONS = ("fp32", "bf16")

LARGEST_CHANNELS, LARGEST_FACTOR, LARGEST_CLASSES = 1024, 64, 1_000_000
"""What the traits of a family may be."""

SMALLEST_SIDE, LARGEST_SIDE, LARGEST_BATCH = 16, 16384, 1024
"""Pixels, and pictures in one call. 16 x 16 pixels are 4 channels of 2 x 2 latents: 16 numbers, the fewest that torch
draws as a block."""

LARGEST_MANIFEST = 1 << 24
"""Bytes. A manifest has some kilobytes."""

LONGEST_NAME = 255
"""Bytes of one part of a path, the limit of common file systems."""

SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Origin:
    """Which model a bundle was built from. kind: "built-in", "random", "folder", "file" or "hub". path: the model's
    folder or file. tokenizer, weights: hashes of what was read. options: the builder's options about the model, by
    name; one that was given several times has a line for each."""

    kind: str
    id: str
    path: str | None = None
    tokenizer: str | None = None
    weights: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, value: Field) -> Origin:
        texts = {name: value[name].text() for name in ("path", "tokenizer", "weights") if name in value}
        options = value["options"].items() if "options" in value else []
        for name, _ in options:
            if name not in SOURCE_OPTIONS:
                raise value["options"].fail(f"about {', '.join(SOURCE_OPTIONS)} only")
        given = {name: option.text() for name, option in options}
        return cls(value["kind"].text(), value["id"].text(), **texts, options=given)


@dataclass(frozen=True)
class Graph:
    """A component's graph: its file, the versions of ONNX, the seconds that it took to make, and a hash of everything
    that determines it."""

    onnx: str
    opset: int
    ir_version: int
    seconds: Mapping[str, float]
    fingerprint: str

    @classmethod
    def of(cls, component: str, value: Field) -> Graph:
        return cls(
            value["onnx"].text((graph_file(component),)),
            value["opset"].integer(1, 1000),
            value["ir_version"].integer(1, 1000),
            {name: seconds.number() for name, seconds in value["seconds"].items()},
            value["fingerprint"].text(),
        )


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens around a text: SD 1.x pads with the end token, SD 2.x with 0."""

    start: int
    end: int
    pad: int

    @classmethod
    def of(cls, value: Field) -> SpecialTokens:
        value["file"].text((TOKENIZER,))
        return cls(*(value[name].integer(0, 2**31 - 1) for name in ("start", "end", "pad")))


@dataclass(frozen=True)
class LowResolution:
    """How an upscaler adds noise to what it makes larger: the scheduler_config.json of its low_res_scheduler, and the
    highest noise level that a call may ask for."""

    scheduler: Mapping[str, Any]
    max_noise_level: int

    @classmethod
    def of(cls, value: Field, family: Family) -> LowResolution:
        most = (family.noise_levels or 1) - 1
        return cls(value["scheduler"].object(), value["max_noise_level"].integer(0, most))


@dataclass(frozen=True)
class Verification:
    """Whether the bundle was compared with torch and diffusers. If so: the backend, the precision, and the differences
    of each component and of the picture. If not: the reason."""

    done: bool
    reason: str | None = None
    backend: str | None = None
    precision: str | None = None
    components: Mapping[str, Any] = field(default_factory=dict)
    picture: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, value: Field) -> Verification:
        if value["done"].boolean():
            _check_picture(value["picture"])
        names = [name for name in cls.__dataclass_fields__ if name in value]
        components = value["components"].object() if "components" in value else {}
        for name in components:
            _check_difference(value["components"][name])
        return cls(**{**{name: value[name].value for name in names}, "components": components})


@dataclass(frozen=True)
class File:
    """A file of a bundle as it was built."""

    sha256: str
    bytes: int

    @classmethod
    def of(cls, value: Field) -> File:
        if not SHA256.fullmatch(value["sha256"].text()):
            raise value["sha256"].fail("a SHA-256 of 64 hexadecimal digits")
        return cls(value["sha256"].value, value["bytes"].integer(0, 1 << 50))


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json.

    name: what the bundle is called; precision: "fp32", "fp16" or "bf16"; shapes: pixels and pictures in one call;
    scheduler: the model's scheduler_config.json, which `Schedule.from_config` checks; components: those of the family
    that are there; openvino: the precision of each component there and how it was measured, only where the builder did
    so; files: every file of the bundle but the manifest and the plans; versions: of the libraries that built it;
    text_layers: how many the text encoder has, 0 for a model without texts; low_resolution: how an upscaler
    adds noise.
    """

    name: str
    family: Family
    source: Origin
    precision: str
    shapes: Shapes
    scheduler: Mapping[str, Any]
    components: Mapping[str, Graph]
    tokenizer: SpecialTokens | None
    verification: Verification
    openvino: Mapping[str, Any] | None
    files: Mapping[str, File]
    created: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    text_layers: int = 0
    low_resolution: LowResolution | None = None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Manifest:
        """The manifest in a JSON object. ManifestError or UnsafePathError for the first field that is wrong."""
        value = Field(content)
        family = _family(value)
        files = {name: _file(name, entry) for name, entry in value["files"].items()}
        found = cls(
            value["name"].text(),
            family,
            Origin.of(value["source"]),
            value["precision"].text(PRECISIONS),
            _shapes(value["shapes"], family),
            value["scheduler"].object(),
            _components(value["components"], family),
            SpecialTokens.of(value["tokenizer"]) if family.tokenizers else None,
            Verification.of(value["verification"]),
            _openvino(value["openvino"], family) if "openvino" in value else None,
            files,
            value["created"].text() if "created" in value else "",
            {name: one.text() for name, one in value["versions"].items()} if "versions" in value else {},
            value["text_layers"].integer(1, MOST_LAYERS) if family.tokenizers else 0,
            LowResolution.of(value["low_resolution"], family) if family.joins == "low_resolution" else None,
        )
        tokenizer = [TOKENIZER, TOKEN_TABLE] if family.tokenizers else []
        for name in (*tokenizer, *(graph.onnx for graph in found.components.values())):
            if name not in files:
                raise ManifestError(f"files has no SHA-256 for {name!r}, which is used")
        return found

    def content(self) -> dict[str, Any]:
        """The manifest as a JSON object."""
        shapes = {name: asdict(getattr(self.shapes, name)) for name in ("height", "width", "batch")}
        content: dict[str, Any] = {
            "format": FORMAT,
            "name": self.name,
            "family": self.family.name,
            "traits": _traits(self.family) if self.family.name in KINDS else None,
            "source": asdict(self.source),
            "precision": self.precision,
            "shapes": {name: list(side.values()) for name, side in shapes.items()},
            "scheduler": dict(self.scheduler),
            "low_resolution": None if self.low_resolution is None else asdict(self.low_resolution),
            "components": {name: asdict(graph) for name, graph in self.components.items()},
            "tokenizer": None if self.tokenizer is None else {"file": TOKENIZER, **asdict(self.tokenizer)},
            "text_layers": self.text_layers or None,
            "verification": asdict(self.verification),
            "openvino": self.openvino,
            "files": {name: asdict(file) for name, file in sorted(self.files.items())},
            "created": self.created,
            "versions": dict(self.versions),
        }
        for name in ("source", "verification"):
            content[name] = _given(content[name])
        return _given(content)

    def files_of(self, component: str) -> dict[str, File]:
        """A component's graph, its weights and their table; the text encoder's are also the vectors of the tokens."""
        return {name: self.files[name] for name in component_files(component) if name in self.files}


def read(folder: Path) -> dict[str, Any]:
    """The content of `folder`/manifest.json, after `Manifest.of` has accepted it. Raises BundleNotFoundError,
    ManifestError, ManifestVersionError or UnsafePathError; the caller adds the remedy to the message."""
    content = parse(folder)
    version = content.get("format")
    if version != FORMAT or isinstance(version, bool):
        raise _other_version(folder / MANIFEST, version)
    try:
        Manifest.of(content)
    except ManifestError as error:
        raise ManifestError(f"{folder / MANIFEST} is invalid: {error}") from error
    return content


def write(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """Writes `folder`/manifest.json atomically and returns its content. ManifestError if it could not be read again."""
    content = manifest.content()
    Manifest.of(content)
    unfinished = folder / f".{MANIFEST}.tmp"
    unfinished.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(unfinished, folder / MANIFEST)
    return content


def parse(folder: Path) -> dict[str, Any]:
    """The JSON object in `folder`/manifest.json, unchecked."""
    file = folder / MANIFEST
    try:
        if not folder.is_dir():
            raise BundleNotFoundError(
                f"there is no bundle at {shorten(folder)}" + (", which is not a folder" if folder.exists() else "")
            )
    except PermissionError as error:
        raise BundleNotFoundError(
            f"{shorten(folder)} cannot be read (Permission denied); allow it: chmod u+rx {folder.parent}"
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
    """A path for a message, shortened if it is long."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:140]}...{text[-140:]}"


def _other_version(file: Path, version: Any) -> ManifestVersionError:
    if isinstance(version, int) and not isinstance(version, bool) and FORMAT < version < 10**6:
        return ManifestVersionError(
            f"{file} has format {version}, which is newer than this version reads ({FORMAT}); update LatentRT"
        )
    shown = version if isinstance(version, int) and abs(version) < 10**6 else type(version).__name__
    return ManifestVersionError(f"{file} has format {shown}; this version reads format {FORMAT}")


def graph_file(component: str) -> str:
    """The file of a component's graph in a bundle. Its weights are beside it, in a file of that name with `.data`
    appended."""
    return f"onnx/{component}.onnx"


def component_files(component: str) -> tuple[str, ...]:
    """The files that a component may have. The table says which parameter of the model each weight is."""
    graph = graph_file(component)
    vectors = (TOKEN_TABLE,) if component == "text_encoder" else ()
    return graph, f"{graph}.data", f"{graph}.weights.json", *vectors


def own_files(family: Family) -> frozenset[str]:
    """Every file that the builder may write into a bundle, besides the plans."""
    parts = [name for component in family.names for name in component_files(component)]
    tokenizer = [TOKENIZER] if family.tokenizers else []
    return frozenset([MANIFEST, *tokenizer, PICTURE, *parts])


def holds_graphs(folder: Path) -> bool:
    """Whether a folder holds files that only the builder writes. Its manifest does not matter."""
    graphs = {graph_file(component) for component in COMPONENTS}
    return any((folder / name).exists() for name in (TOKENIZER, *graphs))


def is_ours(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object is the manifest of a bundle, even a damaged one, and not some other manifest.json."""
    return "format" in content and {"components", "files"} & content.keys() != set()


def named_files(content: Mapping[str, Any]) -> frozenset[str] | None:
    """The files that an unchecked manifest names as its bundle's, with itself. None if it names none."""
    files = content.get("files")
    return frozenset([MANIFEST, *files]) if isinstance(files, dict) else None


def claimed_origin(content: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The entry of an unchecked manifest about its model, with the fields of `Origin`, of any type. None if there is
    none."""
    source = content.get("source")
    return source if isinstance(source, dict) else None


def _given(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content without the fields that are None."""
    return {name: value for name, value in content.items() if value is not None}


def _family(value: Field) -> Family:
    """The family that the manifest names, with the traits that it gives for one that depends on the model."""
    name = value["family"].text((*FAMILIES, *KINDS))
    if name in FAMILIES:
        return FAMILIES[name]
    given = value["traits"]
    classes = given["classes"].value
    traits = Traits(
        given["channels"].integer(1, LARGEST_CHANNELS),
        given["factor"].integer(1, LARGEST_FACTOR),
        None if classes is None else given["classes"].integer(1, LARGEST_CLASSES),
        given["learned_variance"].boolean(),
        given["concat"].integer(1, max(JOINS)) if "concat" in given else 0,
        given["noise_levels"].integer(1, LARGEST_CLASSES) if "noise_levels" in given else None,
    )
    if name == "stable-diffusion-joined" and not traits.join:
        raise given.fail(f"of a model with concat {', '.join(map(str, JOINS))}, and with noise_levels where it is 3")
    return KINDS[name](traits)


def _traits(family: Family) -> dict[str, Any]:
    """A family's traits. Those of a U-Net that sees more than latents are only there for such families."""
    traits = asdict(Traits.of(family))
    return {name: value for name, value in traits.items() if value or name not in ("concat", "noise_levels")}


def _shapes(value: Field, family: Family) -> Shapes:
    height, width = (value[side].range(SMALLEST_SIDE, LARGEST_SIDE, family.factor) for side in ("height", "width"))
    return Shapes(height, width, value["batch"].range(1, LARGEST_BATCH))


def _components(value: Field, family: Family) -> dict[str, Graph]:
    """The graphs that are there, in the family's order."""
    _only(value, family.names)
    there = [name for name in family.names if name in family.required or name in value]
    return {name: Graph.of(name, value[name]) for name in there}


def _openvino(value: Field, family: Family) -> Mapping[str, Any]:
    _only(value["precision"], family.names)
    for _, precision in value["precision"].items():
        precision.text(OPENVINO_PRECISIONS)
    return value.object()


def _only(value: Field, names: Iterable[str]) -> None:
    if value.object().keys() - set(names):
        raise value.fail(f"about {', '.join(names)} only")


def _check_difference(value: Field) -> None:
    """How far a component is from torch; null where nobody has compared them."""
    if value.value is not None:
        value["max_abs"].number()
        value["relative_rms"].number()


def _check_picture(picture: Field) -> None:
    for name in ("latents_max_abs", "pixels_within_1", "psnr_db"):
        picture[name].number()
    for name in ("steps", "seed"):
        picture[name].integer(0, 2**64)
    picture["scheduler"].text()


def _file(name: str, entry: Field) -> File:
    _check_path(name)
    return File.of(entry)


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
