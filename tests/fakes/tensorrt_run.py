"""The fake TensorRT's side of running: runtime, engine, execution context, inspector."""

from __future__ import annotations

import json
import math
import weakref
from typing import Any

import numpy as np

from .cuda_device import Allocation, CudaError, DeviceFault, DeviceMemory
from .cuda_types import CUresult
from .tensorrt_api import Bound, fails_with, plain_property
from .tensorrt_build import describe_device
from .tensorrt_plan import NUMPY_TYPES, Executable, executable, read_plan

ALIGNMENT = 256
SCRATCH_TOUCH = 256
"""Bytes at both ends of a context's memory that every execution overwrites, so that two users of one memory are
noticed."""


class Runtime(Bound):
    __slots__ = ("_logger", "engine_host_code_allowed", "max_threads")

    def __init__(self, logger: Any) -> None:
        library = self._library
        library.expect(logger, "ILogger")
        self._logger, self.engine_host_code_allowed, self.max_threads = logger, False, 1
        try:
            if library.faults.hit("Runtime"):
                raise RuntimeError("CUDA initialization failure with error: 35")
            library.cuda.runtime_context()
        except Exception as error:
            library.log(logger, "WARNING", f"CUDA initialization failure: {error}")
            raise TypeError("pybind11::init(): factory function returned nullptr") from None

    @property
    def logger(self) -> Any:
        return self._logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        """The engine, or None with errors logged."""
        library = self._library
        try:
            if library.faults.hit("deserialize_cuda_engine"):
                raise ValueError("the test wants it so")
            plan = read_plan(bytes(memoryview(serialized_engine)))
            check_plan(library, self._logger, plan.header)
            if plan.header["plugins"] and not library.plugins_registered:
                raise ValueError(f"getPluginCreator could not find plugin: {plan.header['plugins'][0]}")
            program = executable(plan.model)
            weights = library.cuda.allocate(max(program.weight_bytes, ALIGNMENT))
        except ValueError as error:
            library.error(self._logger, f"IRuntime::deserializeCudaEngine: Error Code 1: Serialization ({error})")
            return None
        except CudaError as error:
            library.error(
                self._logger,
                f"IRuntime::deserializeCudaEngine: Error Code 2: OutOfMemory ({error.result.name}: {error.reason})",
            )
            return None
        library.counts.deserializations += 1
        return library.ICudaEngine._create(
            _runtime=self,
            _header=plan.header,
            _program=program,
            _weights=weights,
            _content=bytes(serialized_engine),
            _finalizer=None,
        )._own()


def check_plan(library: Any, logger: Any, header: dict[str, Any]) -> None:
    """ValueError for a plan of another version or compute capability; another GPU of the same capability gets a
    warning."""
    if header["version"] != library.version:
        raise ValueError(
            "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does not match. "
            "Note: Current Version: "
            f"{library.version}, Serialized Engine Version: {header['version']}"
        )
    device, built = describe_device(library), header["device"]
    compatible = device["capability"] == built["capability"] or (
        header["compatibility"] == "AMPERE_PLUS" and device["capability"] >= [8, 0]
    )
    if not compatible:
        raise ValueError(
            "The engine plan file is generated on an incompatible device, expecting compute "
            f"{'.'.join(map(str, device['capability']))} got "
            f"compute {'.'.join(map(str, built['capability']))}, please rebuild."
        )
    if device["name"] != built["name"] and header["compatibility"] == "NONE":
        library.log(
            logger,
            "WARNING",
            "Using an engine plan file across different models of devices is not recommended and is likely to affect "
            "performance or "
            "even cause errors.",
        )


