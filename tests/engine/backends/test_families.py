"""The runtime reads tensors off the contract: a family with one input more, and one with a component less."""

import dataclasses

import numpy as np
import pytest

from engine import Pipeline
from engine.errors import BackendError
from tests import fakes
from tests.engine.backends.made_up import request_of
from tests.families import build_bundle, known, tinted_family, without_encoder_family

pytestmark = pytest.mark.slow

PROMPT = "a large red circle on a blue background"
OPTIONS = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 0, "scheduler": "euler_a"}
BACKENDS = ("onnxruntime", "openvino", "tensorrt")


@pytest.fixture(scope="module")
def tinted(tiny_sources, tiny_bundles):
    family = tinted_family()
    with known(family):
        yield build_bundle(family, tiny_sources["sd1"], tiny_bundles["sd1"].parent)


@pytest.fixture(scope="module", params=BACKENDS)
def pipeline(request, tinted):
    """A pipeline of the family with one input more, on each backend."""
    if request.param != "tensorrt":
        with Pipeline.load(tinted, backend=request.param) as loaded:
            yield loaded
        return
    from export.tensorrt.build import build_plans
    from export.tensorrt.profiles import with_rows

    with fakes.install("10.16.1"):
        shapes = with_rows(dataclasses.replace(Pipeline.load(tinted, backend="onnxruntime").bundle.shapes))
        build_plans(tinted, shapes, compare=False, report=lambda message: None)
        with Pipeline.load(tinted, backend="tensorrt") as loaded:
            yield loaded


def latents(pipeline, *tints):
    """Latents of the same picture with other tints, side by side."""
    (job,) = pipeline.jobs(request_of(pipeline, OPTIONS))
    lanes = pipeline.lanes(len(tints), 64, 64)
    for lane, tint in enumerate(tints):
        (job,) = pipeline.jobs(request_of(pipeline, OPTIONS))
        extras = {"tint": np.full((4, 8, 8), tint, np.float32)}
        lanes.admit(lane, dataclasses.replace(job, extras=extras))
    for index in range(len(job.table)):
        lanes.step([index] * len(tints))
    return lanes.latents(range(len(tints)))


def test_one_more_input_that_changes_once_a_loop_reaches_the_graph(pipeline, tiny_bundles):
    with Pipeline.load(tiny_bundles["sd1"], backend="onnxruntime") as plain:
        expected = plain(**OPTIONS, progress=False, output_type="latent").images[0]
    zero, some = latents(pipeline, 0.0, 0.5)
    np.testing.assert_allclose(zero, expected, atol=1e-4 * np.abs(expected).max())
    assert np.abs(some - zero).max() > 0.01 * np.abs(zero).max()
    np.testing.assert_allclose(latents(pipeline, 0.5)[0], some, atol=1e-4 * np.abs(some).max())


def test_an_input_without_a_value_is_named(pipeline):
    with pytest.raises(BackendError, match="the denoiser's input tint has no value"):
        pipeline(**OPTIONS, progress=False)


@pytest.mark.parametrize("backend", BACKENDS[:2])
def test_a_family_may_have_a_component_less(tiny_sources, tiny_bundles, backend):
    family = without_encoder_family()
    with known(family):
        bundle = build_bundle(family, tiny_sources["sd1"], tiny_bundles["sd1"].parent)
        made = []
        for folder in (bundle, tiny_bundles["sd1"]):
            with Pipeline.load(folder, backend=backend) as pipeline:
                made.append(pipeline(**OPTIONS, progress=False, output_type="np").images)
        np.testing.assert_array_equal(*made)
