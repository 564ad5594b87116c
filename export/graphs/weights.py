"""Which parameter of the model each weight in a graph is: what adapters need to change weights without a new trace."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from torch import nn

from engine.weights import table_file

VIEWS = {"Transpose": "transposed", "Unsqueeze": "unsqueezed"}
"""Operators that torch's exporter puts between a parameter and what uses it. They are folded into a weight that has the
name of their output."""

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


def parameter_names(model: nn.Module) -> dict[int, str]:
    """The name of each parameter in the model's own files, by the object's id. A trace may wrap modules, which renames
    parameters but keeps the objects."""
    return {id(parameter): name for name, parameter in model.named_parameters()}


def write_table(graph: Path, module: nn.Module, names: Mapping[int, str]) -> None:
    """Writes `graph`'s table of weights beside it. `module` was traced; `names` are those of `parameter_names`.

    The table says for each weight that is a parameter: its `name` in the graph, the `parameter`, whether it is
    `transposed`, its `shape` in the graph, its `dtype`, and where its bytes are: at an `offset` of the file of weights,
    or, for the few bytes that ONNX keeps in the graph, as `values` in base64."""
    known = {name: names[id(parameter)] for name, parameter in module.named_parameters() if id(parameter) in names}
    found = [_row(one, known) for one in onnx.load(str(graph), load_external_data=False).graph.initializer]
    order = {name: place for place, name in enumerate(names.values())}
    rows = sorted((row for row in found if row is not None), key=lambda row: order[row["parameter"]])
    lines = ",\n".join(json.dumps(row) for row in rows)
    table_file(graph).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _row(tensor: onnx.TensorProto, known: Mapping[str, str]) -> dict[str, Any] | None:
    traced, _, view = tensor.name.partition(":")
    if traced not in known or tensor.data_type not in DTYPES:
        return None
    where = {entry.key: entry.value for entry in tensor.external_data}
    place = {"offset": int(where.get("offset", 0))} if where else {"values": base64.b64encode(tensor.raw_data).decode()}
    return {
        "name": tensor.name,
        "parameter": known[traced],
        "transposed": view.startswith("transposed"),
        "shape": list(tensor.dims),
        "dtype": DTYPES[tensor.data_type],
        **place,
    }