class ICudaEngine(Bound):
    """Its weights are device memory until it is deleted; contexts keep it alive."""

    __slots__ = ("_content", "_finalizer", "_header", "_program", "_runtime", "_weights")
    _program: Executable
    _weights: Allocation

    def _own(self) -> Any:
        self._finalizer = weakref.finalize(self, self._library.cuda.release, self._weights)
        self._library.engines.add(self)
        return self

    @property
    def _logger(self) -> Any:
        return self._runtime._logger

    @property
    def _inputs(self) -> dict[str, tuple[str, list[int]]]:
        return {name: (dtype, shape) for name, dtype, shape in self._header["inputs"]}

    @property
    def _outputs(self) -> dict[str, tuple[str, list[int]]]:
        return {name: (dtype, shape) for name, dtype, shape in self._header["outputs"]}

    @property
    def name(self) -> str:
        return self._header["name"]

    @property
    def num_layers(self) -> int:
        return len(self._header["layers"])

    @property
    def num_aux_streams(self) -> int:
        return self._header["aux_streams"]

    @property
    def refittable(self) -> bool:
        return "REFIT" in self._header["flags"]

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._header["profiles"])

    @property
    def profiling_verbosity(self) -> Any:
        return self._library.ProfilingVerbosity.__members__[self._header["verbosity"]]

    @property
    def hardware_compatibility_level(self) -> Any:
        return self._library.HardwareCompatibilityLevel.__members__[self._header["compatibility"]]

    @property
    def engine_capability(self) -> Any:
        return self._library.EngineCapability.STANDARD

    @property
    def tactic_sources(self) -> int:
        return self._header["tactic_sources"]

    @property
    def num_io_tensors(self) -> int:
        return len(self._inputs) + len(self._outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self._inputs, *self._outputs][index]

    def __getitem__(self, arg0: int) -> str:
        return self.get_tensor_name(arg0)

    def _known(self, name: str) -> tuple[str, list[int]] | None:
        self._library.expect(name, str)
        found = self._inputs.get(name) or self._outputs.get(name)
        if found is None:
            self._library.error(
                self._logger, f"ICudaEngine: Error Code 3: API Usage Error (Given invalid tensor name: {name})"
            )
        return found

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._library.TensorIOMode
        return modes.NONE if self._known(name) is None else modes.INPUT if name in self._inputs else modes.OUTPUT

    def get_tensor_shape(self, name: str) -> Any:
        found = self._known(name)
        return self._library.Dims(found[1] if found else ())

    def get_tensor_dtype(self, name: str) -> Any:
        found = self._known(name)
        return self._library.DataType.__members__[found[0] if found else "FLOAT"]

    def get_tensor_location(self, name: str) -> Any:
        self._known(name)
        return self._library.TensorLocation.DEVICE

    def get_tensor_format(self, name: str) -> Any:
        self._known(name)
        return self._library.TensorFormat.LINEAR

    def is_shape_inference_io(self, name: str) -> bool:
        self._known(name)
        return False

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Any]:
        self._library.expect(name, str)
        if not 0 <= profile_index < self.num_optimization_profiles or name not in self._inputs:
            self._library.error(
                self._logger,
                f"ICudaEngine::getProfileShape: Error Code 3: API Usage Error ({name}, profile {profile_index})",
            )
            return [self._library.Dims()] * 3
        return [self._library.Dims(shape) for shape in self._header["profiles"][profile_index][name]]

    def _memory_size(self, shapes: dict[str, list[int]]) -> int:
        """Bytes of scratch for these inputs: twice their elements in float32, aligned; more with auxiliary streams."""
        elements = sum(math.prod(shape) for shape in shapes.values())
        return -(-8 * elements // ALIGNMENT) * ALIGNMENT * (1 + self.num_aux_streams)

    def _profile_memory_size(self, profile_index: int) -> int:
        return self._memory_size({name: shapes[2] for name, shapes in self._header["profiles"][profile_index].items()})

    @property
    def _largest_memory_size(self) -> int:
        return max(self._profile_memory_size(index) for index in range(self.num_optimization_profiles))

    @property
    def device_memory_size(self) -> int:
        return self._largest_memory_size

    @property
    def device_memory_size_v2(self) -> int:
        return self._largest_memory_size

    def get_device_memory_size_for_profile(self, profile_index: int) -> int:
        return self._profile_memory_size(profile_index)

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._profile_memory_size(profile_index)

    def serialize(self) -> Any:
        return self._library.IHostMemory(self._content)

    @fails_with(None)
    def create_engine_inspector(self) -> Any:
        return self._library.EngineInspector._create(_engine=self, execution_context=None)

    @fails_with(None)
    def create_execution_context(self, strategy: Any = None) -> Any:
        if strategy is not None:
            self._library.expect(strategy, "ExecutionContextAllocationStrategy")
        return self._context("STATIC" if strategy is None else strategy.name)

    @fails_with(None)
    def create_execution_context_without_device_memory(self) -> Any:
        return self._context("USER_MANAGED")

    def _context(self, strategy: str) -> Any:
        library = self._library
        profile = 0 if self._free_profile(0) else -1
        context = library.IExecutionContext._create(
            _engine=self,
            _strategy=strategy,
            _profile=profile,
            _shapes={},
            _addresses={},
            _memory=None,
            _scratch=(0, 0),
            _flushed=False,
            _aux_streams=[],
            _profiler=None,
            _report=None,
            name="",
            enqueue_emits_profile=True,
            nvtx_verbosity=self.profiling_verbosity,
            persistent_cache_limit=0,
        )
        try:
            if strategy != "USER_MANAGED":
                context._allocate(
                    self._largest_memory_size if strategy == "STATIC" else self._profile_memory_size(max(profile, 0))
                )
        except CudaError as error:
            library.error(
                self._logger,
                "ICudaEngine::createExecutionContext: Error Code 2: OutOfMemory (Requested size was "
                f"{self._largest_memory_size} "
                f"bytes: {error.result.name}: {error.reason})",
            )
            return None
        library.counts.contexts += 1
        library.contexts.add(context)
        return context

    def _free_profile(self, index: int, user: Any = None) -> bool:
        """Before TensorRT 9, contexts do not share a profile of an engine with dynamic shapes, unless the engine was
        built to."""
        dynamic = any(-1 in shape for _, shape in self._inputs.values())
        taken = any(c._engine is self and c._profile == index and c is not user for c in self._library.contexts)
        return self._header["profile_sharing"] or not dynamic or not taken


def create_execution_context_of_8(self: ICudaEngine) -> Any:
    """TensorRT 8.6 has no allocation strategies."""
    return ICudaEngine.create_execution_context(self)


create_execution_context_of_8.__name__ = "create_execution_context"


class IExecutionContext(Bound):
    """Addresses and shapes are taken as they are when work is enqueued; a captured graph keeps those of its capture."""

    __slots__ = (
        "_addresses",
        "_aux_streams",
        "_engine",
        "_flushed",
        "_memory",
        "_profile",
        "_profiler",
        "_report",
        "_scratch",
        "_shapes",
        "_strategy",
        "enqueue_emits_profile",
        "name",
        "nvtx_verbosity",
        "persistent_cache_limit",
    )
    _engine: ICudaEngine

    profiler = plain_property("_profiler", "IProfiler")

    @property
    def _logger(self) -> Any:
        return self._engine._logger

    def _refuse(self, method: str, text: str) -> bool:
        self._library.error(
            self._logger, f"IExecutionContext::{method}: Error Code 3: API Usage Error (Parameter check failed, {text})"
        )
        return False

    def _allocate(self, size: int) -> None:
        if self._memory is not None:
            self._library.cuda.release(self._memory)
        size = max(size, ALIGNMENT)
        self._memory = self._library.cuda.allocate(size)
        weakref.finalize(self, self._library.cuda.release, self._memory)
        self._scratch = (self._memory.address, size)

    @property
    def engine(self) -> Any:
        return self._engine

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """True, or RuntimeError: the real binding never returns False."""
        library, index = self._library, self._library.number(profile_index)
        try:
            if (
                library.faults.hit("set_optimization_profile_async")
                or not 0 <= index < self._engine.num_optimization_profiles
            ):
                raise ValueError(f"profile {index} of {self._engine.num_optimization_profiles}")
            if not self._engine._free_profile(index, self):
                raise ValueError(f"profile {index} is in use by another execution context")
            library.cuda.stream(library.number(stream_handle))
            if self._strategy == "ON_PROFILE_CHANGE" and index != self._profile:
                self._allocate(self._engine._profile_memory_size(index))
        except (ValueError, CudaError) as error:
            self._refuse("setOptimizationProfileAsync", str(error))
            raise RuntimeError("Error in set optimization profile async.") from None
        if index != self._profile:
            self._profile, self._flushed = index, False
            self._shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: Any) -> bool:
        library, given = self._library, tuple(self._library.Dims(shape))
        library.expect(name, str)
        if library.faults.hit("set_input_shape"):
            return self._refuse("setInputShape", "the test wants it so")
        if name not in self._engine._inputs:
            return self._refuse("setInputShape", f"{name} is no input tensor")
        _, declared = self._engine._inputs[name]
        if len(given) != len(declared) or any(size not in (-1, wanted) for size, wanted in zip(declared, given)):
            return self._refuse(
                "setInputShape",
                "condition: engineDims.d[i] == dims.d[i]. Static dimension mismatch while setting input shape for "
                f"{name}: "
                f"{given} for {declared}",
            )
        if self._profile < 0:
            return self._refuse(
                "setInputShape", "condition: mOptimizationProfile >= 0. No optimization profile is chosen"
            )
        lowest, _, highest = self._engine._header["profiles"][self._profile][name]
        if any(not low <= size <= high for low, size, high in zip(lowest, given, highest)):
            return self._refuse(
                "setInputShape",
                f"condition: satisfyProfile. Set dimension {list(given)} for tensor {name} does not satisfy any "
                "optimization "
                f"profiles. Valid range for profile {self._profile}: {lowest}..{highest}.",
            )
        if self._shapes.get(name) != given:
            self._shapes[name], self._flushed = given, False
        return True

    def _input_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that are known: those set, and static ones."""
        static = {name: tuple(shape) for name, (_, shape) in self._engine._inputs.items() if -1 not in shape}
        return {**static, **self._shapes}

    def infer_shapes(self) -> list[str]:
        return [name for name in self._engine._inputs if name not in self._input_shapes()]

    @property
    def all_binding_shapes_specified(self) -> bool:
        return not self.infer_shapes()

    @property
    def all_shape_inputs_specified(self) -> bool:
        return True

    def get_tensor_shape(self, name: str) -> Any:
        known, missing = self._input_shapes(), self.infer_shapes()
        if self._engine._known(name) is None:
            return self._library.Dims()
        if name in self._engine._inputs:
            return self._library.Dims(known.get(name, self._engine._inputs[name][1]))
        return self._library.Dims(
            self._engine._outputs[name][1] if missing else self._engine._program.output_shapes(known)[name]
        )

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._library.expect(name, str)
        address = self._library.number(memory)
        if self._library.faults.hit("set_tensor_address"):
            return self._refuse("setTensorAddress", "the test wants it so")
        if name not in self._engine._inputs and name not in self._engine._outputs:
            return self._refuse("setTensorAddress", f"Given invalid tensor name: {name}")
        self._addresses[name] = address
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        self._set_memory(self._library.number(memory), self._library.number(size))

    def _set_memory(self, address: int, size: int) -> None:
        if self._strategy != "USER_MANAGED":
            self._refuse("setDeviceMemory", "the context owns its memory")
        elif address % ALIGNMENT:
            self._refuse("setDeviceMemory", f"{address:#x} is not aligned to {ALIGNMENT} bytes")
        else:
            self._scratch = (address, size)

    device_memory = property(
        None, lambda self, value: self._set_memory(self._library.number(value), self._engine._largest_memory_size)
    )

    def update_device_memory_size_for_shapes(self) -> int:
        if self.infer_shapes():
            self._refuse("updateDeviceMemorySizeForShapes", f"the shapes of {self.infer_shapes()} are not set")
            return 0
        return self._engine._memory_size({name: list(shape) for name, shape in self._input_shapes().items()})

    def set_aux_streams(self, aux_streams: list[int]) -> None:
        self._aux_streams = [self._library.number(stream) for stream in aux_streams][: self._engine.num_aux_streams]

    def report_to_profiler(self) -> bool:
        if self._profiler is None or self._report is None:
            return False
        self._report()
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        library, handle = self._library, self._library.number(stream_handle)
        if library.faults.hit("execute_async_v3"):
            return self._refuse("enqueueV3", "the test wants it so")
        for problem in self._problems():
            return self._refuse("enqueueV3", problem)
        try:
            streams = [library.cuda.stream(number) for number in (handle, *self._aux_streams)]
            capture = streams[0].capture
            if capture and not self._flushed:
                capture.valid = False
                return self._refuse(
                    "enqueueV3", "shapes or the profile changed since the last enqueue: enqueue once before a capture"
                )
            library.cuda.launch(handle, self._engine.name, self._kernel())
        except CudaError as error:
            return self._refuse("enqueueV3", f"Cuda Runtime ({error.result.name}: {error.reason})")
        self._flushed = True
        library.counts.enqueues[self._engine.name] += 1
        self._profile_run(streams[0])
        return True

    def _problems(self) -> list[str]:
        """What keeps work from being enqueued."""
        if self._profile < 0:
            return ["condition: mOptimizationProfile >= 0. No optimization profile is chosen"]
        names = [*self._engine._inputs, *self._engine._outputs]
        found = [f"the shape of input tensor {name} is not set" for name in self.infer_shapes()]
        found += [
            f"Address is not set for tensor {name}. Call setTensorAddress before enqueueV3."
            for name in names
            if not self._addresses.get(name)
        ]
        found += [
            f"the address {self._addresses[name]:#x} of {name} is not aligned to {ALIGNMENT} bytes"
            for name in names
            if self._addresses.get(name, 0) % ALIGNMENT
        ]
        address, size = self._scratch
        needed = (
            0
            if found or self._strategy != "USER_MANAGED"
            else self._engine._memory_size({n: list(s) for n, s in self._input_shapes().items()})
        )
        if self._strategy == "USER_MANAGED" and (address == 0 or size < needed):
            found.append(f"the context needs {needed} bytes of device memory, it was given {size} at {address:#x}")
        return found

    def _kernel(self) -> Any:
        """What runs on the device: everything is fixed now but the content of memory."""
        engine, shapes, addresses = self._engine, self._input_shapes(), dict(self._addresses)
        program, weights = engine._program, engine._weights
        inputs = {
            name: (addresses[name], shapes[name], NUMPY_TYPES[engine._inputs[name][0]]) for name in engine._inputs
        }
        outputs = {
            name: (addresses[name], shape, NUMPY_TYPES[engine._outputs[name][0]])
            for name, shape in program.output_shapes(shapes).items()
            if name in engine._outputs
        }
        scratch, scratch_size = self._scratch

        def run(memory: DeviceMemory) -> None:
            memory.view(weights.address, 1)
            if scratch_size:
                for start in (scratch, scratch + scratch_size - min(SCRATCH_TOUCH, scratch_size)):
                    memory.view(start, min(SCRATCH_TOUCH, scratch_size))[:] = 0xFF
            targets = {
                name: memory.view(address, math.prod(shape) * np.dtype(dtype).itemsize)
                for name, (address, shape, dtype) in outputs.items()
            }
            for target in targets.values():
                target[:] = 0xFF  # an output that overlaps an input shows
            feeds = {
                name: memory.view(address, math.prod(shape) * np.dtype(dtype).itemsize)
                .copy()
                .view(dtype)
                .reshape(shape)
                for name, (address, shape, dtype) in inputs.items()
            }
            for name, value in program.run(feeds).items():
                if name in outputs:
                    _, shape, dtype = outputs[name]
                    if value.shape != shape:
                        raise DeviceFault(CUresult.CUDA_ERROR_LAUNCH_FAILED, f"{name} is {value.shape}, not {shape}")
                    targets[name][:] = np.ascontiguousarray(value.astype(dtype, copy=False)).reshape(-1).view(np.uint8)

        return run

    def _profile_run(self, stream: Any) -> None:
        """With a profiler: an equal time for every layer, at once (which waits) or when report_to_profiler asks for
        it."""
        if self._profiler is None or stream.capture:
            return
        layers = [layer["Name"] for layer in self._engine._header["layers"]]
        self._report = lambda: [self._profiler.report_layer_time(name, 0.01) for name in layers]
        if self.enqueue_emits_profile:
            stream.run()
            self._report()


class EngineInspector(Bound):
    __slots__ = ("_engine", "execution_context")

    def get_engine_information(self, format: Any) -> str:
        self._library.expect(format, "LayerInformationFormat")
        header = self._engine._header
        layers = (
            [self._layer(index) for index in range(self._engine.num_layers)] if header["verbosity"] != "NONE" else []
        )
        if format.name == "ONELINE":
            return "\n".join(str(layer) for layer in layers)
        return json.dumps({"Layers": layers, "Bindings": [*self._engine._inputs, *self._engine._outputs]})

    def get_layer_information(self, layer_index: int, format: Any) -> str:
        self._library.expect(format, "LayerInformationFormat")
        return json.dumps(self._layer(layer_index)) if format.name == "JSON" else str(self._layer(layer_index))

    def _layer(self, index: int) -> Any:
        """With names only, TensorRT's JSON has a string for a layer; with details an object."""
        layer = self._engine._header["layers"][index]
        return layer if self._engine._header["verbosity"] == "DETAILED" else layer["Name"]
