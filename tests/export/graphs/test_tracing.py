"""The graphs are what every TensorRT can read, and what was rewritten for it changes no bit of their outputs."""

import onnx
import pytest
from onnx import helper, numpy_helper

from engine.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine.family import STABLE_DIFFUSION
from export.compare import random_inputs
from export.graphs.recipes import RECIPES
from export.graphs.tracing import EXAMPLE_SIZES, example


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


@pytest.mark.parametrize("component", [name for name in STABLE_DIFFUSION.names if name != "text_encoder"])
def test_sizes_are_whole_shapes_and_slices_with_the_same_outputs(tiny_fp16, component, tmp_path):
    """TensorRT 8.6 ignores Shape's start and end. The text encoder has neither: it slices nothing."""
    file = tiny_fp16 / "onnx" / f"{component}.onnx"
    model = onnx.load(str(file))
    assert not [node.name for node in model.graph.node if node.op_type == "Shape" and node.attribute]
    assert as_torch_exports_it(model.graph) > 0
    onnx.save_model(model, str(tmp_path / "torch.onnx"))
    sizes = {"batch": 2, "rows": 3, "tokens": 77, "height": 9, "width": 12, "context_size": 32}
    inputs = random_inputs(STABLE_DIFFUSION[component], sizes)
    for ours, torchs in zip(
        *(OnnxRuntimeBackend({component: graph}).run(component, inputs) for graph in (file, tmp_path / "torch.onnx"))
    ):
        assert ours.tobytes() == torchs.tobytes()


def test_attention_is_one_operator_only_where_a_fused_kernel_takes_it():
    """TensorRT has none for the VAE's head of 512, and none in float32."""
    fusing = {name for name, recipe in RECIPES.items() if recipe.fuses_attention("fp16", 23)}
    assert fusing == {"text_encoder", "denoiser"}
    for recipe in RECIPES.values():
        assert not recipe.fuses_attention("fp32", 23)
        assert not recipe.fuses_attention("fp16", 18)


def test_every_component_has_a_recipe_and_is_traced_the_largest_last():
    assert set(RECIPES) == set(STABLE_DIFFUSION.names)
    assert list(RECIPES)[-1] == "denoiser"


def test_no_two_sizes_of_an_example_are_equal_and_none_is_1():
    sizes = list(EXAMPLE_SIZES.values())
    assert len(set(sizes)) == len(sizes)
    assert 1 not in sizes


def test_an_example_is_what_the_contract_says():
    traced = example(STABLE_DIFFUSION["denoiser"], {"context_size": 32, "rows": 5})
    assert traced.inputs["context"].shape == (5, 77, 32)
    assert traced.dynamic["context"] == {0: "rows", 1: "tokens"}
    assert traced.dynamic["update"] == {0: "batch"}
    image = example(STABLE_DIFFUSION["vae_encoder"], {})
    assert image.dynamic == {"image": {0: "batch", 1: "8*height", 2: "8*width"}}
    assert image.inputs["image"].shape == (2, 128, 192, 3)


def test_random_inputs_show_every_index_and_the_whole_range():
    inputs = random_inputs(STABLE_DIFFUSION["denoiser"], {**EXAMPLE_SIZES, "context_size": 32, "rows": 5})
    assert inputs["row_sample"].tolist() == [0, 1, 0, 1, 0]
    assert inputs["timestep"].tolist() == [999.0, 3.5]
    assert (inputs["update"][:, 0] == [0, 0, 0, 0, 0, 1, 0]).all()
    skips = random_inputs(STABLE_DIFFUSION["text_encoder"], {**EXAMPLE_SIZES, "text_width": 8})["skip"]
    assert (set(skips.tolist()), skips.dtype) == ({0, 1}, "int32")
