"""Commands that errors tell people to run: they can be pasted as they are."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .contract import Range

BUILDER = "build_engines.py"


def show_what_cannot_be_printed() -> None:
    """Makes the standard streams write characters that a terminal does not know as escapes: a name in them is no
    failure."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def builder() -> str:
    """How the builder is started from here: the file in this folder, the console script of an installed package, or the
    file beside it."""
    if Path(BUILDER).is_file():
        return f"python {BUILDER}"
    if shutil.which("latentrt-build"):
        return "latentrt-build"
    return f"python {shlex.quote(str(Path(__file__).parents[1] / BUILDER))}"


def build_anything(folder: Path) -> str:
    """The command for a bundle at `folder` of which nothing is known but its name; only the built-in model needs no
    MODEL."""
    place = f"--output {shlex.quote(str(folder.parent))}"
    if folder.name == "demo":
        return f"{builder()} {place}"
    name = shlex.quote(folder.name or "NAME")
    return f"{builder()} MODEL {place} --name {name}, with the model's folder, file or hub id as MODEL"


def build_again(folder: Path, manifest: Mapping[str, Any], sizes: Mapping[str, Range] = MappingProxyType({})) -> str:
    """The command that builds the bundle in `folder` as it was built, but for the `sizes` (height, width, batch) that
    are given.

    `manifest` has been checked. It knows a model's path where the bundle was built from a folder or a file.
    """
    words = [
        *_model(manifest["source"]),
        "--output",
        str(folder.parent),
        "--name",
        folder.name,
        "--precision",
        manifest["precision"],
    ]
    if (opset := manifest["components"]["denoiser"].get("opset", 18)) != 18:
        words += ["--opset", str(opset)]
    words += ["--backend", "openvino" if "openvino" in manifest else "onnxruntime"]
    for side in ("height", "width", "batch"):
        words += [f"--{side}", str(sizes.get(side, Range(*manifest["shapes"][side])))]
    if not manifest["verification"]["done"]:
        words.append("--no-verify")
    return " ".join([builder(), *map(shlex.quote, words)])


def _model(source: Mapping[str, Any]) -> list[str]:
    """MODEL and the options that belong to it."""
    kinds = {"built-in": [], "random": [source["id"], "--random-weights"]}
    words: list[str] = kinds.get(source["kind"], [source.get("path") or source["id"]])
    for name, value in source.get("options", {}).items():
        words += [f"--{name}", value]
    return words
