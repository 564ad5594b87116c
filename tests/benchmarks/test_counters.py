"""Operations and bytes, against layers counted by hand and against torch's counter."""

import hashlib
import logging
import warnings

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.counters import count, sizes_of
from benchmarks.errors import CountError
from engine.bundle import Bundle
from engine.family import STABLE_DIFFUSION
from export.graphs.recipes import RECIPES
from export.graphs.tracing import dynamic_shapes, example
from export.sources.presets import ARCHITECTURES
from tests import traces

SIZES = sizes_of(64, 48, 1, 2)
WIDTHS = {"context_size": 768, "text_width": 768}
"""Of SD 1.5."""


def graph(tmp_path, nodes, inputs, outputs, weights=None):
    """An ONNX file; a dimension that is a string is dynamic."""
    kind = lambda name, shape: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)  # noqa: E731
    made = helper.make_graph(
        nodes,
        "test",
        [kind(*one) for one in inputs.items()],
        [kind(*one) for one in outputs.items()],
        [
            helper.make_tensor(name, TensorProto.FLOAT, shape, [0.0] * int(torch.tensor(shape).prod()))
            for name, shape in (weights or {}).items()
        ],
    )
    file = tmp_path / "test.onnx"
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)]), file)
    return file


def test_a_convolution_by_hand(tmp_path):
    """4 -> 6 channels in 2 groups, 3 x 3, stride 2, padding 1, on 8 x 6: 4 x 3 outputs of 6 channels, 2 x 9 products
    each."""
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], group=2, strides=[2, 2], pads=[1, 1, 1, 1])
    file = graph(tmp_path, [node], {"x": ["batch", 4, "height", "width"]}, {"y": None}, {"w": [6, 2, 3, 3], "b": [6]})
    found = count(file, SIZES)
    assert found.flop == 2 * (6 * 4 * 3) * (2 * 9)
    assert found.bytes == 4 * (4 * 8 * 6 + 6 * 2 * 9 + 6 + 6 * 4 * 3)
    assert found.weights == 4 * 6 * 2 * 9
    assert found.traffic == 4 * (4 * 8 * 6 + 6 * 4 * 3)


def test_a_transposed_convolution_by_hand(tmp_path):
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])
    file = graph(tmp_path, [node], {"x": ["batch", 4, "height", "width"]}, {"y": None}, {"w": [4, 5, 2, 2]})
    assert count(file, SIZES).flop == 2 * (4 * 8 * 6) * (5 * 4)


