"""The fake TensorRT's networks, and the ONNX parser that fills them."""

from __future__ import annotations

import struct
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .tensorrt_api import Bound, OfTheDevice, fails_with
from .tensorrt_operators import supports
from .tensorrt_plan import Graph, Node, Tensor, Unparsable, evaluate, instance_norm, read_graph


class INetworkDefinition(OfTheDevice):
    """`_flags` are names of NetworkDefinitionCreationFlag; TensorRT 11 has no other than strongly typed networks."""

    __slots__ = ("_builder", "_flags", "_graph", "_inputs", "_layers", "_outputs", "_symbols", "_tensors", "name")

    @property
    def _logger(self) -> Any:
        return self._builder._logger

    @property
    def _strongly_typed(self) -> bool:
        return self._library.major == "11" or "STRONGLY_TYPED" in self._flags

    @property
    def builder(self) -> Any:
        return self._builder

    @property
    def has_implicit_batch_dimension(self) -> bool:
        return self._library.major == "8" and "EXPLICIT_BATCH" not in self._flags

    @property
    def flags(self) -> int:
        return sum(1 << int(self._library.NetworkDefinitionCreationFlag.__members__[name]) for name in self._flags)

    def get_flag(self, flag: Any) -> bool:
        self._library.expect(flag, "NetworkDefinitionCreationFlag")
        return flag.name in self._flags

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def get_input(self, index: int) -> Any:
        return self._inputs[index] if 0 <= index < len(self._inputs) else None

    def get_output(self, index: int) -> Any:
        return self._outputs[index] if 0 <= index < len(self._outputs) else None

    def get_layer(self, index: int) -> Any:
        return self._layers[index] if 0 <= index < len(self._layers) else None

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, arg0: int) -> Any:
        return self._layers[arg0]

    def mark_output(self, tensor: Any) -> None:
        self._library.expect(tensor, "ITensor")
        if tensor not in self._outputs:
            self._outputs.append(tensor)

    def unmark_output(self, tensor: Any) -> None:
        self._library.expect(tensor, "ITensor")
        self._outputs.remove(tensor)

    def _fill(self, graph: Graph) -> None:
        library = self._library
        self._graph = graph
        self._tensors = {
            name: library.ITensor._create(_network=weakref.proxy(self), _tensor=tensor)
            for name, tensor in graph.tensors.items()
        }
        self._inputs = [self._tensors[tensor.name] for tensor in graph.inputs]
        self._outputs = [self._tensors[tensor.name] for tensor in graph.outputs]
        self._layers = []
        for node in as_8_imports(graph) if library.major == "8" else graph.nodes:
            layer = self._append("ILayer", node)
            layer.metadata = f"[ONNX Layer: {node.name}]"
            if library.major == "8" and node.operator == "Cast":
                layer._output_types[0] = library.DataType.__members__[graph.tensors[node.outputs[0]].dtype]

    def _append(self, kind: str, node: Node, **settings: Any) -> Any:
        """Adds a layer, and tensors for its outputs where they are new."""
        library, graph = self._library, self._graph
        for name in {*node.inputs, *node.outputs} - self._tensors.keys():
            self._tensors[name] = library.ITensor._create(_network=weakref.proxy(self), _tensor=graph.tensors[name])
        layer = library.classes[kind]._create(
            _network=weakref.proxy(self),
            _node=node,
            _precision=None,
            _output_types={},
            _settings=settings,
            name=node.name,
            metadata="",
        )
        self._layers.append(layer)
        return layer

    def _add(self, kind: str, node: Node, tensor: Tensor, **settings: Any) -> Any:
        """A layer that Python adds to the parsed ones."""
        self._graph.tensors[tensor.name] = tensor
        return self._append(kind, node, **settings)

    def add_constant(self, shape: Any, weights: Any) -> Any:
        self._library.expect(weights, "Weights")
        name = f"(Unnamed Layer* {len(self._layers)}) [Constant]"
        node = Node(name, "Constant", "CONSTANT", [], [f"{name}_output"])
        return self._add(
            "IConstantLayer", node, Tensor(node.outputs[0], "FLOAT", list(self._library.Dims(shape))), weights=weights
        )

    @fails_with(None)
    def add_normalization(self, input: Any, scale: Any, bias: Any, axesMask: int) -> Any:
        """Scale and bias have the input's rank and go on to its shape."""
        for tensor in (input, scale, bias):
            self._library.expect(tensor, "ITensor")
        name = f"(Unnamed Layer* {len(self._layers)}) [Normalization]"
        shapes = [tensor._tensor.dims for tensor in (input, scale, bias)]
        if len({len(shape) for shape in shapes}) != 1 or any(
            size not in (1, whole) for shape in shapes[1:] for size, whole in zip(shape, shapes[0])
        ):
            self._library.error(
                self._logger,
                f"INetworkDefinition::addNormalization: Error Code 3: API Usage Error ({shapes} do not go together)",
            )
            return None
        node = Node(
            name, "Normalization", "NORMALIZATION", [tensor.name for tensor in (input, scale, bias)], [f"{name}_output"]
        )
        return self._add(
            "INormalizationLayer",
            node,
            Tensor(node.outputs[0], input._tensor.dtype, list(shapes[0])),
            epsilon=1e-5,
            axes=int(axesMask),
        )

    def _live_layers(self) -> list[Any]:
        """Those that outputs depend on, which is what a builder keeps."""
        makers = {name: layer for layer in self._layers for name in layer._node.outputs}
        waiting, live = [tensor.name for tensor in self._outputs], set()
        while waiting:
            layer = makers.get(waiting.pop())
            if layer is not None and layer not in live:
                live.add(layer)
                waiting += layer._node.inputs
        return [layer for layer in self._layers if layer in live]


