"""Every difference between TensorRT 8.6, 10.x and 11.x that matters here, each with the release that made it necessary."""
from __future__ import annotations

import re
from collections.abc import Callable
from types import ModuleType
from typing import Any

from ..errors import BackendError

SUPPORTED = "8.6, 10.12 and later, and 11"


def load_tensorrt() -> ModuleType:
    """The module `tensorrt`. BackendError if it is missing, or a version that this code was not written for."""
    try:
        import tensorrt
    except ImportError as error:
        raise BackendError(f"TensorRT cannot be imported ({error}); install it: pip install latentrt[tensorrt], or use backend='onnxruntime'") from error
    release = version(tensorrt)
    if release[:2] != (8, 6) and not (10, 12) <= release < (12, 0):
        raise BackendError(f"TensorRT {tensorrt.__version__} is installed; LatentRT runs on {SUPPORTED}: pip install 'tensorrt>=10.12,<12'")
    return tensorrt


def version(trt: ModuleType) -> tuple[int, ...]:
    """Its release as numbers."""
    return tuple(int(part) for part in re.findall(r"\d+", trt.__version__)[:3])


def none_for_null(create: Callable[..., Any], *arguments: Any) -> Any:
    """What a constructor or factory makes; None where the library made nothing, which constructors of the Python API tell by a
    TypeError ("factory function returned nullptr")."""
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

    10.12 deprecated the precision flags in favour of strong typing, and 11.0 removed EXPLICIT_BATCH and weak typing; 8.6 has no
    strong typing."""
    if version(trt) >= (10,):
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)


def constrain_precision(trt: ModuleType, network: Any, config: Any, precision: str) -> None:
    """Makes 8.6, whose networks are weakly typed, compute in the precisions of the graph: half where the graph has half, float
    in its islands of float (norms, softmax, guidance, sampler). Later versions do so of themselves."""
    if version(trt) >= (10,) or precision == "fp32":
        return
    config.set_flag(trt.BuilderFlag.FP16)
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    kinds = trt.LayerType
    unconstrained = {kinds.CONSTANT, kinds.SHAPE, kinds.IDENTITY, kinds.CAST, kinds.SHUFFLE, kinds.SLICE, kinds.CONCATENATION, kinds.GATHER, kinds.SELECT}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        outputs = [layer.get_output(k) for k in range(layer.num_outputs)]
        if layer.type in unconstrained or any(tensor is None or tensor.is_shape_tensor for tensor in outputs):
            continue
        if outputs and all(tensor.dtype == trt.DataType.FLOAT for tensor in outputs):
            layer.precision = trt.DataType.FLOAT
            for k in range(len(outputs)):
                layer.set_output_type(k, trt.DataType.FLOAT)


def configure(trt: ModuleType, config: Any) -> None:
    """Settings that only some versions have or need."""
    if version(trt) < (10,):
        # 8.6 can call cuBLAS and cuDNN, which are not installed with it; 10.0 stopped using them by default and 11.0 removed them.
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
    """An execution context without memory of its own. 10.1 deprecated create_execution_context_without_device_memory, 11.0 removed it."""
    if version(trt) >= (10,):
        return engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    return engine.create_execution_context_without_device_memory()


def scratch_bytes(trt: ModuleType, engine: Any) -> int:
    """Memory that a context of the engine needs, whatever its profile. 10.1 widened the number to 64 bits under a new name."""
    return int(engine.device_memory_size_v2 if version(trt) >= (10,) else engine.device_memory_size)


def set_scratch(trt: ModuleType, context: Any, address: int, nbytes: int) -> None:
    """Gives a context its memory. 10.1 wants to know the size."""
    if version(trt) >= (10,):
        context.set_device_memory(address, nbytes)
    else:
        context.device_memory = address
