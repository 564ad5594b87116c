"""Torch modules to ONNX files: trace with every dimension dynamic, weights in one file beside the graph, check."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from engine.contract import DYNAMIC, PROMPT_TOKENS, Component, Sizes

from ..compare import random_inputs
from ..errors import ToOnnxError
from .weights import name_views, save, split_equal

OPSET = 18
"""The lowest that torch's exporter writes properly. TensorRT 8.6 documents opsets up to 17 and misreads what later ones
changed, which these graphs do
without: sizes are `Shape` then `Slice`, and no reduction but ReduceSum has its axes as an input. Every TensorRT from
8.6 can parse them."""

ATTENTION_OPSET = 23
"""The first that has attention as one operator, which TensorRT parses from 10.14 on."""

EXAMPLE_SIZES = {"batch": 2, "rows": 3, "tokens": PROMPT_TOKENS, "height": 16, "width": 24}
"""No two are equal and none is 1, so that tracing does not confuse them."""

LARGEST_SIZE = 4096


@dataclass(frozen=True)
class Example:
    """Inputs to trace a component with, and which of their dimensions are dynamic: axis and what the contract calls
    it."""

    inputs: dict[str, torch.Tensor]
    dynamic: dict[str, dict[int, str]]


def example(component: Component, sizes: Sizes, seed: int = 0) -> Example:
    """Random inputs of a component. `sizes` are the model's, and those that a call chooses where they are not to be
    EXAMPLE_SIZES."""
    inputs = random_inputs(component, {**EXAMPLE_SIZES, **sizes}, seed)
    return Example(
        {name: torch.from_numpy(value) for name, value in inputs.items()},
        {tensor.name: tensor.dynamic for tensor in component.inputs},
    )


def dynamic_shapes(component: Component) -> dict[str, dict[int, Any]]:
    """The dynamic dimensions of a component's inputs as torch's exporter takes them."""
    dims = {name: Dim(name, min=1, max=LARGEST_SIZE) for name in DYNAMIC}
    return {tensor.name: {axis: _dim(dim, dims) for axis, dim in tensor.dynamic.items()} for tensor in component.inputs}


def _dim(dim: str, dims: Mapping[str, Any]) -> Any:
    """`height`, or `8*height`."""
    factor, _, name = dim.rpartition("*")
    return int(factor) * dims[name] if factor else dims[name]


def export_onnx(component: Component, module: nn.Module, sizes: Sizes, file: Path, opset: int = OPSET) -> None:
    """Writes `file` and `file`.data, checked by onnx. `sizes` are the model's. ToOnnxError if torch or onnx refuses."""
    try:
        with _quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                module,
                kwargs=example(component, sizes).inputs,
                dynamo=True,
                opset_version=opset,
                input_names=list(component.input_names),
                output_names=list(component.output_names),
                dynamic_shapes=dynamic_shapes(component),
                verbose=False,
                optimize=False,
            )
            assert program is not None
            uses = name_views(program.model)
            program.optimize()
            split_equal(program.model, uses)
            _slice_whole_shapes(program.model)
            save(program.model, file, {name for name, _ in module.named_parameters()})
        onnx.checker.check_model(str(file))
    except OSError:
        raise
    except Exception as error:  # whatever tracing raises: the message of each is the diagnosis
        raise ToOnnxError(f"{component.name} could not be exported: {type(error).__name__}: {error}") from error


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Without the notes and warnings of torch's exporter."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _slice_whole_shapes(model: ir.Model) -> None:
    """Makes of each `Shape` with `start` and `end` a `Shape` and a `Slice` with constant bounds: the importer of
    TensorRT 8.6 ignores both attributes."""
    graph = model.graph
    for node in list(graph):
        if node.op_type != "Shape":
            continue
        measured, output = node.inputs[0], node.outputs[0]
        assert measured is not None
        assert measured.shape is not None
        rank = len(measured.shape)
        start, stop, _ = slice(node.attributes.get_int("start", 0), node.attributes.get_int("end", rank)).indices(rank)
        nodes = [ir.node("Shape", [measured], name=f"{node.name}_whole", metadata_props=dict(node.metadata_props))]
        nodes[0].outputs[0].name = f"{output.name}_whole"
        if (start, stop) != (0, rank):
            bounds = [
                _constant(graph, f"{output.name}_{name}", value) for name, value in (("start", start), ("end", stop))
            ]
            nodes.append(
                ir.node(
                    "Slice", [nodes[0].outputs[0], *bounds], name=node.name, metadata_props=dict(node.metadata_props)
                )
            )
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [output], [nodes[-1].outputs[0]])


def _constant(graph: ir.Graph, name: str, value: int) -> ir.Value:
    """A new initializer [1] of int64."""
    made = ir.Value(
        name=name,
        shape=ir.Shape([1]),
        type=ir.TensorType(ir.DataType.INT64),
        const_value=ir.tensor(np.array([value], np.int64), name=name),
    )
    graph.register_initializer(made)
    return made
