"""What the fake TensorRT makes of an ONNX file: the network's tensors and nodes, a plan, and ONNX Runtime to execute
it."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime

from .tensorrt_operators import misread, supports

MAGIC = b"FAKE-PLAN"
DATA_TYPES = {
    onnx.TensorProto.FLOAT: "FLOAT",
    onnx.TensorProto.FLOAT16: "HALF",
    onnx.TensorProto.BFLOAT16: "BF16",
    onnx.TensorProto.INT32: "INT32",
    onnx.TensorProto.INT64: "INT64",
    onnx.TensorProto.UINT8: "UINT8",
    onnx.TensorProto.INT8: "INT8",
    onnx.TensorProto.BOOL: "BOOL",
    onnx.TensorProto.DOUBLE: "FLOAT",
}
NUMPY_TYPES = {
    "FLOAT": np.float32,
    "HALF": np.float16,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT8": np.uint8,
    "INT8": np.int8,
    "BOOL": np.bool_,
}
SHAPE_ARITHMETIC = {"Add", "Cast", "Concat", "Div", "Gather", "Mul", "Slice", "Squeeze", "Sub", "Unsqueeze"}
LAYER_TYPES = {
    "CONVOLUTION": "Conv",
    "DECONVOLUTION": "ConvTranspose",
    "MATRIX_MULTIPLY": "MatMul Gemm",
    "CAST": "Cast",
    "SOFTMAX": "Softmax",
    "GATHER": "Gather",
    "ELEMENTWISE": "Add Sub Mul Div Pow Max Min Mod Equal Less Greater And Or",
    "UNARY": "Abs Ceil Cos Erf Exp Floor Log Neg Not Round Sin Sqrt Reciprocal",
    "ACTIVATION": "Relu LeakyRelu Sigmoid Tanh Clip Elu Gelu HardSigmoid Selu Softplus",
    "CONCATENATION": "Concat",
    "SHAPE": "Shape",
    "EINSUM": "Einsum",
    "NORMALIZATION": "InstanceNormalization LayerNormalization GroupNormalization",
    "SHUFFLE": "Reshape Transpose Squeeze Unsqueeze Flatten",
    "SLICE": "Slice Split Expand",
    "RESIZE": "Resize",
    "SELECT": "Where",
    "FILL": "ConstantOfShape Range",
    "POOLING": "AveragePool MaxPool",
    "REDUCE": "ReduceMean ReduceSum ReduceMax ReduceMin ReduceProd ReduceL2",
    "TOPK": "TopK ArgMax ArgMin",
    "PADDING": "Pad",
}
LAYER_TYPE_OF = {operator: layer for layer, operators in LAYER_TYPES.items() for operator in operators.split()}


class Unparsable(Exception):
    """What the parser reports; `node` is the index of the node, -1 where there is none."""

    def __init__(self, text: str, code: str, node: int = -1, name: str = "", operator: str = "") -> None:
        super().__init__(text)
        self.text, self.code, self.node, self.name, self.operator = text, code, node, name, operator


@dataclass
class Tensor:
    """A tensor of a network. Dimensions are numbers, names or expressions of names; -1 where nothing is known."""

    name: str
    dtype: str
    dims: list[int | str]
    shape_tensor: bool = False


@dataclass
class Node:
    name: str
    operator: str
    layer_type: str
    inputs: list[str]
    outputs: list[str]


@dataclass
class Graph:
    """A parsed model: its weights are inside of `model`."""

    model: onnx.ModelProto
    inputs: list[Tensor]
    outputs: list[Tensor]
    nodes: list[Node]
    tensors: dict[str, Tensor] = field(repr=False)


def tensor_of(value: onnx.ValueInfoProto, narrow: bool) -> Tensor:
    tensor = value.type.tensor_type
    dtype = DATA_TYPES.get(tensor.elem_type, "FLOAT")
    dims: list[int | str] = [
        d.dim_param or d.dim_value if d.HasField("dim_param") or d.HasField("dim_value") else -1
        for d in tensor.shape.dim
    ]
    return Tensor(value.name, "INT32" if narrow and dtype == "INT64" else dtype, dims)


def read_graph(path: Path | None, content: bytes | None, major: str) -> Graph:
    """Parses a file or bytes with the weights beside `path`, as that major version does; Unparsable says why not."""
    try:
        model = onnx.load(str(path)) if content is None else onnx.load_model_from_string(content)  # type: ignore[arg-type]
        if content is not None and path is not None:
            onnx.load_external_data_for_model(model, str(path.parent))
        if not model.graph.node:
            raise ValueError("the graph has no nodes")
    except Exception as error:
        raise Unparsable(
            f"Failed to parse the ONNX model{f' {path}' if path else ''}: {error}", "MODEL_DESERIALIZE_FAILED"
        ) from error
    for index, node in enumerate(model.graph.node):
        if not supports(node.op_type, major) or node.domain not in ("", "ai.onnx"):
            raise Unparsable(
                f"No importer registered for op: {node.op_type}. Attempted to import as plugin. Plugin not found, are "
                "the plugin name, "
                f"version, and namespace correct?",
                "UNSUPPORTED_NODE",
                index,
                node.name,
                node.op_type,
            )
        if words := misread(node, major):
            raise Unparsable(words, "UNSUPPORTED_NODE", index, node.name, node.op_type)
    types = {t.name: t for t in infer_tensors(model, narrow=major == "8")}
    weights = {w.name for w in model.graph.initializer}
    mark_shape_tensors(model.graph, types, weights)
    nodes, names = [], set()
    for index, node in enumerate(model.graph.node):
        if node.op_type == "Constant":
            continue
        name = node.name or f"node_{index}"
        name = f"{name}_{index}" if name in names else name
        names.add(name)
        tensors = [tensor for tensor in node.input if tensor and tensor not in weights]
        nodes.append(Node(name, node.op_type, LAYER_TYPE_OF.get(node.op_type, "IDENTITY"), tensors, list(node.output)))
    for name in {name for node in nodes for name in (*node.inputs, *node.outputs)} - types.keys():
        types[name] = Tensor(name, "FLOAT", [])
    inputs = [types[value.name] for value in model.graph.input if value.name not in weights]
    return Graph(model, inputs, [types[value.name] for value in model.graph.output], nodes, types)


def instance_norm(model: onnx.ModelProto, name: str) -> tuple[float, np.ndarray, np.ndarray]:
    """Epsilon, scale and bias of an InstanceNormalization node."""
    node = next(node for node in model.graph.node if node.name == name)
    constants = {tensor.name: tensor for tensor in model.graph.initializer} | {
        made.output[0]: made.attribute[0].t for made in model.graph.node if made.op_type == "Constant"
    }
    epsilon = next((attribute.f for attribute in node.attribute if attribute.name == "epsilon"), 1e-5)
    scale, bias = (onnx.numpy_helper.to_array(constants[given]) for given in node.input[1:])
    return epsilon, scale, bias


def set_instance_norm(model: onnx.ModelProto, name: str, epsilon: float, scale: np.ndarray, bias: np.ndarray) -> None:
    """Makes an InstanceNormalization node compute with these."""
    node = next(node for node in model.graph.node if node.name == name)
    del node.attribute[:]
    node.attribute.append(onnx.helper.make_attribute("epsilon", epsilon))
    for index, (what, value) in enumerate((("scale", scale), ("bias", bias)), 1):
        model.graph.initializer.append(onnx.numpy_helper.from_array(value.reshape(-1), f"{name} {what}"))
        node.input[index] = f"{name} {what}"


def with_outputs(graph: Graph, names: list[str]) -> onnx.ModelProto:
    """The model with these tensors as its outputs."""
    kinds = {name: onnx_type for onnx_type, name in reversed(DATA_TYPES.items())}
    present = {value.name: value for value in graph.model.graph.output}
    model = onnx.ModelProto()
    model.CopyFrom(graph.model)
    del model.graph.output[:]
    model.graph.output.extend(
        present.get(name) or onnx.helper.make_tensor_value_info(name, kinds[graph.tensors[name].dtype], None)
        for name in names
    )
    return model


def infer_tensors(model: onnx.ModelProto, narrow: bool) -> list[Tensor]:
    """Every tensor of the graph with its type, as far as ONNX's own inference finds them (it sees no large weights)."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    for weight in light.graph.initializer:
        if len(weight.raw_data) > 1024:
            weight.ClearField("raw_data")
            weight.data_location = onnx.TensorProto.EXTERNAL
    try:
        light = onnx.shape_inference.infer_shapes(light)
    except Exception:  # types that the file itself declares have to do
        light = model
    return [tensor_of(value, narrow) for value in (*light.graph.value_info, *light.graph.input, *light.graph.output)]