def test_matrix_products_by_hand(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Gemm", ["a", "b"], ["c"], transA=1)]
    file = graph(
        tmp_path, nodes, {"x": ["rows", "tokens", 5], "a": [7, 3], "b": [7, 11]}, {"h": None, "c": None}, {"w": [5, 9]}
    )
    found = count(file, SIZES)
    assert [operation.flop for operation in found.operations] == [2 * (2 * 77 * 9) * 5, 2 * (3 * 11) * 7]
    assert found.operations[0].bytes == 4 * (2 * 77 * 5 + 5 * 9 + 2 * 77 * 9)
    assert count(file, SIZES, element_bytes=2).bytes == found.bytes // 2


def test_a_shape_that_the_graph_computes_is_found(tmp_path):
    """x [b, 4, h, w] -> [b, 4, h * w], times its transpose."""

    def ints(name, values):
        value = helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        return helper.make_node("Constant", [], [name], value=value)

    nodes = [
        helper.make_node("Shape", ["x"], ["side"], start=2, end=3),
        helper.make_node("Shape", ["x"], ["other"], start=3),
        helper.make_node("Mul", ["side", "other"], ["area"]),
        ints("front", [1, 4]),
        helper.make_node("Concat", ["front", "area"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["flat", "turned"], ["y"]),
    ]
    assert (
        count(graph(tmp_path, nodes, {"x": ["batch", 4, "height", "width"]}, {"y": None}), SIZES).flop == 2 * 4 * 4 * 48
    )


def test_the_floor_is_the_slower_of_arithmetic_and_memory_for_each_operation(tmp_path):
    nodes = [helper.make_node("MatMul", ["a", "b"], ["c"]), helper.make_node("MatMul", ["v", "b"], ["d"])]
    file = graph(tmp_path, nodes, {"a": [100, 100], "b": [100, 100], "v": [1, 100]}, {"c": None, "d": None})
    large, small = count(file, SIZES).operations
    assert large.flop / 1e3 > large.bytes / 1e2  # bound by arithmetic at these rates
    assert small.flop / 1e3 < small.bytes / 1e2
    assert count(file, SIZES).floor(1e3, 1e2) == large.flop / 1e3 + small.bytes / 1e2


def test_what_cannot_be_counted_is_an_error(tmp_path):
    with pytest.raises(CountError, match="holds Einsum, whose operations are not counted here"):
        count(
            graph(
                tmp_path,
                [helper.make_node("Einsum", ["a", "a"], ["y"], equation="ij,jk->ik")],
                {"a": [3, 3]},
                {"y": None},
            ),
            SIZES,
        )
    with pytest.raises(CountError, match="dimension 'depth'"):
        count(graph(tmp_path, [helper.make_node("Relu", ["a"], ["y"])], {"a": ["depth"]}, {"y": None}), SIZES)
    nodes = [
        helper.make_node("NonZero", ["a"], ["places"]),
        helper.make_node("Cast", ["places"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["a", "b"], ["y"]),
    ]
    with pytest.raises(CountError, match="a shape that cannot be found"):
        count(graph(tmp_path, nodes, {"a": [2, 2]}, {"y": None}), SIZES)


def torch_flop(module, inputs):
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(**inputs)
    return counter.get_total_flops()


def meta_inputs(component, sizes):
    """Inputs of a component at these sizes, on the meta device."""
    traced = example(STABLE_DIFFUSION[component], WIDTHS).inputs
    shapes = STABLE_DIFFUSION[component].shapes({**sizes, **WIDTHS})
    return {name: torch.empty(shape, dtype=traced[name].dtype, device="meta") for name, shape in shapes.items()}


@pytest.mark.parametrize("component", ["text_encoder", "denoiser", "vae_decoder"])
def test_the_built_in_models_graphs_count_as_torch_does(demo_bundle, component):
    from export.sources.checkpoint import resolve

    source, sizes = resolve(None), sizes_of(64, 96, 2, 4)
    module = RECIPES[component].module(source.load(RECIPES[component].part), torch.float32)
    inputs = example(STABLE_DIFFUSION[component], {**sizes, **source.sizes()}).inputs
    expected = torch_flop(module, inputs)
    assert count(Bundle.open(demo_bundle, verify=False).graphs[component], sizes).flop == pytest.approx(
        expected, rel=0.01
    )


def meta_graph(component, module):
    """The ONNX graph of a module without weights, kept in build/ as long as nothing changes that it is made of."""
    key = hashlib.sha256("\n".join([traces.code(), component, traces.settings(module)]).encode()).hexdigest()
    return traces.kept(key, lambda folder: write_meta_graph(component, module, folder)) / f"{component}.onnx"


def write_meta_graph(component, module, folder):
    """Traces on torch's meta device; the tensors are named but not stored."""
    import onnx_ir

    contract = STABLE_DIFFUSION[component]
    inputs = example(contract, WIDTHS).inputs
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            kwargs={name: value.to("meta") for name, value in inputs.items()},
            dynamo=True,
            opset_version=18,
            optimize=False,
            verbose=False,
            input_names=list(contract.input_names),
            output_names=list(contract.output_names),
            dynamic_shapes=dynamic_shapes(contract),
        )
    for name, value in program.model.graph.initializers.items():
        tensor = value.const_value
        if getattr(getattr(tensor, "raw", None), "is_meta", False):
            value.const_value = onnx_ir.ExternalTensor(
                "absent.data", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name
            )
    onnx.save(onnx_ir.to_proto(program.model), folder / f"{component}.onnx")


def stable_diffusion_15(component):
    """A component of SD 1.5 on the meta device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    architecture = ARCHITECTURES["sd15"]
    makers = {
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**architecture.text_encoder)),
        "unet": lambda: UNet2DConditionModel(**architecture.unet),
        "vae": lambda: AutoencoderKL(**architecture.vae),
    }
    with torch.device("meta"):
        return RECIPES[component].module(makers[RECIPES[component].part](), torch.float32).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("component", "published"), [("text_encoder", 0.0266e12), ("denoiser", 2 * 0.8033e12), ("vae_decoder", 2.51e12)]
)
def test_torch_counts_for_stable_diffusion_15_at_512_x_512_what_was_published(component, published):
    """And the test of the built-in model shows that its graphs count as torch does."""
    module, sizes = stable_diffusion_15(component), sizes_of(512, 512, 1, 2)
    assert torch_flop(module, meta_inputs(component, sizes)) == pytest.approx(published, rel=0.01)


@pytest.mark.slow
def test_the_graph_of_stable_diffusion_15s_decoder_counts_as_torch_does():
    """Its denoiser would take a minute to trace."""
    module, sizes = stable_diffusion_15("vae_decoder"), sizes_of(512, 512, 1, 2)
    expected = torch_flop(module, meta_inputs("vae_decoder", sizes))
    assert count(meta_graph("vae_decoder", module), sizes).flop == pytest.approx(expected, rel=0.01)
