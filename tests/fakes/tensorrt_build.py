"""The fake TensorRT's side of building: builder, configuration, profiles, timing cache."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from .tensorrt_api import Bound, OfTheDevice, fails_with, plain_property
from .tensorrt_operators import attention_without_a_kernel
from .tensorrt_plan import Tensor, set_instance_norm, uint8_violations, with_outputs, write_plan

TIMING_CACHE_MAGIC = b"FAKE-TIMING"
MAX_OPTIMIZATION_LEVEL = 5
DEFAULT_AUX_STREAMS = 2
"""How many the engine uses where the configuration does not say: TensorRT's own choice."""


class Builder(OfTheDevice):
    __slots__ = ("_logger", "max_threads")

    def __init__(self, logger: Any) -> None:
        library = self._library
        library.expect(logger, "ILogger")
        self._logger, self.max_threads = logger, 1
        try:
            if library.faults.hit("Builder"):
                raise RuntimeError("CUDA initialization failure with error: 35")
            library.cuda.runtime_context()
        except Exception as error:
            library.log(logger, "WARNING", f"CUDA initialization failure: {error}")
            raise TypeError("pybind11::init(): factory function returned nullptr") from None
        self._settle()

    @property
    def logger(self) -> Any:
        return self._logger

    @property
    def platform_has_fast_fp16(self) -> bool:
        return True

    @fails_with(None)
    def create_network(self, flags: int = 0) -> Any:
        library = self._library
        names = [
            name
            for name, flag in library.NetworkDefinitionCreationFlag.__members__.items()
            if library.number(flags) >> int(flag) & 1
        ]
        known = sum(1 << int(flag) for flag in library.NetworkDefinitionCreationFlag.__members__.values())
        if int(flags) & ~known:
            library.error(
                self._logger,
                f"IBuilder::createNetworkV2: Error Code 3: API Usage Error (flags {int(flags):#x} are not known)",
            )
            return None
        return library.INetworkDefinition._create(
            _builder=self,
            _flags=names,
            _graph=None,
            _inputs=[],
            _outputs=[],
            _layers=[],
            _tensors={},
            _symbols={},
            name="Unnamed Network 0",
        )

    @fails_with(None)
    def create_builder_config(self) -> Any:
        return self._library.IBuilderConfig._create(
            _builder=self, _logger=self._logger, **config_defaults(self._library)
        )

    def create_optimization_profile(self) -> Any:
        return self._library.IOptimizationProfile._create(_shapes={}, _logger=self._logger, extra_memory_target=1.0)

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        """Plan bytes, or None with errors logged."""
        library = self._library
        library.expect(network, "INetworkDefinition")
        library.expect(config, "IBuilderConfig")
        library.counts.builds += 1
        try:
            if library.faults.hit("build_serialized_network"):
                raise BuildError(
                    "Error Code 10: Internal Error (Could not find any implementation for node {ForeignNode[...]}.)"
                )
            profiles = validate(library, network, config)
            return library.IHostMemory(run_build(library, network, config, profiles))
        except BuildError as error:
            library.error(self._logger, f"IBuilder::buildSerializedNetwork: {error}")
            return None


class BuildError(Exception):
    """Why there is no plan."""


class IOptimizationProfile(Bound):
    __slots__ = ("_logger", "_shapes", "extra_memory_target")

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._library.expect(input, str)
        shapes = [list(self._library.Dims(shape)) for shape in (min, opt, max)]
        if len({len(shape) for shape in shapes}) != 1 or any(not 0 <= a <= b <= c for a, b, c in zip(*shapes)):
            raise RuntimeError(f"Shape provided for max is inconsistent with other shapes: {input} {shapes}")
        self._shapes[input] = shapes

    def get_shape(self, input: str) -> list[Any]:
        return [self._library.Dims(shape) for shape in self._shapes.get(input, [])]

    def set_shape_input(self, input: str, min: Any, opt: Any, max: Any) -> None:
        raise RuntimeError(f"{input}: the fake has no shape tensors among a network's inputs")

    def __bool__(self) -> bool:
        return True


class ITimingCache(Bound):
    """`_entries` are the layers that were measured; `_valid` is False for content that is no cache of this version."""

    __slots__ = ("_device", "_entries", "_logger", "_valid")

    def serialize(self) -> Any:
        content = {"version": self._library.version, "device": self._device, "entries": sorted(self._entries)}
        return self._library.IHostMemory(TIMING_CACHE_MAGIC + json.dumps(content).encode())

    def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
        self._library.expect(input_cache, "ITimingCache")
        if not input_cache._valid or (input_cache._device != self._device and not ignore_mismatch):
            return False
        self._entries |= input_cache._entries
        return True

    def reset(self) -> bool:
        self._entries.clear()
        return True


