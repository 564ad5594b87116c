"""The graphs are what every TensorRT can read, and what was rewritten for it changes no bit of their outputs."""

import onnx
import pytest
from onnx import helper, numpy_helper

from engine.backends.onnxruntime import OnnxRuntimeBackend
from engine.contract import COMPONENTS
from export.compare import random_inputs
from export.graphs.tracing import fuses_attention


def as_torch_exports_it(graph: onnx.GraphProto) -> int:
    """Puts back what torch's exporter writes, `Shape` with `start` and `end` for `Shape` then `Slice`; how many there
    are."""
    constants = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.name.endswith(("_start", "_end"))
    }
    measured = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "Shape"}
    slices = [node for node in graph.node if node.op_type == "Slice" and node.input[0] in measured]
    for node in slices:
        start, end = (int(constants[name][0]) for name in node.input[1:])
        node.CopyFrom(helper.make_node("Shape", [measured[node.input[0]]], [node.output[0]], start=start, end=end))
    return len(slices)


@pytest.mark.parametrize("component", COMPONENTS)
def test_sizes_are_whole_shapes_and_slices_with_the_same_outputs(tiny_fp16, component, tmp_path):
    """TensorRT 8.6 ignores Shape's start and end."""
    file = tiny_fp16 / "onnx" / f"{component}.onnx"
    model = onnx.load(str(file))
    assert not [node.name for node in model.graph.node if node.op_type == "Shape" and node.attribute]
    assert as_torch_exports_it(model.graph) > 0
    onnx.save_model(model, str(tmp_path / "torch.onnx"))
    inputs = random_inputs(component, 2, 3, 9, 12, 32)
    for ours, torchs in zip(
        *(OnnxRuntimeBackend({component: graph}).run(component, inputs) for graph in (file, tmp_path / "torch.onnx"))
    ):
        assert ours.tobytes() == torchs.tobytes()


def test_attention_is_one_operator_only_where_a_fused_kernel_takes_it():
    """TensorRT has none for the VAE's head of 512, and none in float32."""
    assert [fuses_attention(component, "fp16", 23) for component in COMPONENTS] == [True, True, False, False]
    assert not any(
        fuses_attention(component, precision, opset)
        for component in COMPONENTS
        for precision, opset in (("fp32", 23), ("fp16", 18))
    )
