"""Rewrites leave the result as it is and take away work; what they do not fit is left alone."""

import itertools

import numpy as np
import pytest

from engine.backends.openvino.pages import Scratch
from engine.backends.openvino.parts import fix_shapes, split
from engine.backends.openvino.rewrites import FOLD, _constant_like, _float32, fold_upsampling, halve_linears
from engine.bundle import Bundle
from engine.errors import BackendError
from engine.family import STABLE_DIFFUSION

openvino = pytest.importorskip("openvino")
op = openvino.opset13
RANDOM = np.random.default_rng(0)


def normal(*shape, dtype=np.float32):
    return RANDOM.standard_normal(shape).astype(dtype)


def run(model, *inputs):
    request = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    return list(request.infer(list(inputs)).values())


def operators(model):
    return [node.get_type_name() for node in model.get_ordered_ops()]


def rewritten(build, rewrite, *inputs):
    """The operators after a rewrite; the outputs must be those from before it."""
    plain, model = build(), build()
    rewrite(openvino, model, Scratch().copy)
    for actual, expected in zip(run(model, *inputs), run(plain, *inputs), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-4)
    return operators(model)


def upsampled(image, height=2, width=2, **options):
    """`image` enlarged by repeating pixels, as torch's exporter writes it."""
    sizes = [image.get_shape()[2] * height, image.get_shape()[3] * width]
    return op.interpolate(
        image=image,
        scales_or_sizes=op.constant(np.array(sizes, np.int64)),
        mode=options.get("mode", "nearest"),
        shape_calculation_mode="sizes",
        coordinate_transformation_mode="asymmetric",
        nearest_mode=options.get("nearest_mode", "floor"),
        axes=op.constant(np.array([2, 3], np.int64)),
    )


def upsampler(bias=None, kernel=3, stride=1, pad=1, dtype=np.float32, **options):
    weights = np.random.default_rng(1).standard_normal((5, 3, kernel, kernel)).astype(dtype)

    def build():
        image = op.parameter([2, 3, 4, 6], dtype)
        made = op.convolution(
            upsampled(image, **options), op.constant(weights), [stride] * 2, [pad] * 2, [pad] * 2, [1, 1]
        )
        added = made if bias is None else op.add(made, op.constant(np.full(bias, 7.0, dtype)))
        return openvino.Model([op.relu(added)], [image], "upsampler")

    return build


@pytest.mark.parametrize("bias", [None, (1, 5, 1, 1), (1, 1, 1, 1)])
def test_a_convolution_of_a_doubled_image_becomes_four_of_the_small_one(bias):
    found = rewritten(upsampler(bias), fold_upsampling, normal(2, 3, 4, 6))
    assert found.count("Convolution") == 4
    assert "Interpolate" not in found


def test_half_precision_weights_stay_in_half_precision():
    model = upsampler(dtype=np.float16)()
    fold_upsampling(openvino, model, Scratch().copy)
    assert operators(model).count("Convolution") == 4
    assert {
        node.get_element_type().to_dtype() for node in model.get_ordered_ops() if node.get_type_name() == "Convolution"
    } == {np.dtype(np.float16)}


@pytest.mark.parametrize(
    "options",
    [
        {"kernel": 5, "pad": 2},
        {"stride": 2},
        {"pad": 0},
        {"height": 3},
        {"width": 1},
        {"mode": "linear_onnx"},
        {"nearest_mode": "ceil"},
    ],
)
def test_other_convolutions_stay(options):
    found = rewritten(upsampler(**options), fold_upsampling, normal(2, 3, 4, 6))
    assert found.count("Convolution") == 1
    assert "Interpolate" in found


def test_a_doubled_image_that_is_used_otherwise_too_stays_there():
    weights = normal(3, 3, 3, 3)

    def build():
        image = op.parameter([1, 3, 4, 4], np.float32)
        large = upsampled(image)
        return openvino.Model(
            [op.convolution(large, op.constant(weights), [1, 1], [1, 1], [1, 1], [1, 1]), large], [image], "both"
        )

    assert rewritten(build, fold_upsampling, normal(1, 3, 4, 4)).count("Interpolate") == 1


