"""Every difference between TensorRT 8.6, 10.x and 11.x that matters here, each with the release that made it
necessary."""

from __future__ import annotations

import re
import struct
from collections import defaultdict
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from ...errors import BackendError, TensorRtError
from ...libraries import install_command

SUPPORTED = "8.6, 10.12 and later, and 11"


def load_tensorrt() -> ModuleType:
    """The module `tensorrt`. BackendError if it is missing, or a version that this code was not written for."""
    try:
        import tensorrt
    except ImportError as error:
        raise BackendError(
            f"TensorRT cannot be imported ({error}); install it: {install_command('tensorrt')}, or use "
            "backend='onnxruntime'"
        ) from error
    release = version(tensorrt)
    if release[:2] != (8, 6) and not (10, 12) <= release < (12, 0):
        raise BackendError(
            f"TensorRT {tensorrt.__version__} is installed; LatentRT runs on {SUPPORTED}: pip install "
            "'tensorrt>=10.12,<12'"
        )
    return tensorrt


def require_driver(trt: ModuleType, cuda: str) -> None:
    """BackendError for a driver, by the newest CUDA that it runs, that 8.6 (built for CUDA 12.0) would end the process
    on instead of refusing it."""
    if version(trt) < (10,) and int(cuda.split(".")[0]) < 12:
        raise BackendError(
            f"TensorRT {trt.__version__} needs a driver for CUDA 12.0 or later, and the one here is for CUDA {cuda}; "
            "update the driver"
        )


def version(trt: ModuleType) -> tuple[int, ...]:
    """Its release as numbers."""
    return tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:3])


def none_for_null(create: Callable[..., Any], *arguments: Any) -> Any:
    """What a constructor or factory makes; None where the library made nothing, which constructors of the Python API
    tell by a TypeError ("factory function returned nullptr")."""
    try:
        return create(*arguments)
    except TypeError as error:
        if "nullptr" not in str(error):
            raise
        return None


def accepted(call: Callable[..., Any], *arguments: Any) -> bool:
    """Whether a call was accepted: some methods of the Python API return False otherwise, others raise RuntimeError."""
    try:
        return call(*arguments) is not False
    except RuntimeError:
        return False


def network_flags(trt: ModuleType) -> int:
    """Flags of a network whose precision is that of its graph.

    10.12 deprecated the precision flags in favour of strong typing, and 11.0 removed EXPLICIT_BATCH and weak typing;
    8.6 has no strong typing."""
    if version(trt) >= (10,):
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)


def replace_plugins(trt: ModuleType, network: Any) -> list[np.ndarray]:
    """Makes TensorRT's own normalization of each InstanceNormalization that the parser of 8.6 has made a plugin of: the
    plugin calls cuDNN, which 8.6 does not bring along, and a plan that holds it loads only where plugins are
    registered. Since 10.0 the parser does so itself.

    Returns the constants, which the builder reads while it builds. TensorRtError where TensorRT refuses a layer."""
    if version(trt) >= (10,):
        return []
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    readers = readers_by_tensor(layers)
    constants: list[np.ndarray] = []
    for layer in layers:
        if layer.type != trt.LayerType.PLUGIN_V2:
            continue
        layer.__class__ = trt.IPluginV2Layer  # the binding gives every layer the base class
        if layer.plugin.plugin_type != "InstanceNormalization_TRT":
            continue
        x = layer.get_input(0)
        epsilon, *weights = read_instance_norm(bytes(layer.plugin.serialize()))
        rank = len(x.shape)
        shape = (1, len(weights[0]), *[1] * (rank - 2))
        scale, bias = (network.add_constant(shape, trt.Weights(values)).get_output(0) for values in weights)
        made = network.add_normalization(x, scale, bias, sum(1 << axis for axis in range(2, rank)))
        if made is None:
            raise TensorRtError(f"TensorRT {trt.__version__} made no normalization of the layer {layer.name}")
        made.name, made.epsilon = (
            f"{layer.name} without the plugin",
            epsilon,
        )  # names must differ, also from those of layers that nothing reads any more
        for reader, index in readers[layer.get_output(0).name]:
            reader.set_input(index, made.get_output(0))
        constants += weights
    return constants


def read_instance_norm(content: bytes) -> tuple[float, np.ndarray, np.ndarray]:
    """Epsilon, scale and bias of a serialized InstanceNormalization_TRT of 8.6: float, int32, then twice a 64-bit count
    and as many floats."""
    epsilon, count = struct.unpack_from("<fi", content)
    scale, bias = (np.frombuffer(content, np.float32, count, offset).copy() for offset in (16, 24 + 4 * count))
    return epsilon, scale, bias


def readers_by_tensor(layers: Sequence[Any]) -> dict[str, list[tuple[Any, int]]]:
    """For each tensor's name the layers that read it, with the number of the input."""
    readers: dict[str, list[tuple[Any, int]]] = defaultdict(list)
    for layer in layers:
        for index in range(layer.num_inputs):
            if (tensor := layer.get_input(index)) is not None:
                readers[tensor.name].append((layer, index))
    return readers