def as_8_imports(graph: Graph) -> list[Node]:
    """The nodes as 8.6 makes layers of them: of a cast an identity with an output type; of InstanceNormalization on [N,
    C, L] a plugin on [N, C, L, 1]."""
    made = []
    for node in graph.nodes:
        if node.operator == "Cast":
            made.append(replace(node, layer_type="IDENTITY"))
        elif node.operator == "InstanceNormalization":
            x = graph.tensors[node.inputs[0]]
            before, after = (
                Tensor(f"{node.name} {side} the plugin", x.dtype, [*x.dims, 1]) for side in ("before", "after")
            )
            graph.tensors |= {before.name: before, after.name: after}
            made += [
                Node(f"{node.name} unsqueeze", "Unsqueeze", "SHUFFLE", [x.name], [before.name]),
                replace(node, layer_type="PLUGIN_V2", inputs=[before.name], outputs=[after.name]),
                Node(f"{node.name} squeeze", "Squeeze", "SHUFFLE", [after.name], list(node.outputs)),
            ]
        else:
            made.append(replace(node, inputs=list(node.inputs)))
    return made


class ITensor(Bound):
    __slots__ = ("_network", "_tensor")
    _tensor: Tensor

    @property
    def name(self) -> str:
        return self._tensor.name

    @property
    def shape(self) -> Any:
        return self._library.Dims([evaluate(dim, self._network._symbols) for dim in self._tensor.dims])

    @shape.setter
    def shape(self, value: Any) -> None:
        if not self.is_network_input:
            self._library.error(
                self._network._logger,
                f"ITensor::setDimensions: Error Code 3: API Usage Error ({self.name} is no network input)",
            )
            return
        given = list(self._library.Dims(value))
        self._network._symbols |= {
            name: size for name, size in zip(self._tensor.dims, given) if isinstance(name, str) and size != -1
        }
        self._tensor.dims = [
            name if size == -1 and isinstance(name, str) else size for name, size in zip(self._tensor.dims, given)
        ]

    @property
    def dtype(self) -> Any:
        """In the weakly typed networks of 8, what is half in between reads as "a floating point" (NVIDIA/TensorRT issue
        3435)."""
        types = self._library.DataType
        vague = (
            self._library.major == "8"
            and self._tensor.dtype == "HALF"
            and not self.is_network_input
            and not self.is_network_output
        )
        return types.FLOAT if vague else types.__members__[self._tensor.dtype]

    @property
    def is_shape_tensor(self) -> bool:
        return self._tensor.shape_tensor

    @property
    def is_execution_tensor(self) -> bool:
        return not self._tensor.shape_tensor

    @property
    def is_network_input(self) -> bool:
        return self in self._network._inputs

    @property
    def is_network_output(self) -> bool:
        return self in self._network._outputs


class ILayer(Bound):
    """What get_layer gives, whatever the layer is; `layer.__class__ = trt.IPluginV2Layer` opens what only such a layer
    has."""

    __slots__ = ("_network", "_node", "_output_types", "_precision", "_settings", "metadata", "name")
    _node: Node

    @property
    def type(self) -> Any:
        return self._library.LayerType.__members__[self._node.layer_type]

    @property
    def num_inputs(self) -> int:
        return len(self._node.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._node.outputs)

    def get_input(self, index: int) -> Any:
        return self._network._tensors[self._node.inputs[index]] if 0 <= index < self.num_inputs else None

    def get_output(self, index: int) -> Any:
        return self._network._tensors[self._node.outputs[index]] if 0 <= index < self.num_outputs else None

    def set_input(self, index: int, tensor: Any) -> None:
        self._library.expect(tensor, "ITensor")
        self._node.inputs[index] = tensor.name

    @property
    def precision(self) -> Any:
        return self._precision or self._library.DataType.FLOAT

    @precision.setter
    def precision(self, value: Any) -> None:
        self._library.expect(value, "DataType")
        if self._weakly_typed("setPrecision"):
            self._precision = value

    @property
    def precision_is_set(self) -> bool:
        return self._precision is not None

    def reset_precision(self) -> None:
        self._precision = None

    def get_output_type(self, index: int) -> Any:
        return self._output_types.get(index, self.get_output(index).dtype)

    def set_output_type(self, index: int, dtype: Any) -> None:
        self._library.expect(dtype, "DataType")
        if self._weakly_typed("setOutputType"):
            self._output_types[index] = dtype

    def output_type_is_set(self, index: int) -> bool:
        return index in self._output_types

    def reset_output_type(self, index: int) -> None:
        self._output_types.pop(index, None)

    def _weakly_typed(self, method: str) -> bool:
        if self._network._strongly_typed:
            self._library.error(
                self._network._logger,
                f"ILayer::{method}: Error Code 3: API Usage Error (layer {self.name}: the network is strongly typed)",
            )
        return not self._network._strongly_typed


