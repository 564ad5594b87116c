"""What a graph's table of weights says is what the graph holds."""

import json

import numpy as np
import pytest
import torch

from engine.errors import ManifestError
from engine.weights import Weight, read_weights, table_file
from export.sources.checkpoint import resolve

COMPONENTS = {"text_encoder": "text_encoder", "denoiser": "unet"}


@pytest.mark.slow
@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("kind", ["demo", "sd1"])
def test_every_parameter_has_a_weight_of_its_own(request, kind, component):
    """Also where many are equal: the norms of the random models are all ones and zeros."""
    if kind == "demo":
        bundle, source = request.getfixturevalue("demo_bundle"), resolve(None)
    else:
        bundle, source = (request.getfixturevalue(f"tiny_{what}")[kind] for what in ("bundles", "sources"))
    model = source.load(COMPONENTS[component])
    parameters = {name: value.detach().numpy() for name, value in model.named_parameters()}
    table = read_weights(bundle / "onnx" / f"{component}.onnx")
    assert set(parameters) - set(table) <= {"embeddings.token_embedding.weight"}  # its vectors are a file of their own
    every = [weight for weights in table.values() for weight in weights]
    assert len({weight.values.ctypes.data for weight in every}) == len(every)
    for weight in every:
        values = weight.read()
        assert np.array_equal(values.reshape(-1), parameters[weight.parameter].reshape(-1))
        assert weight.packed(values).tobytes() == weight.values.tobytes()


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "<f2"), ("bfloat16", "<u2")])
@pytest.mark.parametrize("transposed", [False, True])
def test_half_precision_is_rounded_as_torch_does(dtype, stored, transposed):
    values = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    bits = values.to(getattr(torch, dtype)).view(torch.int16).numpy().astype("<i2")
    weight = Weight("w", "w", transposed, (5, 3), dtype, bits.reshape(-1).view(np.uint8))
    assert np.array_equal(weight.packed(weight.read()).view("<i2"), bits)
    exact = values.numpy().T if transposed else values.numpy()
    assert np.array_equal(weight.packed(exact).view("<i2"), bits)
    assert weight.packed(exact).dtype == stored


ROW = {"name": "w", "parameter": "w", "transposed": False, "shape": [2, 3], "dtype": "float32", "offset": 0}


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"{}{", b"[[]]", b"{\"a\": 1}", *(json.dumps([{**ROW, **wrong}]).encode() for wrong in (
        {"offset": 8}, {"shape": [4, 9]}, {"dtype": "int4"}, {"shape": None}, {"offset": "x"}, {"shape": ["9" * 9999]},
    ))],
)  # fmt: skip
def test_a_damaged_table_is_named(tmp_path, content):
    graph = tmp_path / "denoiser.onnx"
    (tmp_path / "denoiser.onnx.data").write_bytes(np.zeros(6, "<f4").tobytes())
    table_file(graph).write_bytes(json.dumps([ROW]).encode())
    assert read_weights(graph)["w"][0].read().shape == (2, 3)
    table_file(graph).write_bytes(content)
    with pytest.raises(ManifestError, match=r"denoiser\.onnx\.weights\.json can't be read"):
        read_weights(graph)