def mark_shape_tensors(graph: onnx.GraphProto, tensors: dict[str, Tensor], weights: set[str]) -> None:
    known = set(weights) | {node.output[0] for node in graph.node if node.op_type == "Constant"}
    shapes: set[str] = set()
    for node in graph.node:
        arithmetic = (
            node.op_type in SHAPE_ARITHMETIC
            and shapes & set(node.input)
            and all(n in shapes or n in known for n in node.input if n)
        )
        if node.op_type in ("Shape", "Size") or arithmetic:
            shapes.update(node.output)
    for name in shapes & tensors.keys():
        tensors[name].shape_tensor = True


def uint8_violations(graph: Graph) -> list[str]:
    """Where the graph uses uint8 for more than an input that is cast to float, or a float that is cast to an output."""
    found = []
    floats = ("FLOAT", "HALF", "BF16")
    for tensor in graph.inputs:
        for node in graph.nodes if tensor.dtype == "UINT8" else ():
            if tensor.name in node.inputs and (
                node.operator != "Cast" or graph.tensors[node.outputs[0]].dtype not in floats
            ):
                found.append(
                    f"the UINT8 input {tensor.name} feeds {node.operator} {node.name}: only a cast to float or half "
                    "may read it"
                )
    for tensor in graph.outputs:
        for node in graph.nodes if tensor.dtype == "UINT8" else ():
            if tensor.name in node.outputs and (
                node.operator != "Cast" or graph.tensors[node.inputs[0]].dtype not in floats
            ):
                found.append(
                    f"the UINT8 output {tensor.name} comes from {node.operator} {node.name}: only a cast from float or "
                    "half may write it"
                )
    return found