def halved(axis=-1, parts=2, transposed=False, shared=False):
    weights, bias = (np.random.default_rng(1).standard_normal(shape).astype(np.float32) for shape in ((6, 8), (8,)))

    def build():
        x = op.parameter([2, 6, 6], np.float32)
        product = op.matmul(x, op.constant(weights.T if transposed else weights), False, transposed)
        layer = op.add(product, op.constant(bias))
        found = op.split(layer, op.constant(np.array(axis)), parts)
        gated = op.multiply(found.output(0), op.gelu(found.output(1), "erf"))
        return openvino.Model([gated, *([layer] if shared else [])], [x], "halved")

    return build


@pytest.mark.parametrize("axis", [-1, 2])
def test_a_linear_layer_that_is_split_in_halves_becomes_two(axis):
    found = rewritten(halved(axis), halve_linears, normal(2, 6, 6))
    assert (found.count("MatMul"), found.count("Split")) == (2, 0)


@pytest.mark.parametrize("options", [{"axis": 1}, {"axis": 0}, {"parts": 4}, {"transposed": True}, {"shared": True}])
def test_other_linear_layers_stay(options):
    found = rewritten(halved(**options), halve_linears, normal(2, 6, 6))
    assert (found.count("MatMul"), found.count("Split")) == (1, 1)


def test_both_are_found_in_a_real_model(demo_bundle):
    graphs, core = Bundle.open(demo_bundle, verify=False).graphs, openvino.Core()
    decoder = core.read_model(graphs["vae_decoder"])
    fix_shapes(openvino, decoder, {"latents": (1, 4, 8, 8)})
    before = operators(decoder)
    fold_upsampling(openvino, decoder, Scratch().copy)
    assert before.count("Interpolate") > 0
    assert operators(decoder).count("Interpolate") == 0
    denoiser = core.read_model(graphs["denoiser"])
    before = operators(denoiser)
    halve_linears(openvino, denoiser, Scratch().copy)
    assert before.count("Split") > 0
    assert operators(denoiser).count("Split") == 0


def test_a_graph_whose_rows_are_not_first_is_refused():
    shapes = {"state": (1, 3), "row_sample": (0,), "timestep": (1,), "context": (0, 3), "mixing": (1, 0)}

    def denoiser(rows):
        inputs = {
            name: op.parameter(
                [size or rows for size in shape], np.int32 if name == "row_sample" else np.float32, name=name
            )
            for name, shape in shapes.items()
        }
        latents = op.gather(inputs["state"], inputs["row_sample"], op.constant(np.array(0)))
        turned = op.transpose(latents, op.constant(np.array([1, 0])))
        conditioned = op.add(turned, op.unsqueeze(inputs["timestep"], op.constant(np.array(0))))
        guided = op.matmul(inputs["mixing"], op.matmul(inputs["context"], conditioned, False, False), False, False)
        return openvino.Model([guided], list(inputs.values()), "denoiser")

    with pytest.raises(
        BackendError,
        match=r"cannot be shared by the rows of a sample: .* shape \[3, 1\] for a row of each sample and \[3, 2\] for "
        r"all",
    ):
        split(openvino, STABLE_DIFFUSION["denoiser"], denoiser(1), denoiser(2))


def test_the_folded_weights_are_those_that_meet_the_same_pixel():
    for parity, tap in itertools.product((0, 1), range(3)):
        pixel = (parity + tap - 1) // 2 + (1 - parity)
        assert FOLD[parity][:, tap].tolist() == [float(pixel == 0), float(pixel == 1)]


def test_values_of_bfloat16_are_read_and_rounded_as_openvino_does():
    import torch

    values = np.array([[1.0, -3.14159, 1e-30, 65504.0, 1.00390625, 1.01171875, 3e38, 0.0]], np.float32)
    model = op.constant(np.zeros((1, 8), np.float32), openvino.Type.bf16)
    made = _constant_like(openvino, values, model, Scratch().copy)
    assert made.get_element_type() == openvino.Type.bf16
    np.testing.assert_array_equal(_float32(openvino, made), torch.from_numpy(values).bfloat16().float().numpy())


def test_an_operation_that_asks_for_a_type_becomes_one_that_knows_it():
    value, like = op.parameter([-1, 3], np.float32), op.parameter([-1, 3], np.float16)
    value.set_friendly_name("value")
    like.set_friendly_name("like")
    for node, name in ((value, "value"), (like, "like")):
        node.output(0).set_names({name})
    model = openvino.Model([op.convert_like(value, like)], [value, like], "typed")
    fix_shapes(openvino, model, {"value": (2, 3), "like": (2, 3)})
    assert "ConvertLike" not in operators(model)
    assert run(model, normal(2, 3), normal(2, 3, dtype=np.float16))[0].dtype == np.float16
