"""Finds out which libraries are installed, names the command that installs a missing one, and imports those that send
telemetry with that turned off."""

from __future__ import annotations

import os
import shlex
import sys
from importlib import import_module
from importlib.util import find_spec
from threading import Lock
from typing import Any

TELEMETRY = "LATENTRT_TELEMETRY"
"""The environment variable that turns the libraries' own telemetry on."""
SENDS_EVENTS = "openvino_telemetry"
_importing = Lock()

REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "runtime": ("numpy>=1.26", "pillow>=10", "tokenizers>=0.21", "tqdm>=4.66"),
    "cpu": ("onnxruntime>=1.20",),
    "openvino": ("openvino>=2025.2",),
    "cuda": ("onnxruntime-gpu>=1.21",),
    "tensorrt": ("tensorrt>=10.12,<12", "cuda-bindings>=12.8", "onnxruntime>=1.20", "polygraphy>=0.49"),
    "export": (
        "torch>=2.9",
        "diffusers>=0.35",
        "transformers>=5",
        "safetensors>=0.5",
        "onnx>=1.18",
        "onnxscript>=0.5",
        "onnxruntime>=1.20",
        "huggingface_hub>=1",
        "filelock>=3.16",
        "pyyaml>=6",
    ),
    "benchmarks": ("matplotlib>=3.8", "psutil>=6"),
}
"""pyproject.toml's extras, and its dependencies as "runtime". Messages name these packages, not `latentrt[...]`,
because no index has a package of that name."""


def install_command(*extras: str) -> str:
    """The command that installs what extras of this package need; it works from any folder."""
    wanted = dict.fromkeys(requirement for extra in extras for requirement in REQUIREMENTS[extra])
    return "python -m pip install " + " ".join(shlex.quote(requirement) for requirement in wanted)


def installed(module: str) -> bool:
    """Whether a module could be imported. It is not imported."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def telemetry_wanted() -> bool:
    """Whether the user asks for the libraries' telemetry: LATENTRT_TELEMETRY is 1, on, true or yes."""
    return os.environ.get(TELEMETRY, "").lower() in ("1", "on", "true", "yes")


def turn_telemetry_off(*variables: str) -> None:
    """Sets environment variables that turn telemetry off to 1, except those that the user has set, unless
    `telemetry_wanted`."""
    if not telemetry_wanted():
        for variable in variables:
            os.environ.setdefault(variable, "1")


def import_library(name: str) -> Any:
    """The imported library. Its telemetry is off if this is its first import. Only this function imports ONNX Runtime
    or OpenVINO.

    ONNX Runtime keeps a device id and a database in the home and sends events, unless ORT_DISABLE_TELEMETRY is set when
    it is imported. OpenVINO has no such variable: it counts its imports in the home and sends each to Google Analytics,
    as long as it finds the package openvino_telemetry. So that package is hidden while OpenVINO is imported, and may be
    imported by others afterwards. Raises ImportError where the library is missing.
    """
    if name in sys.modules or telemetry_wanted():
        return import_module(name)
    if name == "onnxruntime":
        turn_telemetry_off("ORT_DISABLE_TELEMETRY")
    if name != "openvino":
        return import_module(name)
    modules: dict[str, Any] = sys.modules
    with _importing:
        hidden = {SENDS_EVENTS: modules[SENDS_EVENTS]} if SENDS_EVENTS in modules else {}
        modules[SENDS_EVENTS] = None  # `import` raises ModuleNotFoundError, and OpenVINO takes a stub
        try:
            return import_module(name)
        finally:
            modules.pop(SENDS_EVENTS, None)
            modules.update(hidden)
