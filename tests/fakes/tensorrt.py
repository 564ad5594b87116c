"""The module `tensorrt` of a version, without a GPU: its real names and rules, ONNX Runtime for the arithmetic.

    trt = make_tensorrt("10.16.1", cuda)          # with cuda a FakeCuda
    trt._library.faults.fail("build_serialized_network")
    trt._library.counts, trt._library.messages

A plan holds the ONNX model. Building and running follow the real rules as far as they are documented or known; what is
stricter here: an engine is called under the context of its stream, outputs are overwritten before inputs are read, the
first enqueue after a change of shapes cannot be captured.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from . import tensorrt_api as api
from . import tensorrt_build, tensorrt_network, tensorrt_run
from .cuda_driver import FakeCuda

TEMPLATES = (
    api.ILogger,
    api.Logger,
    api.IProgressMonitor,
    api.IProfiler,
    api.Dims,
    tensorrt_build.Builder,
    tensorrt_build.IOptimizationProfile,
    tensorrt_build.ITimingCache,
    tensorrt_build.IBuilderConfig,
    tensorrt_network.INetworkDefinition,
    tensorrt_network.ITensor,
    tensorrt_network.ILayer,
    tensorrt_network.IConstantLayer,
    tensorrt_network.INormalizationLayer,
    tensorrt_network.IPluginV2Layer,
    tensorrt_network.IPluginV2,
    tensorrt_network.Weights,
    tensorrt_network.ParserError,
    tensorrt_network.OnnxParser,
    tensorrt_run.Runtime,
    tensorrt_run.ICudaEngine,
    tensorrt_run.IExecutionContext,
    tensorrt_run.EngineInspector,
)
REPLACED = {"8": {"ICudaEngine": {"create_execution_context": tensorrt_run.create_execution_context_of_8}}}
"""Members whose parameters differ."""

ITEM_SIZES = {
    "FLOAT": 4,
    "HALF": 2,
    "BF16": 2,
    "INT8": 1,
    "INT32": 4,
    "INT64": 8,
    "BOOL": 1,
    "UINT8": 1,
    "FP8": 1,
    "FP4": 0.5,
    "INT4": 0.5,
}


def make_tensorrt(version: str, cuda: FakeCuda) -> ModuleType:
    """A module that has what that version has, and nothing else."""
    if version not in api.VERSIONS:
        raise ValueError(f"the fake plays {', '.join(api.VERSIONS)}, not {version}")
    library = api.Library(version, cuda)
    for name, versions in api.ENUMS.items():
        members = api.for_version(versions, library.major)
        if members is not None:
            library.classes[name] = api.make_enum(name, members)
    for template in TEMPLATES:
        name = template.__name__
        if library.major in api.CLASSES_ONLY.get(name, library.major).split():
            library.classes[name] = make_class(template, library)
    library.classes["IHostMemory"] = api.IHostMemory
    return make_module(library)


def make_class(template: type, library: api.Library) -> type:
    """The template as that version has it."""
    base = library.classes["ILogger"] if template is api.Logger else None
    members: dict[str, Any] = {"__slots__": (), "__module__": "tensorrt.tensorrt", "_library": library}
    members |= {
        name: api.Missing()
        for parent in template.__mro__
        for name in api.missing_members(parent.__name__, library.major)
    }
    members |= REPLACED.get(library.major, {}).get(template.__name__, {})
    return type(template)(template.__name__, (template, base) if base else (template,), members)


def make_module(library: api.Library) -> ModuleType:
    module = ModuleType("tensorrt", __doc__)
    severity = library.classes["Severity"]
    for name, cls in library.classes.items():
        if name != "Severity":
            setattr(module, name, cls)
    for cls in (library.ILogger, library.Logger):
        cls.Severity = severity
        for name, member in severity.__members__.items():
            setattr(cls, name, member)
    for name, member in api.DATA_TYPE_NAMES.items():
        if member in library.DataType.__members__:
            setattr(module, name, library.DataType.__members__[member])
    library.DataType.itemsize = property(lambda dtype: ITEM_SIZES.get(dtype.name))
    module.__version__ = library.version
    module._library = library
    module.volume, module.nptype = volume, nptype

    def init_libnvinfer_plugins(logger: Any, namespace: str) -> bool:
        library.plugins_registered = True
        return True

    module.init_libnvinfer_plugins = init_libnvinfer_plugins
    return module


def volume(iterable: Any) -> int:
    """The number of elements of a shape."""
    return int(np.prod([int(size) for size in iterable], dtype=np.int64))


def nptype(trt_type: Any) -> Any:
    """The numpy type of a DataType; TypeError where numpy has none."""
    types = {
        "FLOAT": np.float32,
        "HALF": np.float16,
        "INT8": np.int8,
        "INT32": np.int32,
        "INT64": np.int64,
        "BOOL": np.bool_,
        "UINT8": np.uint8,
    }
    if trt_type.name not in types:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return types[trt_type.name]