def config_defaults(library: Any) -> dict[str, Any]:
    """What a new IBuilderConfig holds."""
    sources = sum(
        1 << int(source)
        for name, source in library.TacticSource.__members__.items()
        if not name.startswith("CU") or library.major == "8"
    )
    return {
        "_flags": {library.BuilderFlag.TF32},
        "_pools": {},
        "_profiles": [],
        "_sources": sources,
        "_cache": None,
        "_monitor": None,
        "_previews": {},
        "_level": 3,
        "_aux": -1,
        "_timing_iterations": 1,
        "_verbosity": library.ProfilingVerbosity.LAYER_NAMES_ONLY,
        "_capability": library.EngineCapability.STANDARD,
        "_compatibility": library.HardwareCompatibilityLevel.NONE,
    }


class IBuilderConfig(OfTheDevice):
    __slots__ = (
        "_aux",
        "_builder",
        "_cache",
        "_capability",
        "_compatibility",
        "_flags",
        "_level",
        "_logger",
        "_monitor",
        "_pools",
        "_previews",
        "_profiles",
        "_sources",
        "_timing_iterations",
        "_verbosity",
    )

    builder_optimization_level = plain_property("_level", int)
    max_aux_streams = plain_property("_aux", int)
    avg_timing_iterations = plain_property("_timing_iterations", int)
    profiling_verbosity = plain_property("_verbosity", "ProfilingVerbosity")
    engine_capability = plain_property("_capability", "EngineCapability")
    hardware_compatibility_level = plain_property("_compatibility", "HardwareCompatibilityLevel")

    @property
    def progress_monitor(self) -> Any:
        return self._monitor

    @progress_monitor.setter
    def progress_monitor(self, value: Any) -> None:
        if value is not None:
            self._library.expect(value, "IProgressMonitor")
        self._monitor = value

    @property
    def flags(self) -> int:
        return sum(1 << int(flag) for flag in self._flags)

    @flags.setter
    def flags(self, value: int) -> None:
        self._flags = {flag for flag in self._library.BuilderFlag.__members__.values() if value >> int(flag) & 1}

    def set_flag(self, flag: Any) -> None:
        self._library.expect(flag, "BuilderFlag")
        self._flags.add(flag)

    def clear_flag(self, flag: Any) -> None:
        self._library.expect(flag, "BuilderFlag")
        self._flags.discard(flag)

    def get_flag(self, flag: Any) -> bool:
        self._library.expect(flag, "BuilderFlag")
        return flag in self._flags

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._library.expect(pool, "MemoryPoolType")
        self._pools[pool] = self._library.number(pool_size)

    def get_memory_pool_limit(self, pool: Any) -> int:
        self._library.expect(pool, "MemoryPoolType")
        return self._pools.get(pool, self._library.cuda.devices[self._library.cuda.runtime_context().ordinal].memory)

    def set_tactic_sources(self, tactic_sources: int) -> bool:
        known = sum(1 << int(source) for source in self._library.TacticSource.__members__.values())
        if self._library.number(tactic_sources) & ~known:
            self._library.error(
                self._logger,
                f"IBuilderConfig::setTacticSources: Error Code 3: API Usage Error ({tactic_sources:#x} has unknown "
                "sources)",
            )
            return False
        self._sources = int(tactic_sources)
        return True

    def get_tactic_sources(self) -> int:
        return self._sources

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        self._library.expect(feature, "PreviewFeature")
        self._previews[feature] = enable

    def get_preview_feature(self, feature: Any) -> bool:
        self._library.expect(feature, "PreviewFeature")
        return self._previews.get(feature, False)

    @fails_with(-1)
    def add_optimization_profile(self, profile: Any) -> int:
        self._library.expect(profile, "IOptimizationProfile")
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @fails_with(None)
    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        library, content = self._library, bytes(memoryview(serialized_timing_cache))
        device = describe_device(library)
        if not content:
            return library.ITimingCache._create(_device=device, _entries=set(), _logger=self._logger, _valid=True)
        try:
            if not content.startswith(TIMING_CACHE_MAGIC):
                raise ValueError("Serialization assertion magicTagRead == kMAGIC_TAG failed.Magic tag does not match")
            found = json.loads(content[len(TIMING_CACHE_MAGIC) :])
            if found["version"] != library.version:
                raise ValueError(
                    "Serialization assertion stdVersionRead == kSERIALIZATION_VERSION failed.Version tag does not match"
                )
        except ValueError as error:
            library.error(self._logger, f"IBuilderConfig::createTimingCache: Error Code 1: Serialization ({error})")
            return library.ITimingCache._create(_device=device, _entries=set(), _logger=self._logger, _valid=False)
        return library.ITimingCache._create(
            _device=found["device"], _entries=set(found["entries"]), _logger=self._logger, _valid=True
        )

    @fails_with(False)
    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self._library.expect(cache, "ITimingCache")
        if not cache._valid or (cache._device != describe_device(self._library) and not ignore_mismatch):
            self._library.error(self._logger, "IBuilderConfig::setTimingCache: The timing cache will not be used!")
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache

    def reset(self) -> None:
        for name, value in config_defaults(self._library).items():
            setattr(self, name, value)