def constrain_precision(trt: ModuleType, network: Any, config: Any, precision: str) -> tuple[int, int]:
    """Makes 8.6, whose networks are weakly typed, keep float32 where half precision would spoil the result: in the
    embedding of the timestep, and from the cast behind the last convolution on (guidance, sampler, pixels). Elsewhere
    the casts of the graph are what it keeps; norms compute in float32 of themselves, and softmax is left to the fused
    kernels of attention. Later versions take every type from the graph.

    Returns how many layers were pinned, and of how many. Types of tensors in between say nothing before the build, so
    the graph's casts delimit the parts."""
    if version(trt) >= (10,) or precision == "fp32":
        return 0, network.num_layers
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.PREFER_PRECISION_CONSTRAINTS)
    kinds, floating = trt.LayerType, trt.DataType.FLOAT
    moving = {
        kinds.CONSTANT,
        kinds.SHAPE,
        kinds.IDENTITY,
        kinds.CAST,
        kinds.SHUFFLE,
        kinds.SLICE,
        kinds.CONCATENATION,
        kinds.GATHER,
        kinds.SELECT,
    }
    pinned = [layer for layer in float_parts(trt, network) if layer.type not in moving]
    for layer in pinned:
        layer.precision = floating
        for k in range(layer.num_outputs):
            layer.set_output_type(k, floating)
    return len(pinned), network.num_layers


def float_parts(trt: ModuleType, network: Any) -> list[Any]:
    """The layers from the timestep to the first casts, and those from the last casts to the outputs."""
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    readers, floats = readers_by_tensor(layers), (trt.DataType.FLOAT, trt.DataType.HALF)
    makers = {layer.get_output(k).name: layer for layer in layers for k in range(layer.num_outputs)}
    found: dict[int, Any] = {}

    def walk(tensors: list[Any], forward: bool) -> None:
        while tensors:
            tensor = tensors.pop()
            if tensor is None or tensor.dtype not in floats or tensor.is_shape_tensor:
                continue
            for layer in (
                [reader for reader, _ in readers[tensor.name]]
                if forward
                else [makers[tensor.name]]
                if tensor.name in makers
                else []
            ):
                if id(layer) in found or is_cast(trt, layer):
                    continue
                found[id(layer)] = layer
                tensors += (
                    [layer.get_output(k) for k in range(layer.num_outputs)]
                    if forward
                    else [layer.get_input(k) for k in range(layer.num_inputs)]
                )

    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    walk([tensor for tensor in inputs if tensor.name == "timestep"], forward=True)
    outputs = [network.get_output(i) for i in range(network.num_outputs)]
    behind = [makers[tensor.name] for tensor in outputs if tensor.name in makers]
    walk([layer.get_input(0) if is_cast(trt, layer) else layer.get_output(0) for layer in behind], forward=False)
    return list(found.values())


def is_cast(trt: ModuleType, layer: Any) -> bool:
    """Whether a layer of 8.6 is one of the graph's casts: its parser makes identities with an output type of them."""
    return bool(
        layer.type == trt.LayerType.CAST or (layer.type == trt.LayerType.IDENTITY and layer.output_type_is_set(0))
    )


def register_plugins(trt: ModuleType) -> None:
    """Makes plans loadable that hold a plugin. Those of 8.6 may: its parser makes plugins of operators, and loading
    finds none that was not registered. No logger, since the plugins would keep it for longer than anybody here."""
    if version(trt) < (10,):
        trt.init_libnvinfer_plugins(None, "")


def configure(trt: ModuleType, config: Any) -> None:
    """Settings that all versions need, and those that only some have."""
    # Products of float32 with 10 bits of mantissa, on by default everywhere: guidance and sampler in it cost as much as
    # half precision does in the U-Net.
    config.clear_flag(trt.BuilderFlag.TF32)
    if version(trt) < (10,):
        # 8.6 can call cuBLAS and cuDNN, which are not installed with it; 10.0 stopped using them by default and 11.0
        # removed them.
        sources = (trt.TacticSource.EDGE_MASK_CONVOLUTIONS, trt.TacticSource.JIT_CONVOLUTIONS)
        config.set_tactic_sources(sum(1 << int(source) for source in sources))
        # Several contexts on one profile; the default since 10.0.
        config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)


def supports_bf16(trt: ModuleType) -> bool:
    """8.6 has no bfloat16; it came with 9.0."""
    return version(trt) >= (10,)


def newest_opset(trt: ModuleType) -> int:
    """The newest of our opsets that its parser takes. Attention, which opset 23 brought, came with 10.14."""
    return 23 if version(trt) >= (10, 14) else 18


def has_progress(trt: ModuleType) -> bool:
    """IProgressMonitor came with 9.0."""
    return version(trt) >= (10,)


def create_context(trt: ModuleType, engine: Any) -> Any:
    """An execution context without memory of its own. 10.1 deprecated create_execution_context_without_device_memory,
    11.0 removed it."""
    if version(trt) >= (10,):
        return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    return engine.create_execution_context_without_device_memory()


def scratch_bytes(trt: ModuleType, engine: Any) -> int:
    """Memory that a context of the engine needs, whatever its profile. 10.1 widened the number to 64 bits under a new
    name."""
    return int(engine.device_memory_size_v2 if version(trt) >= (10,) else engine.device_memory_size)


def set_scratch(trt: ModuleType, context: Any, address: int, nbytes: int) -> None:
    """Gives a context its memory. 10.1 wants to know the size."""
    if version(trt) >= (10,):
        context.set_device_memory(address, nbytes)
    else:
        context.device_memory = address
