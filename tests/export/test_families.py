"""What handles a graph's tensors reads the contract: an input more, or a component less, is a line there."""

import json

import numpy as np
import onnx
import pytest

from engine import Bundle
from engine.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine.errors import ManifestError
from export.compare import random_inputs
from export.component import Exporter, GraphFormat
from export.sources.source import Models
from export.verify import check_component
from tests.conftest import ENGINES
from tests.families import TINT, build_bundle, known, recipes_of, tinted_family, without_encoder_family


@pytest.fixture(scope="module")
def tinted(tiny_sources, tiny_bundles):
    """A bundle of the family with a tint."""
    return build_bundle(tinted_family(), tiny_sources["sd1"], ENGINES)


def test_a_graph_with_one_input_more_equals_torch(tiny_sources, tinted):
    family = tinted_family()
    exporter = Exporter(
        tiny_sources["sd1"], family["denoiser"], recipes_of(family)["denoiser"], GraphFormat("fp32", 18)
    )
    with known(family):
        backend = OnnxRuntimeBackend(Bundle.open(tinted).graphs)
    found = check_component(family["denoiser"], backend, exporter.reference(Models(tiny_sources["sd1"])), "fp32")
    assert found.relative_rms < 1e-4


def test_the_new_input_is_dynamic_in_the_graph_and_changes_its_output(tinted):
    family = tinted_family()
    graph = onnx.load(str(tinted / "onnx" / "denoiser.onnx"), load_external_data=False).graph
    shapes = {i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim] for i in graph.input}
    assert shapes[TINT.name] == ["batch", 4, "height", "width"]
    sizes = {"batch": 1, "rows": 2, "tokens": 77, "height": 8, "width": 12, "context_size": 32}
    inputs = random_inputs(family["denoiser"], sizes)
    backend = OnnxRuntimeBackend({"denoiser": tinted / "onnx" / "denoiser.onnx"})
    plain = {**inputs, TINT.name: np.zeros_like(inputs[TINT.name])}
    outputs = [backend.run("denoiser", one)[0][:, 0] for one in (inputs, plain)]
    assert not np.allclose(*outputs)


def test_without_a_tint_it_is_the_plain_denoiser(tiny_bundles, tinted):
    sizes = {"batch": 2, "rows": 3, "tokens": 77, "height": 8, "width": 12, "context_size": 32}
    inputs = random_inputs(tinted_family()["denoiser"], sizes)
    tint = inputs.pop(TINT.name)
    files = {folder: {"denoiser": folder / "onnx" / "denoiser.onnx"} for folder in (tiny_bundles["sd1"], tinted)}
    (plain,) = OnnxRuntimeBackend(files[tiny_bundles["sd1"]]).run("denoiser", inputs)
    (zero,) = OnnxRuntimeBackend(files[tinted]).run("denoiser", {**inputs, TINT.name: np.zeros_like(tint)})
    np.testing.assert_allclose(zero, plain, rtol=0, atol=1e-5)


def test_a_family_may_lack_a_component(tiny_sources, tiny_bundles):
    family = without_encoder_family()
    folder = build_bundle(family, tiny_sources["sd1"], ENGINES)
    with known(family):
        bundle = Bundle.open(folder)
    assert (bundle.family.name, tuple(bundle.graphs)) == ("without-encoder", family.names)
    assert json.loads((folder / "manifest.json").read_text())["family"] == "without-encoder"
    assert not list(folder.glob("onnx/vae_encoder*"))


def test_a_family_that_this_version_does_not_know_is_named(tinted):
    with pytest.raises(ManifestError, match="family is \"tinted\"; it must be one of 'stable-diffusion'"):
        Bundle.open(tinted)