@dataclass(frozen=True)
class Plan:
    """A serialized engine taken apart: `header` is what the builder wrote, `model` the ONNX model with its weights."""

    header: dict[str, Any]
    model: bytes


def write_plan(header: dict[str, Any], model: onnx.ModelProto) -> bytes:
    head, body = json.dumps(header).encode(), model.SerializeToString()
    payload = struct.pack("<Q", len(head)) + head + body
    return MAGIC + hashlib.sha256(payload).digest() + payload


def read_plan(content: bytes) -> Plan:
    """ValueError for bytes that are no whole plan."""
    start = len(MAGIC) + 32
    if not content.startswith(MAGIC):
        raise ValueError("Serialization assertion magicTagRead == kMAGIC_TAG failed.Magic tag does not match")
    if hashlib.sha256(content[start:]).digest() != content[len(MAGIC) : start]:
        raise ValueError("Serialization assertion plan->header.size == blobSize failed.")
    (size,) = struct.unpack_from("<Q", content, start)
    return Plan(json.loads(content[start + 8 : start + 8 + size]), content[start + 8 + size :])


class Executable:
    """A model in ONNX Runtime, on the CPU with at most two threads; created when it first runs."""

    def __init__(self, model: bytes) -> None:
        self._model, self._shapes = model, {}  # type: ignore[var-annotated]
        proto = onnx.load_model_from_string(model)
        self.weight_bytes = sum(len(w.raw_data) or 4 for w in proto.graph.initializer)
        narrow = False
        self.inputs = {value.name: tensor_of(value, narrow) for value in proto.graph.input}
        self.outputs = {value.name: tensor_of(value, narrow) for value in proto.graph.output}
        self._declared = all(value.type.tensor_type.HasField("shape") for value in proto.graph.output)

    @functools.cached_property
    def session(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 2, 3
        options.enable_cpu_mem_arena = False
        return onnxruntime.InferenceSession(self._model, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; inputs are converted to the types of the model (TensorRT 8.6 narrows int64)."""
        feeds = {name: value.astype(NUMPY_TYPES[self.inputs[name].dtype], copy=False) for name, value in inputs.items()}
        return dict(zip(self.outputs, self.session.run(list(self.outputs), feeds)))

    def output_shapes(self, inputs: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """The outputs' shapes: from their dimensions' names where those say it, else by a run on zeros."""
        key = tuple(sorted(inputs.items()))
        if key not in self._shapes:
            symbols = {
                dim: size
                for name, shape in inputs.items()
                for dim, size in zip(self.inputs[name].dims, shape)
                if isinstance(dim, str)
            }
            shapes = {
                name: tuple(evaluate(dim, symbols) for dim in tensor.dims) for name, tensor in self.outputs.items()
            }
            if not self._declared or any(-1 in shape for shape in shapes.values()):
                zeros = {name: np.zeros(shape, NUMPY_TYPES[self.inputs[name].dtype]) for name, shape in inputs.items()}
                shapes = {name: value.shape for name, value in self.run(zeros).items()}
            self._shapes[key] = shapes
        return self._shapes[key]


def evaluate(dim: int | str, symbols: dict[str, int]) -> int:
    """A dimension like 77, "batch" or "8*height"; -1 where it has unknown symbols."""
    if isinstance(dim, int):
        return dim
    if not re.fullmatch(r"[\w\s+*/()-]+", dim) or not set(re.findall(r"[A-Za-z_]\w*", dim)) <= symbols.keys():
        return -1
    return int(eval(dim, {"__builtins__": {}}, symbols))


@functools.lru_cache(maxsize=8)
def executable(model: bytes) -> Executable:
    """Engines of the same model share a session."""
    return Executable(model)
