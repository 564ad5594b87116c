"""Where a plan begins to differ from ONNX Runtime: the same graph with every layer's output kept, compared one by one.

ONNX Runtime's side is Polygraphy's; TensorRT's is a plan that was just built, run as the runtime runs it. Keeping
outputs makes TensorRT fuse less, so that a difference which only a fusion makes disappears: the answer says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engine.contract import Component
from engine.libraries import install_command

from ..compare import difference, tolerance
from ..errors import UsageError

HALF_MAX = 65504.0
LARGE = HALF_MAX / 4
"""Values from which on a product or a sum in half precision is about to overflow."""

FLOATS = (np.dtype(np.float32), np.dtype(np.float16))


@dataclass(frozen=True)
class Layer:
    """A node of the graph and its first output."""

    name: str
    operator: str
    output: str


def every_output(file: Path, inputs: Mapping[str, np.ndarray]) -> tuple[list[Layer], dict[str, np.ndarray]]:
    """The graph's layers in order, and what ONNX Runtime computes for each, as far as it is a float."""
    try:
        from polygraphy import constants
        from polygraphy.backend.onnx import BytesFromOnnx, ModifyOutputs, OnnxFromPath
        from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise UsageError(
            f"diagnosing needs polygraphy, onnx and onnxruntime ({error}): {install_command('tensorrt', 'export')}"
        ) from error
    G_LOGGER.module_severity = G_LOGGER.ERROR
    model = OnnxFromPath(str(file))()
    layers = [Layer(node.name, node.op_type, node.output[0]) for node in model.graph.node]
    marked = ModifyOutputs(model, outputs=constants.MARK_ALL)
    with OnnxrtRunner(SessionFromOnnx(BytesFromOnnx(marked), providers=["CPUExecutionProvider"])) as runner:
        outputs = runner.infer(dict(inputs))
    return layers, {name: np.asarray(value) for name, value in outputs.items() if np.asarray(value).dtype in FLOATS}


def mark_outputs(trt: Any, network: Any, names: Sequence[str]) -> None:
    """Makes tensors of a parsed network outputs, as far as they are in it and floats."""
    wanted, seen = set(names), {network.get_output(i).name for i in range(network.num_outputs)}
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        for k in range(layer.num_outputs):
            tensor = layer.get_output(k)
            if (
                tensor.name in wanted - seen
                and tensor.dtype in (trt.DataType.FLOAT, trt.DataType.HALF)
                and not tensor.is_shape_tensor
            ):
                network.mark_output(tensor)
                seen.add(tensor.name)


def verdict(
    component: Component,
    precision: str,
    layers: Sequence[Layer],
    ours: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    plan_differs: bool,
) -> str:
    """Names the first layer that diverges, its precision and range, and what mends it. `plan_differs` is whether the
    plan itself does."""
    allowed, compared = tolerance(component, precision), 0
    for layer in layers:
        if layer.output not in ours or layer.output not in expected:
            continue
        compared += 1
        value, wanted = ours[layer.output], expected[layer.output]
        usable = np.isfinite(wanted.astype(np.float32))  # masks hold -inf
        finite = bool(np.isfinite(value[usable].astype(np.float32)).all())
        found = _distance(value[usable], wanted[usable]) if finite else float("inf")
        if found > allowed:
            low, high = float(wanted[usable].min()), float(wanted[usable].max())
            kind = {"float16": "half", "float32": "float"}[value.dtype.name]
            told = f"by {found:.1e}" if finite else "with values that are not finite"
            return (
                f"The first layer that diverges is {layer.name} ({layer.operator}, output {layer.output}), {told}; it "
                f"is in {kind} and its values go from "
                f"{low:.4g} to {high:.4g}. {remedy(kind, max(abs(low), abs(high)))}"
            )
    if not plan_differs:
        return f"None of {compared} layers diverges."
    return (
        f"None of {compared} layers diverges while the output of each is kept, which stops TensorRT from fusing them: "
        "a fusion makes the difference. "
        f"Try --optimization-level 2, or --precision fp32"
    )


def _distance(value: np.ndarray, wanted: np.ndarray) -> float:
    return difference(value, wanted).relative_rms if value.size else 0.0


def remedy(kind: str, largest: float) -> str:
    """What to do about a layer of that precision with values so large."""
    if kind == "half" and largest > LARGE:
        return (
            f"Half precision ends at {HALF_MAX:.0f}: keep this layer in float32 (in export/graphs/precision.py, as "
            "norms are), or build the bundle with --precision bf16"
        )
    if kind == "half":
        return (
            "Its range is fine for half precision, so its sums lose digits: keep it in float32 (in "
            "export/graphs/precision.py), or build the bundle with --precision fp32"
        )
    return "It is in float32 already: try --optimization-level 2, and report it"