class Weights(Bound):
    """Reads the array while the network is built; here, the array must have outlived it."""

    __slots__ = ("_array",)

    def __init__(self, a: np.ndarray) -> None:
        self._library.expect(a, np.ndarray)
        self._array = weakref.ref(a)


class IConstantLayer(ILayer):
    __slots__ = ()


class INormalizationLayer(ILayer):
    __slots__ = ()

    epsilon = property(lambda self: self._settings["epsilon"], lambda self, value: self._settings.update(epsilon=value))
    axes = property(lambda self: self._settings["axes"], lambda self, value: self._settings.update(axes=int(value)))


class IPluginV2Layer(ILayer):
    __slots__ = ()

    @property
    def plugin(self) -> Any:
        return self._library.IPluginV2._create(_values=instance_norm(self._network._graph.model, self._node.name))


class IPluginV2(Bound):
    """InstanceNormalization_TRT of 8.6, whose bytes were read off the real one."""

    __slots__ = ("_values",)

    @property
    def plugin_type(self) -> str:
        return "InstanceNormalization_TRT"

    def serialize(self) -> Any:
        epsilon, scale, bias = self._values
        count = len(scale)
        return memoryview(struct.pack(f"<fiQ{count}fQ{count}fif", epsilon, count, count, *scale, count, *bias, 0, 0.0))


class ParserError(Bound):
    __slots__ = ("_error",)

    def code(self) -> Any:
        return self._library.ErrorCode.__members__[self._error.code]

    def desc(self) -> str:
        return self._error.text

    def node(self) -> int:
        return self._error.node

    def node_name(self) -> str:
        return self._error.name

    def node_operator(self) -> str:
        return self._error.operator

    def file(self) -> str:
        return "ModelImporter.cpp"

    def line(self) -> int:
        return 771

    def func(self) -> str:
        return "importModel"

    def local_function_stack(self) -> list[str]:
        return []

    def __str__(self) -> str:
        what = f"with name: {self._error.name} and operator: {self._error.operator} ({self.func()})"
        return f"In node {self.node()} {what}: {self._error.code}: {self.desc()}"


class OnnxParser(OfTheDevice):
    __slots__ = ("_errors", "_flags", "_logger", "_network")

    def __init__(self, network: Any, logger: Any) -> None:
        self._library.expect(network, "INetworkDefinition")
        self._library.expect(logger, "ILogger")
        self._network, self._logger, self._errors, self._flags = network, logger, [], set()
        self._library.plugins_registered = True
        self._settle()

    def parse(self, model: Any, path: str | None = None) -> bool:
        return self._parse("parse", None if path is None else Path(path), bytes(memoryview(model)))

    def parse_from_file(self, model: str) -> bool:
        self._library.expect(model, str)
        return self._parse("parse_from_file", Path(model), None)

    def _parse(self, method: str, path: Path | None, content: bytes | None) -> bool:
        library = self._library
        try:
            if library.faults.hit(method):
                raise Unparsable("the test wants it so", "INTERNAL_ERROR")
            if self._network.has_implicit_batch_dimension:
                raise Unparsable(
                    'Assertion failed: !_importer_ctx.network()->hasImplicitBatchDimension() && "This version of the '
                    "ONNX parser only supports "
                    'TensorRT INetworkDefinitions with an explicit batch dimension."',
                    "INVALID_VALUE",
                )
            graph = read_graph(path, content, library.major)
            unknown = sorted({t.dtype for t in graph.tensors.values()} - library.DataType.__members__.keys())
            if unknown:
                raise Unparsable(f"Unsupported data type: {', '.join(unknown)}", "UNSUPPORTED_NODE")
        except Unparsable as error:
            self._errors.append(library.ParserError._create(_error=error))
            library.error(self._logger, str(self._errors[-1]))
            return False
        opset = max((entry.version for entry in graph.model.opset_import if entry.domain in ("", "ai.onnx")), default=0)
        if library.major == "8" and opset > 17:
            library.log(self._logger, "WARNING", f"opset {opset}: TensorRT 8.6 documents opsets up to 17")
        self._network._fill(graph)
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]

    def clear_errors(self) -> None:
        self._errors.clear()

    def supports_operator(self, op_name: str) -> bool:
        return supports(op_name, self._library.major)

    @property
    def flags(self) -> int:
        return sum(1 << int(flag) for flag in self._flags)

    def set_flag(self, flag: Any) -> None:
        self._library.expect(flag, "OnnxParserFlag")
        self._flags.add(flag)

    def get_flag(self, flag: Any) -> bool:
        return flag in self._flags

    def clear_flag(self, flag: Any) -> None:
        self._flags.discard(flag)
