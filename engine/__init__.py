"""LatentRT's runtime: text to image with NumPy and one inference library.

    from engine import Pipeline
    result = Pipeline.load("engines/demo")("a large red circle on a blue background", num_inference_steps=20, seed=0)
    result.images[0].save("circle.png")

The names below are imported on first use, because building plans and `python -m engine doctor` need only NumPy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .bundle import Bundle
    from .errors import BundleError, EngineError, InputError
    from .hires import Hires
    from .pipeline import Pipeline, Result

__all__ = ["Bundle", "BundleError", "EngineError", "Hires", "InputError", "Pipeline", "Result", "__version__"]

_MODULES = {
    "Bundle": "bundle",
    "BundleError": "errors",
    "EngineError": "errors",
    "Hires": "hires",
    "InputError": "errors",
    "Pipeline": "pipeline",
    "Result": "pipeline",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
