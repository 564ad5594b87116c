"""Commands that errors tell people to run: they can be pasted as they are."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from .contract import Range
from .manifest import Manifest, Origin

BUILDER = "build_engines.py"

DEFAULT_OPSET = 18
"""What the builder takes without --opset."""


def show_what_cannot_be_printed() -> None:
    """Makes the standard streams write characters that the terminal cannot show as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def builder() -> str:
    """The command that starts the builder from here: the file in this folder, the console script of an installed
    package, or the file beside the package."""
    if Path(BUILDER).is_file():
        return f"python {BUILDER}"
    if shutil.which("latentrt-build"):
        return "latentrt-build"
    return f"python {shlex.quote(str(Path(__file__).parents[1] / BUILDER))}"


def build_anything(folder: Path) -> str:
    """The command for a bundle at `folder` of which only the name is known. The built-in models have these names, and
    the first needs no MODEL."""
    place = f"--output {shlex.quote(str(folder.parent))}"
    if folder.name == "demo":
        return f"{builder()} {place}"
    if folder.name == "shapes":
        return f"{builder()} shapes {place}"
    name = shlex.quote(folder.name or "NAME")
    return f"{builder()} MODEL {place} --name {name}, with the model's folder, file or hub id as MODEL"


def build_again(folder: Path, manifest: Manifest, sizes: Mapping[str, Range] = MappingProxyType({})) -> str:
    """The command that builds the bundle in `folder` as it was built, but with the given `sizes` (height, width,
    batch). It names the model's path if the bundle was built from a folder or a file."""
    words = [*_model(manifest.source), "--output", str(folder.parent), "--name", folder.name]
    words += ["--precision", manifest.precision]
    opset = max(graph.opset for graph in manifest.components.values())
    if opset != DEFAULT_OPSET:
        words += ["--opset", str(opset)]
    words += ["--backend", "onnxruntime" if manifest.openvino is None else "openvino"]
    for name in ("height", "width", "batch"):
        words += [f"--{name}", str(sizes.get(name, getattr(manifest.shapes, name)))]
    if not manifest.verification.done:
        words.append("--no-verify")
    return " ".join([builder(), *map(shlex.quote, words)])


def _model(source: Origin) -> list[str]:
    """MODEL and the options that belong to it."""
    kinds = {"built-in": [] if source.id == "demo" else [source.id], "random": [source.id, "--random-weights"]}
    words: list[str] = kinds.get(source.kind, [source.path or source.id])
    for name, value in source.options.items():
        if name == "ema":
            words.append("--ema")
        for line in value.splitlines() if name != "ema" else ():
            words += [f"--{name}", line]
    return words
