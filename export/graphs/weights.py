"""Which parameter of the model each weight in a graph is: what adapters need to change weights without a new trace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import nn

from engine.weights import table_file

VIEWS = {"Transpose": "transposed", "Unsqueeze": "unsqueezed"}
"""Operators that torch's exporter puts between a parameter and what uses it. They are folded into a weight that has the
name of their output."""

LARGEST_INSIDE = 256
"""Bytes of what stays in the graph."""

DTYPES: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float32",
    onnx.TensorProto.FLOAT16: "float16",
    onnx.TensorProto.BFLOAT16: "bfloat16",
}


Uses = Sequence[tuple[ir.Node, int, str]]
"""Where a weight is an input: the node, the number of the input, and the weight's name."""


def name_views(model: ir.Model) -> Uses:
    """Names each view of a parameter NAME:transposed or NAME:unsqueezed, and so the weight that it is folded into.
    Returns what uses the weights."""
    uses = []
    for value in list(model.graph.initializers.values()):
        for number, (node, place) in enumerate(list(value.uses())):
            if place == 0 and node.op_type in VIEWS:
                view = _last(node.outputs[0])
                view.name = f"{value.name}:{VIEWS[node.op_type]}{number or ''}"
                uses += [(use.node, use.idx, view.name) for use in view.uses()]
            else:
                uses.append((node, place, str(value.name)))
    return uses


def split_equal(model: ir.Model, uses: Uses) -> None:
    """The optimizer makes one weight of small ones that are equal, such as those of norms that were never trained. An
    adapter may change one of them, so each becomes a weight of its own again."""
    graph = model.graph
    for node, place, name in uses:
        if node.graph is not graph:
            continue
        kept = node.inputs[place]
        if kept is None or kept.name == name or kept.const_value is None:
            continue
        if name not in graph.initializers:
            tensor = ir.tensor(kept.const_value.numpy(), kept.const_value.dtype, name)
            graph.register_initializer(ir.Value(name=name, shape=kept.shape, type=kept.type, const_value=tensor))
        node.replace_input_with(place, graph.initializers[name])


def _last(value: ir.Value) -> ir.Value:
    """What a view is folded into, with the casts behind it."""
    uses = list(value.uses())
    if len(uses) == 1 and uses[0].node.op_type in ("Cast", "CastLike", "Identity"):
        return _last(uses[0].node.outputs[0])
    return value


def save(model: ir.Model, file: Path, parameters: Set[str]) -> None:
    """Writes a graph. Every parameter goes into `file`.data, where ONNX Runtime can replace it, and what else is large;
    shapes and the like stay in the graph."""
    kept_apart = [
        value
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and (_traced(str(value.name)) in parameters or value.const_value.nbytes > LARGEST_INSIDE)
    ]
    tensors = [value.const_value for value in kept_apart if value.const_value is not None]
    written = ir.external_data.convert_tensors_to_external(tensors, file.parent, f"{file.name}.data")
    for value, tensor in zip(kept_apart, written, strict=True):
        value.const_value = tensor
    ir.save(model, file)


def _traced(name: str) -> str:
    """The parameter's name in the traced module."""
    return name.partition(":")[0]


def parameter_names(model: nn.Module) -> dict[int, str]:
    """The name of each parameter in the model's own files, by the object's id. A trace may wrap modules, which renames
    parameters but keeps the objects."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def write_table(graph: Path, module: nn.Module, names: Mapping[int, str]) -> None:
    """Writes `graph`'s table of weights beside it. `module` was traced; `names` are those of `parameter_names`.

    The table says for each weight that is a parameter: its `name` in the graph, the `parameter`, whether it is
    `transposed`, its `shape` in the graph, its `dtype`, and the `offset` of its bytes in the file of weights."""
    known = {name: names[id(parameter)] for name, parameter in module.named_parameters() if id(parameter) in names}
    found = [_row(one, known) for one in onnx.load(str(graph), load_external_data=False).graph.initializer]
    order = {name: place for place, name in enumerate(names.values())}
    rows = sorted((row for row in found if row is not None), key=lambda row: order[row["parameter"]])
    lines = ",\n".join(json.dumps(row) for row in rows)
    table_file(graph).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _row(tensor: onnx.TensorProto, known: Mapping[str, str]) -> dict[str, Any] | None:
    where = {entry.key: entry.value for entry in tensor.external_data}
    if _traced(tensor.name) not in known or tensor.data_type not in DTYPES or not where:
        return None
    return {
        "name": tensor.name,
        "parameter": known[_traced(tensor.name)],
        "transposed": ":transposed" in tensor.name,
        "shape": list(tensor.dims),
        "dtype": DTYPES[tensor.data_type],
        "offset": int(where.get("offset", 0)),
    }
