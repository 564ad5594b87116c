"""LatentRT's runtime: pictures from texts, with NumPy and one inference library.

    from engine import Pipeline
    result = Pipeline.load("engines/demo")("a large red circle on a blue background", num_inference_steps=20, seed=0)
    result.images[0].save("circle.png")
"""
from .bundle import Bundle
from .errors import BundleError, EngineError, InputError
from .pipeline import Pipeline, Result
from .version import __version__

__all__ = ["Bundle", "BundleError", "EngineError", "InputError", "Pipeline", "Result", "__version__"]