def describe_device(library: Any) -> dict[str, Any]:
    """Name and compute capability of the current device."""
    device = library.cuda.devices[library.cuda.runtime_context().ordinal]
    return {"name": device.name, "capability": list(device.capability)}


def validate(library: Any, network: Any, config: Any) -> list[dict[str, list[list[int]]]]:
    """The profiles to build for, as {input: [min, opt, max]}; BuildError for what TensorRT refuses."""
    graph, flags = network._graph, {flag.name for flag in config._flags}
    if network.has_implicit_batch_dimension:
        raise BuildError("Error Code 4: Internal Error (Network must have explicit batch dimension)")
    if graph is None or not network._outputs:
        raise BuildError("Error Code 4: Internal Error (Network must have at least one output)")
    if "TF32" in flags:
        raise BuildError(
            "TF32 is set, as it is by default: products of float32 would have 10 bits of mantissa. The fake wants it "
            "cleared"
        )
    if repeated := [name for name, count in Counter(layer.name for layer in network._layers).items() if count > 1]:
        raise BuildError(
            f"Error Code 4: Internal Error (Repeated layer name: {repeated[0]} (layers must have distinct names))"
        )
    settle_normalizations(library, network)
    dtypes = {tensor.dtype for tensor in graph.tensors.values()} | {
        layer._precision.name for layer in network._layers if layer._precision
    }
    if network._strongly_typed and flags & {"FP16", "BF16", "INT8", "FP8"}:
        raise BuildError(
            "Error Code 4: API Usage Error (a strongly typed network with the precision flags "
            f"{sorted(flags & {'FP16', 'BF16', 'INT8', 'FP8'})})"
        )
    if not network._strongly_typed and "HALF" in dtypes and "FP16" not in flags:
        text = (
            "Error Code 4: Internal Error (fp16 precision has been set for a layer or layer output, but fp16 is not "
            "configured in the builder)"
        )
        if library.major == "8":
            raise BuildError(text)
        library.log(network._logger, "WARNING", text)
    for text in uint8_violations(graph):
        raise BuildError(f"Error Code 4: Internal Error ({text})")
    for node in graph.nodes:
        if node.operator == "Attention":
            query = graph.tensors[node.inputs[0]]
            if why := attention_without_a_kernel(query.dtype, query.dims[-1] if query.dims else -1):
                raise BuildError(
                    f"Error Code 10: Internal Error (Could not find any implementation for node {node.name}: {why})"
                )
    dynamic = [
        tensor for tensor in graph.inputs if any(not isinstance(size, int) or size == -1 for size in tensor.dims)
    ]
    if dynamic and not config._profiles:
        raise BuildError(
            "Error Code 4: Internal Error (Network has dynamic or shape inputs, but no optimization profile has been "
            "defined.)"
        )
    profiles = [
        check_profile(graph.inputs, dynamic, profile._shapes, index) for index, profile in enumerate(config._profiles)
    ]
    return profiles or [{tensor.name: [tensor.dims] * 3 for tensor in graph.inputs}]


def settle_normalizations(library: Any, network: Any) -> None:
    """InstanceNormalization on 8.6: a plugin, which wants cuDNN, or what was put in its place, with which the plan
    computes."""
    live = network._live_layers()
    for layer in live:
        if layer._node.layer_type == "PLUGIN_V2" and not library.cudnn:
            raise BuildError(
                f"Error Code 2: Internal Error (plugin InstanceNormalization_TRT of {layer.name}, initialize: 15)"
            )
        if layer._node.operator != "Normalization":
            continue
        source, scale, bias = layer._node.inputs
        replaced = next(
            (
                other
                for other in network._layers
                if other._node.layer_type == "PLUGIN_V2" and other._node.inputs == [source]
            ),
            None,
        )
        if replaced is None or layer.axes != 0b1100:
            raise BuildError(
                "the fake computes a normalization over the last two axes of what a plugin normalized, not "
                f"{layer.axes:#b} of {source}"
            )
        constants = {
            other._node.outputs[0]: other._settings["weights"]._array()
            for other in live
            if other._node.operator == "Constant"
        }
        if constants[scale] is None or constants[bias] is None:
            raise BuildError(f"the constants of {layer.name} were freed before the build")
        set_instance_norm(network._graph.model, replaced._node.name, layer.epsilon, constants[scale], constants[bias])


