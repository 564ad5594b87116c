"""Which parameter of the model each weight in a graph is: what adapters need to change weights without a new trace."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
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


def name_views(model: ir.Model) -> None:
    """Names each view of a parameter NAME:transposed or NAME:unsqueezed, and so the weight that it is folded into."""
    for value in list(model.graph.initializers.values()):
        for number, (node, place) in enumerate(list(value.uses())):
            if place == 0 and node.op_type in VIEWS:
                _last(node.outputs[0]).name = f"{value.name}:{VIEWS[node.op_type]}{number or ''}"


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
