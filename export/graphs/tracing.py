"""Torch modules to ONNX files: trace with every dimension dynamic, weights in one file beside the graph, check."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from torch import nn
from torch.export import Dim

from engine.contract import INPUTS, LATENT_CHANNELS, OUTPUTS, PROMPT_TOKENS, SLOTS, VAE_FACTOR

from ..errors import ToOnnxError

OPSET = 18
"""The lowest that torch's exporter writes properly. TensorRT 8.6 documents opsets up to 17 and misreads what later ones
changed, which these graphs do
without: sizes are `Shape` then `Slice`, and no reduction but ReduceSum has its axes as an input. Every TensorRT from
8.6 can parse them."""

ATTENTION_OPSET = 23
"""The first that has attention as one operator, which TensorRT parses from 10.14 on."""

FUSED_COMPONENTS = ("text_encoder", "denoiser")
"""Whose attention becomes one operator there. TensorRT runs that operator as a fused kernel or not at all, and its
kernels are for half precision and heads of 16 to 256 in steps of 8; the VAE has one head of 512."""


def fuses_attention(component: str, precision: str, opset: int) -> bool:
    """Whether a component's graph leaves attention to one operator."""
    return opset >= ATTENTION_OPSET and component in FUSED_COMPONENTS and precision != "fp32"


@dataclass(frozen=True)
class Example:
    """Inputs to trace a component with, and which of their dimensions are dynamic (by name)."""

    inputs: dict[str, torch.Tensor]
    dynamic: dict[str, dict[int, str]]


def example(
    component: str,
    context_size: int,
    batch: int = 2,
    rows: int = 3,
    height: int = 16,
    width: int = 24,
    tokens: int = PROMPT_TOKENS,
    seed: int = 0,
) -> Example:
    """Random inputs of a component. No two sizes are equal and none is 1, so that tracing does not confuse them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    plane = {0: "batch", 2: "height", 3: "width"}
    if component == "text_encoder":
        ids = torch.randint(0, 256, (rows, PROMPT_TOKENS), generator=generator, dtype=torch.int32)
        return Example({"input_ids": ids}, {"input_ids": {0: "rows"}})
    if component == "denoiser":
        inputs = {
            "state": normal(batch, SLOTS, LATENT_CHANNELS, height, width),
            "row_sample": torch.arange(rows, dtype=torch.int32) % batch,
            "context": normal(rows, tokens, context_size),
            "timestep": torch.linspace(999.0, 3.5, batch),
            "mixing": normal(batch, rows),
            "update": normal(batch, SLOTS, SLOTS + 2),
            "noise": normal(batch, LATENT_CHANNELS, height, width),
        }
        dynamic = {
            "state": {0: "batch", 3: "height", 4: "width"},
            "row_sample": {0: "rows"},
            "context": {0: "rows", 1: "tokens"},
            "timestep": {0: "batch"},
            "mixing": {0: "batch", 1: "rows"},
            "update": {0: "batch"},
            "noise": plane,
        }
        return Example(inputs, dynamic)
    if component == "vae_decoder":
        return Example({"latents": normal(batch, LATENT_CHANNELS, height, width)}, {"latents": plane})
    image = torch.randint(
        0, 256, (batch, VAE_FACTOR * height, VAE_FACTOR * width, 3), generator=generator, dtype=torch.uint8
    )
    return Example({"image": image}, {"image": {0: "batch", 1: "8*height", 2: "8*width"}})


def export_onnx(component: str, module: nn.Module, traced: Example, file: Path, opset: int = OPSET) -> None:
    """Writes `file` and `file`.data, checked by onnx. ToOnnxError if torch or onnx refuses."""
    dimensions = {name: Dim(name, min=1, max=4096) for name in ("batch", "rows", "tokens", "height", "width")}
    dimensions |= {f"8*{name}": VAE_FACTOR * dimensions[name] for name in ("height", "width")}
    dynamic = {
        name: {axis: dimensions[size] for axis, size in traced.dynamic[name].items()} for name in INPUTS[component]
    }
    torch_log = logging.getLogger("torch.onnx")
    level = torch_log.level
    try:
        torch_log.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                kwargs=traced.inputs,
                dynamo=True,
                opset_version=opset,
                input_names=list(INPUTS[component]),
                output_names=list(OUTPUTS[component]),
                dynamic_shapes=dynamic,
                verbose=False,
            )
            assert program is not None
            _measure_after_cast(program.model)
            _slice_whole_shapes(program.model)
            program.save(str(file), external_data=True)
        onnx.checker.check_model(str(file))
    except OSError:
        raise
    except Exception as error:  # whatever tracing raises: the message of each is the diagnosis
        raise ToOnnxError(f"{component} could not be exported: {type(error).__name__}: {error}") from error
    finally:
        torch_log.setLevel(level)


def _measure_after_cast(model: ir.Model) -> None:
    """Reads the sizes of a uint8 input off the float that it is cast to: TensorRT lets nothing but casts read such an
    input."""
    for value in model.graph.inputs:
        users = [use.node for use in value.uses()]
        casts = [node for node in users if node.op_type == "Cast"]
        if not casts or value.dtype != ir.DataType.UINT8:
            continue
        model.graph.remove(casts[0])
        model.graph.insert_before(model.graph[0], casts[0])
        for node in users:
            if node.op_type == "Shape":
                node.replace_input_with(0, casts[0].outputs[0])


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