def check_profile(inputs: list[Tensor], dynamic: list[Tensor], shapes: dict, index: int) -> dict[str, list[list[int]]]:
    missing = [tensor.name for tensor in dynamic if tensor.name not in shapes]
    if missing:
        raise BuildError(
            f"Error Code 4: Internal Error ({missing[0]}: optimization profile {index} is missing values for it)"
        )
    names = {tensor.name for tensor in inputs}
    for name in shapes.keys() - names:
        raise BuildError(
            f"Error Code 4: Internal Error (optimization profile {index} has {name}, which is no network input)"
        )
    for tensor in inputs:
        for shape in shapes.get(tensor.name, []):
            if len(shape) != len(tensor.dims) or any(
                isinstance(size, int) and size not in (-1, given) for size, given in zip(tensor.dims, shape)
            ):
                raise BuildError(
                    f"Error Code 4: Internal Error ({tensor.name}: dimensions {shape} of profile {index} do not fit "
                    f"the network's {tensor.dims})"
                )
    return {tensor.name: shapes.get(tensor.name) or [list(tensor.dims)] * 3 for tensor in inputs}  # type: ignore[list-item]


class Cancelled(BuildError):
    """The progress monitor said so."""


def run_build(library: Any, network: Any, config: Any, profiles: list[dict]) -> bytes:
    """Times the layers that the cache does not know, and writes the plan."""
    graph, flags, live = network._graph, sorted(flag.name for flag in config._flags), network._live_layers()
    precisions = {layer.name: layer._precision.name for layer in network._layers if layer._precision}
    monitor = Monitor(library, config._monitor)
    monitor.start("Building engine", None, 2)
    model = hashlib.sha256(graph.model.SerializeToString()).hexdigest()
    key = hashlib.sha256(json.dumps([model, profiles, flags, precisions, config._level]).encode()).hexdigest()
    cache = config._cache if config._cache is not None and "DISABLE_TIMING_CACHE" not in flags else None
    known = cache is not None and key in cache._entries
    if not known and "ERROR_ON_TIMING_CACHE_MISS" in flags:
        raise BuildError("Error Code 10: Internal Error (the timing cache has no entry for a layer)")
    monitor.start("Timing tactics", "Building engine", len(network._layers))
    for index in range(len(network._layers)):
        library.counts.tactics_timed += 0 if known else 1
        monitor.step("Timing tactics", index)
    monitor.finish("Timing tactics")
    monitor.step("Building engine", 0)
    if cache is not None:
        cache._entries.add(key)
    header = {
        "version": library.version,
        "device": describe_device(library),
        "name": network.name,
        "profiles": profiles,
        "flags": flags,
        "strongly_typed": network._strongly_typed,
        "precisions": precisions,
        "level": config._level,
        "verbosity": config._verbosity.name,
        "compatibility": config._compatibility.name,
        "aux_streams": DEFAULT_AUX_STREAMS if config._aux < 0 else min(config._aux, DEFAULT_AUX_STREAMS),
        "profile_sharing": library.major != "8"
        or any(feature.name == "PROFILE_SHARING_0806" and on for feature, on in config._previews.items()),
        "tactic_sources": config._sources,
        "workspace": config._pools.get(library.MemoryPoolType.WORKSPACE),
        "inputs": [[t.name, t._tensor.dtype, list(t.shape)] for t in network._inputs],
        "outputs": [[t.name, t._tensor.dtype, list(t.shape)] for t in network._outputs],
        "layers": [
            {
                "Name": layer.name,
                "LayerType": layer._node.layer_type,
                "Inputs": layer._node.inputs,
                "Outputs": layer._node.outputs,
                "Metadata": layer.metadata,
            }
            for layer in live
        ],
        "plugins": sorted({"InstanceNormalization_TRT" for layer in live if layer._node.layer_type == "PLUGIN_V2"}),
    }
    monitor.step("Building engine", 1)
    monitor.finish("Building engine")
    return write_plan(header, with_outputs(graph, [tensor.name for tensor in network._outputs]))


class Monitor:
    """Calls a progress monitor as TensorRT does: what it raises is printed, and in step_complete ends the build."""

    def __init__(self, library: Any, monitor: Any) -> None:
        self._library, self._monitor = library, monitor
        self._open: list[str] = []

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        if self._monitor is not None:
            self._open.append(phase)
            self._call(self._monitor.phase_start, phase, parent, steps)

    def step(self, phase: str, step: int) -> None:
        if self._monitor is not None and not self._call(self._monitor.step_complete, phase, step):
            while self._open:
                self.finish(self._open[-1])
            raise Cancelled("Error Code 1: the build was cancelled by the progress monitor")

    def finish(self, phase: str) -> None:
        if self._monitor is not None:
            self._open.remove(phase)
            self._call(self._monitor.phase_finish, phase)

    def _call(self, function: Callable, *args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            print(f"[ERROR] Exception caught in {function.__name__}(): {error}")
            return False
