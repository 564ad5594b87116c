"""Floating-point operations and bytes of an ONNX graph at given sizes, counted from the graph itself; weights are not
read.

One multiplication and one addition are two operations (FLOP = 2 x MAC). Only matrix products and convolutions are
counted, as torch's FlopCounterMode does: everything else can be fused into them, so a floor on the time must not have
it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference
from onnx.external_data_helper import load_external_data_for_tensor
from onnx.reference import ReferenceEvaluator

from benchmarks.errors import CountError
from engine.contract import PROMPT_TOKENS
from engine.family import STABLE_DIFFUSION

SMALL = 1024
"""The largest number of elements of a tensor that is evaluated: a shape, or the indices of frequencies."""

AXES = 64
"""The largest number of elements of a weight that can be a shape or an axis."""

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operation:
    """A matrix product or convolution. `bytes`: its inputs and its output, each touched once."""

    kind: str
    name: str
    flop: int
    bytes: int


@dataclass(frozen=True)
class Count:
    """A component at given sizes. `weights` and `traffic` (inputs and outputs of the graph) are in bytes."""

    operations: tuple[Operation, ...]
    weights: int
    traffic: int

    @property
    def flop(self) -> int:
        return sum(operation.flop for operation in self.operations)

    @property
    def bytes(self) -> int:
        """The bytes that its matrix operations read and write."""
        return sum(operation.bytes for operation in self.operations)

    def floor(self, flop_per_second: float, bytes_per_second: float) -> float:
        """The least seconds of any implementation that runs the operations one by one: for each the longer of
        arithmetic and memory, summed."""
        return sum(
            max(operation.flop / flop_per_second, operation.bytes / bytes_per_second) for operation in self.operations
        )


def sizes_of(height: int, width: int, batch: int, rows: int, tokens: int = PROMPT_TOKENS) -> dict[str, int]:
    """The graphs' dimensions for a picture of this size in pixels."""
    _, *plane = STABLE_DIFFUSION.plane(height, width)
    return {"batch": batch, "rows": rows, "tokens": tokens, "height": plane[0], "width": plane[1]}


def count(file: Path, sizes: Mapping[str, int], element_bytes: int = 4) -> Count:
    """Counts the graph in `file`. `element_bytes` is the size of an element in its matrix operations.

    Raises CountError for an unknown operation or shape.
    """
    graph, shapes = _with_shapes(file, sizes)
    operations = []
    for node in graph.node:
        if node.op_type in COSTS:
            if any(shapes.get(name) is None for name in (*node.input, node.output[0]) if name):
                raise CountError(
                    f"{node.op_type} {node.name} in {file} has a shape that cannot be found at {dict(sizes)}"
                )
            touched = [shapes[name] for name in (*node.input, node.output[0]) if name]
            flop = COSTS[node.op_type](node, shapes)
            operations.append(
                Operation(node.op_type, node.name, flop, element_bytes * sum(math.prod(shape) for shape in touched))
            )
        elif node.op_type in UNKNOWN:
            raise CountError(
                f"{file} holds {node.op_type}, whose operations are not counted here; add it to COSTS in "
                "benchmarks/counters.py"
            )
    outside = [*graph.input, *graph.output]
    weights = element_bytes * sum(math.prod(tensor.dims) for tensor in graph.initializer if len(tensor.dims) > 1)
    return Count(tuple(operations), weights, 4 * sum(math.prod(shapes[value.name] or ()) for value in outside))


def _conv(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Every output element takes one product with a kernel of [channels / groups, ...] elements."""
    return 2 * math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])


def _conv_transpose(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """Every input element is multiplied with a kernel of [out channels / groups, ...] elements."""
    return 2 * math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])


def _matmul(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    return 2 * math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


def _gemm(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    transposed = any(attribute.name == "transA" and attribute.i for attribute in node.attribute)
    return 2 * math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]


COSTS = {"Conv": _conv, "ConvTranspose": _conv_transpose, "MatMul": _matmul, "Gemm": _gemm}
UNKNOWN = frozenset(
    {
        "Attention",
        "ConvInteger",
        "DeformConv",
        "Einsum",
        "GRU",
        "LSTM",
        "MatMulInteger",
        "QLinearConv",
        "QLinearMatMul",
        "RNN",
    }
)


def _with_shapes(file: Path, sizes: Mapping[str, int]) -> tuple[onnx.GraphProto, dict[str, Any]]:
    """The graph with its inputs' sizes filled in, and the shape of every value (None if it is unknown).

    ONNX's inference does not follow shapes that the graph computes, such as the product of a height and a width. So
    inference and the evaluation of small values take turns until neither finds anything new.
    """
    model = onnx.load(str(file), load_external_data=False)
    graph = model.graph
    for value in graph.input:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                size = _size(dimension.dim_param, sizes)
                dimension.Clear()
                dimension.dim_value = size
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    known = _constants(graph, file.parent)
    while True:
        del graph.value_info[:]
        inferred = shape_inference.infer_shapes(model, data_prop=True).graph
        shapes: dict[str, Any] = {
            value.name: _shape(value) for value in (*inferred.input, *inferred.value_info, *inferred.output)
        }
        shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        found = _evaluate(graph, shapes, known)
        if not found:
            return inferred, shapes
        remaining = [node for node in graph.node if node.output[0] not in found]
        del graph.node[:]
        graph.node.extend(remaining)
        graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in found.items())
        known |= found


def _size(text: str, sizes: Mapping[str, int]) -> int:
    """`height`, or `8*height`."""
    factor, _, name = text.rpartition("*")
    if name not in sizes:
        raise CountError(f"the graph has a dimension {text!r}; known are {', '.join(sizes)}")
    return int(factor or 1) * sizes[name]


def _shape(value: onnx.ValueInfoProto) -> Shape | None:
    dimensions = value.type.tensor_type.shape.dim
    known = value.type.tensor_type.HasField("shape") and all(
        dimension.HasField("dim_value") for dimension in dimensions
    )
    return tuple(dimension.dim_value for dimension in dimensions) if known else None


def _constants(graph: onnx.GraphProto, folder: Path) -> dict[str, np.ndarray]:
    """The small integers among the weights."""
    found = {}
    for tensor in graph.initializer:
        if tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32) and math.prod(tensor.dims) <= AXES:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                load_external_data_for_tensor(tensor, str(folder))
            found[tensor.name] = numpy_helper.to_array(tensor)
    return found


def _evaluate(
    graph: onnx.GraphProto, shapes: Mapping[str, Any], known: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Values of the operations that have just become computable from shapes and small constants."""
    found: dict[str, np.ndarray] = {}
    for node in graph.node:
        inputs = {name: found.get(name, known.get(name)) for name in node.input if name}
        if node.op_type in ("Shape", "Constant") or (inputs and all(value is not None for value in inputs.values())):
            if node.op_type == "Shape":
                shape = shapes.get(node.input[0])
                if shape is None:
                    continue
                ends = {attribute.name: attribute.i for attribute in node.attribute}
                value = np.array(shape[ends.get("start", 0) : ends.get("end", len(shape))], np.int64)
            else:
                outputs: Any = ReferenceEvaluator(node).run(None, inputs)
                value = np.asarray(outputs[0])
            if value.dtype.kind in "if" and value.size <= SMALL:
                found[node.output[0]] = value
    return found
