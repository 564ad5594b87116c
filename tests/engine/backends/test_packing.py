"""How jobs share a call of the denoiser, where the call is larger than they are, and where there is none."""

import numpy as np
import pytest

from engine import Pipeline
from engine.backends.packing import pack, smallest
from engine.contract import Range, Shapes
from engine.errors import BackendError, ClosedPipelineError, SizeError
from tests.conftest import copy_bundle
from tests.engine.backends.made_up import made_up_job, request_of

SIDE = Range(64, 64, 128)
FIXED = [Shapes(SIDE, SIDE, Range(n, n, n), Range(2 * n, 2 * n, 2 * n)) for n in (4, 2)]
OPTIONS = {"prompt": "a ring", "num_inference_steps": 3, "seed": 0, "scheduler": "ddim"}


def test_the_smallest_call_that_fits_is_taken():
    assert smallest(1, 2, 64, 64, FIXED) == (2, 4)
    assert smallest(2, 5, 64, 64, FIXED) == (4, 8)
    assert smallest(3, 4, 64, 64, [Shapes(SIDE, SIDE, Range(1, 1, 4))]) == (3, 4)
    assert smallest(3, 4, 64, 64, []) == (3, 4)


def test_a_number_of_pictures_has_five_sizes_of_call_between_one_row_and_two_for_each():
    """So that pictures that switch guidance on and off at different steps return to sizes that are ready."""
    for batch in range(1, 33):
        sizes = {smallest(batch, rows, 64, 64, []) for rows in range(batch, 2 * batch + 1)}
        assert len(sizes) <= 5
        assert {(batch, batch), (batch, 2 * batch)} <= sizes
    assert [smallest(8, rows, 64, 64, [])[1] for rows in (8, 9, 10, 15, 16, 17)] == [8, 10, 10, 16, 16, 18]


@pytest.mark.parametrize("asked", [(5, 5, 64, 64), (1, 9, 64, 64), (1, 2, 32, 64), (1, 2, 64, 136)])
def test_what_no_profile_serves_is_an_error(asked):
    with pytest.raises(BackendError, match=r"fit no profile; served: 64:64:128 x 64:64:128, batch 4, 8 U-Net rows; "):
        smallest(*asked, FIXED)


def test_idle_samples_and_rows_have_no_weight():
    jobs = [made_up_job(rows=1), made_up_job(rows=2)]
    packing = pack(jobs, [job.phases[0] for job in jobs], 64, 64, FIXED[:1])
    assert (packing.batch, packing.rows) == (4, 8)
    assert packing.inputs["row_sample"].tolist() == [0, 1, 1, 0, 0, 0, 0, 0]
    weights = [packing.steps(position)["mixing"] for position in range(2)]
    assert [one.shape for one in weights] == [(3, 8), (3, 8)]
    assert [np.flatnonzero(one[0]).tolist() for one in weights] == [[0], [1, 2]]


@pytest.fixture(params=["onnxruntime", "openvino"])
def pair(request, tiny_bundles, tmp_path, edit_manifest):
    """A pipeline for two pictures a call and no other number, and one without that limit."""
    bundle = copy_bundle(tiny_bundles["sd1"], tmp_path)
    edit_manifest(bundle, shapes={"height": [64, 64, 64], "width": [64, 64, 64], "batch": [2, 2, 2]})
    folders = (bundle, tiny_bundles["sd1"])
    pipelines = [Pipeline.load(folder, backend=request.param) for folder in folders]
    yield pipelines
    for pipeline in pipelines:
        pipeline.close()


@pytest.mark.slow
def test_a_picture_alone_in_a_call_for_two_is_the_same(pair):
    two, any_number = pair
    expected = any_number(**OPTIONS, output_type="latent", progress=False).images[0]
    lanes = two.lanes(2, 64, 64)
    (job,) = any_number.jobs(request_of(any_number, OPTIONS))
    lanes.admit(1, job)
    for index in range(3):
        lanes.step([None, index])
        lanes.step([None, None])
    np.testing.assert_allclose(lanes.latents([1])[0], expected, atol=1e-4 * np.abs(expected).max())


def test_a_step_in_which_every_lane_waits_changes_nothing(tiny_bundles):
    with Pipeline.load(tiny_bundles["sd1"], backend="onnxruntime") as pipeline:
        lanes = pipeline.lanes(2, 64, 64)
        jobs = pipeline.jobs(request_of(pipeline, {**OPTIONS, "prompt": ["a ring", "a star"]}))
        lanes.admit(0, jobs[0])
        lanes.step([0, None])
        before = lanes.latents([0])
        lanes.admit(1, jobs[1])
        lanes.step([None, None])
        np.testing.assert_array_equal(lanes.latents([0]), before)


def test_lanes_are_for_sizes_that_the_bundle_serves_and_for_open_pipelines(tiny_bundles):
    with Pipeline.load(tiny_bundles["sd1"], backend="onnxruntime") as pipeline:
        with pytest.raises(SizeError, match="height 100 is not a multiple of 8"):
            pipeline.lanes(1, 100, 64)
        asked = request_of(pipeline, OPTIONS)
    with pytest.raises(ClosedPipelineError):
        pipeline.lanes(1, 64, 64)
    with pytest.raises(ClosedPipelineError):
        pipeline.jobs(asked)
