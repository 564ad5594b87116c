"""What every backend does: the same functions for ONNX Runtime, OpenVINO, TensorRT on the fake GPU in its oldest and
newest version, and the real one.

The oracle is ONNX Runtime's plain run of the same graphs, which the parity tests compare with diffusers.
"""

import threading

import numpy as np
import pytest

from engine import Pipeline
from engine.backends import tensorrt_is_usable
from engine.errors import NumericalError
from engine.text.conditioning import KEPT, Text
from tests import fakes
from tests.conftest import PROFILES, copy_bundle
from tests.engine.backends.made_up import request_of

pytestmark = pytest.mark.slow
PROMPT = "a large red circle on a blue background"
FAST = {"num_inference_steps": 4, "seed": 0, "guidance_scale": 5.0, "progress": False}
FAKES = [f"fake {version}" for version in (fakes.VERSIONS[0], fakes.VERSIONS[-1])]


@pytest.fixture(scope="module")
def oracles(demo_bundle, demo_fp16):
    """The oracle of each bundle."""
    bundles = {"fp32": demo_bundle, "fp16": demo_fp16}
    pipelines = {precision: Pipeline.load(bundle, backend="onnxruntime") for precision, bundle in bundles.items()}
    yield pipelines
    for pipeline in pipelines.values():
        pipeline.close()


@pytest.fixture
def expected(backend, oracles):
    """The oracle of the backend's bundle."""
    return oracles[backend[0].bundle.precision]


@pytest.fixture(scope="module", params=["onnxruntime", "openvino", *FAKES, "tensorrt"])
def backend(request, demo_bundle, demo_fp16, planned, tmp_path_factory):
    """A pipeline of the built-in model on each backend, and how far its latents may be from the oracle's."""
    if request.param == "onnxruntime":
        with Pipeline.load(demo_bundle, backend="onnxruntime", threads=1) as pipeline:
            yield pipeline, 1e-5
    elif request.param == "openvino":
        pytest.importorskip("openvino")
        with Pipeline.load(demo_bundle, backend="openvino") as pipeline:
            yield pipeline, 1e-4
    elif request.param == "tensorrt":
        if not tensorrt_is_usable():
            pytest.skip("there is no GPU with TensorRT here")
        from export.tensorrt.build import build_plans

        bundle = copy_bundle(demo_fp16, tmp_path_factory.mktemp("tensorrt"))
        build_plans(bundle, PROFILES)
        with Pipeline.load(bundle, backend="tensorrt") as pipeline:
            yield pipeline, 3e-2
    else:
        version = request.param.split()[1]
        bundle = planned(version)
        with fakes.install(version), Pipeline.load(bundle, backend="tensorrt") as pipeline:
            yield pipeline, 1e-5


def latents(pipeline, *arguments, **options):
    return pipeline(*arguments, **{**FAST, "output_type": "latent", **options}).images


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"guidance_scale": 1.0},
        {"scheduler": "euler_a"},
        {"scheduler": "pndm"},
        {"scheduler": "dpmpp_2m_karras", "num_inference_steps": 7},
        {"scheduler": "ddim", "eta": 0.7},
        {"height": 96, "width": 72},
        {"num_images_per_prompt": 3},
        {"negative_prompt": "a star"},
        {"num_inference_steps": 1},
    ],
    ids=str,
)
def test_latents_are_the_oracles(backend, expected, options):
    pipeline, tolerance = backend
    wanted = latents(expected, PROMPT, **options)
    np.testing.assert_allclose(latents(pipeline, PROMPT, **options), wanted, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ("a ring:0.5 AND a star:0.7", 2),
        ("a [red:blue:0.5] ring", 2),
        ("a ring BREAK a star", 1),
        ("[a ring BREAK red|a star] AND blue:-1", 2),
    ],
)
def test_prompts_of_several_texts_are_the_oracles(backend, expected, prompt, count):
    """More rows, rows that change, more tokens, and all of these at once."""
    pipeline, tolerance = backend
    options = {"prompt_syntax": "a1111", "num_images_per_prompt": count, "height": 64, "width": 72}
    wanted = latents(expected, prompt, **options)
    np.testing.assert_allclose(latents(pipeline, prompt, **options), wanted, atol=tolerance * np.abs(wanted).max())


def test_pixels_are_the_oracles(backend, expected):
    pipeline, _ = backend
    for options in ({}, {"num_images_per_prompt": 3, "height": 96}):
        pictures = [
            np.stack([np.asarray(image).astype(int) for image in one(PROMPT, **FAST, **options).images])
            for one in (pipeline, expected)
        ]
        assert (np.abs(pictures[0] - pictures[1]) <= 1).mean() > 0.995


def test_the_same_call_gives_the_same_picture_whatever_came_between(backend):
    pipeline, _ = backend
    first = latents(pipeline, PROMPT)
    latents(pipeline, "a star", scheduler="euler_a", guidance_scale=1.0)
    latents(pipeline, [PROMPT, "a ring"], negative_prompt="a star", height=72)
    latents(pipeline, PROMPT, guidance_scale=3.0, num_inference_steps=9)
    np.testing.assert_array_equal(latents(pipeline, PROMPT), first)


def test_more_prompts_than_are_cached_do_not_mix(backend, expected):
    pipeline, tolerance = backend
    count = KEPT + 2  # and the negative prompt
    for i in range(count):
        pipeline._encode([Text(f"a ring number {i}")])
    for prompt in (f"a ring number {count - 1}", "a ring number 3"):
        wanted = latents(expected, prompt)
        np.testing.assert_allclose(latents(pipeline, prompt), wanted, atol=tolerance * np.abs(wanted).max())


def test_a_callback_sees_and_changes_the_latents(backend, expected):
    pipeline, tolerance = backend

    def seen(one):
        given = []

        def callback(_, index, timestep, tensors):
            given.append(tensors["latents"].copy())
            return {"latents": 0.5 * tensors["latents"]} if index == 1 else None

        final = latents(one, PROMPT, callback_on_step_end=callback)
        np.testing.assert_allclose(given[-1], final)
        return np.stack(given)

    wanted = seen(expected)
    np.testing.assert_allclose(seen(pipeline), wanted, atol=tolerance * np.abs(wanted).max())


def test_interrupt_ends_the_loop(backend):
    pipeline, _ = backend

    def callback(one, index, timestep, tensors):
        one.interrupt = index == 1

    result = pipeline(PROMPT, **FAST, callback_on_step_end=callback)
    assert (result.evaluations, result.interrupted, len(result.images)) == (2, True, 1)


def test_an_error_in_a_callback_leaves_the_pipeline_usable(backend):
    pipeline, _ = backend
    wanted = latents(pipeline, PROMPT)

    def callback(*_):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        pipeline(PROMPT, **FAST, callback_on_step_end=callback)
    np.testing.assert_array_equal(latents(pipeline, PROMPT), wanted)


@pytest.fixture
def half(backend, demo_fp16):
    """A pipeline of the model in half precision on the same backend: what overflows there fits into float32."""
    pipeline, _ = backend
    if pipeline.bundle.precision == "fp16":
        yield pipeline
        return
    name = pipeline.description.split()[0].lower().replace("onnx", "onnxruntime")
    with Pipeline.load(demo_fp16, backend=name) as other:
        yield other


def test_overflow_is_an_error_and_not_a_black_picture(half):
    for output_type in ("pil", "latent"):
        with pytest.raises(
            NumericalError, match="the latents hold values that are not finite after 4 evaluations at guidance_scale 5"
        ):
            half(PROMPT, **FAST, latents=np.full((1, 4, 8, 8), 1e6, np.float32), output_type=output_type)
    assert len(half(PROMPT, **FAST).images) == 1


def test_timings_name_every_stage(backend):
    pipeline, _ = backend
    times = pipeline(PROMPT, **FAST).timings
    assert set(times) == {
        "tokenize",
        "text_encoder",
        "prepare",
        "denoise",
        "steps",
        "vae_decoder",
        "total",
        "host",
        "path",
    }
    assert len(times["steps"]) == 4
    assert 0 < sum(times["steps"]) <= times["denoise"] * 1.001
    assert times["path"] in ("plain", "cuda_graph")


def test_calls_from_several_threads_wait_for_each_other(backend):
    pipeline, _ = backend
    wanted = [latents(pipeline, PROMPT, seed=seed) for seed in range(4)]
    made = {}
    threads = [
        threading.Thread(target=lambda seed=seed: made.update({seed: latents(pipeline, PROMPT, seed=seed)}))
        for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(4):
        np.testing.assert_array_equal(made[seed], wanted[seed])


# Lanes, as a server drives them.

REQUESTS = [
    {"prompt": PROMPT, "scheduler": "ddim", "num_inference_steps": 6, "guidance_scale": 5.0, "seed": 1},
    {"prompt": "a green star", "scheduler": "euler_a", "num_inference_steps": 4, "guidance_scale": 1.0, "seed": 2},
    {
        "prompt": "a ring",
        "negative_prompt": "a star",
        "scheduler": "dpmpp_2m_karras",
        "num_inference_steps": 7,
        "guidance_scale": 7.5,
        "seed": 3,
    },
    {"prompt": "a blue square", "scheduler": "pndm", "num_inference_steps": 3, "guidance_scale": 3.0, "seed": 4},
    {"prompt": PROMPT, "scheduler": "ddpm", "num_inference_steps": 5, "guidance_scale": 1.0, "seed": 5},
]

OF_SEVERAL_TEXTS = {"prompt": "a ring BREAK a [red:blue:3] star AND a star:0.5", "prompt_syntax": "a1111",
                    "num_inference_steps": 5, "guidance_scale": 3.0, "seed": 6}  # fmt: skip


def serve(pipeline, jobs, count=2, size=64):
    """Makes every job in so few lanes: a new one joins whenever one leaves, and the second lane starts late."""
    lanes, waiting = pipeline.lanes(count, size, size), list(enumerate(jobs))
    running, at, made, late = {}, [None] * count, {}, 2
    while waiting or running:
        for lane in range(count):
            if lane not in running and waiting and (lane == 0 or late <= 0):
                running[lane] = waiting.pop(0)
                lanes.admit(lane, running[lane][1])
                at[lane] = 0
        lanes.step(at)
        late -= 1
        for lane, (number, job) in list(running.items()):
            at[lane] += 1
            if at[lane] == len(job.table):
                made[number] = lanes.latents([lane])[0], lanes.decode([lane])
                lanes.release(lane)
                at[lane] = None
                del running[lane]
    return [(made[number][0], made[number][1]()) for number in range(len(jobs))]


@pytest.mark.parametrize("options", [REQUESTS, [REQUESTS[0], OF_SEVERAL_TEXTS]], ids=["texts", "several texts"])
def test_pictures_that_join_and_leave_at_different_steps_equal_those_made_alone(backend, options):
    """Other pictures in a call change the rounding of its sums: little in float32, more in half precision."""
    pipeline, _ = backend
    tolerance = 1e-4 if pipeline.bundle.precision == "fp32" else 2e-2
    requests = [request_of(pipeline, one) for one in options]
    jobs = [job for one in requests for job in pipeline.jobs(one)]
    served = serve(pipeline, jobs)
    for one, (found, decoded) in zip(options, served, strict=True):
        alone = pipeline(**one, output_type="latent", progress=False).images[0]
        np.testing.assert_allclose(found, alone, atol=tolerance * np.abs(alone).max())
        picture = np.asarray(pipeline(**one, progress=False).images[0]).astype(int)
        assert decoded.finite.all()
        assert (np.abs(decoded.image[0] - picture) <= 1).mean() > (0.999 if tolerance < 1e-3 else 0.98)


def test_lanes_of_two_sizes_and_calls_between_do_not_disturb_each_other(backend):
    pipeline, _ = backend
    wanted = [latents(pipeline, PROMPT, seed=seed, height=height, width=height) for seed, height in ((1, 64), (2, 72))]
    lanes = []
    for seed, height in ((1, 64), (2, 72)):
        one = request_of(pipeline, {**FAST, "prompt": PROMPT, "seed": seed, "height": height, "width": height})
        lanes.append(pipeline.lanes(1, height, height))
        lanes[-1].admit(0, pipeline.jobs(one)[0])
    for index in range(FAST["num_inference_steps"]):
        for one in lanes:
            one.step([index])
        latents(pipeline, "a star", seed=index)
    for one, expected in zip(lanes, wanted):
        np.testing.assert_allclose(one.latents([0]), expected, atol=1e-5 * np.abs(expected).max())


def test_a_lane_that_waits_stays_where_it_is(backend):
    pipeline, _ = backend
    one = request_of(pipeline, {**FAST, "prompt": [PROMPT, "a ring"], "seed": [1, 2]})
    lanes = pipeline.lanes(2, 64, 64)
    for lane, job in enumerate(pipeline.jobs(one)):
        lanes.admit(lane, job)
    lanes.step([0, 0])
    kept = lanes.latents([1])
    lanes.step([1, None])
    np.testing.assert_array_equal(lanes.latents([1]), kept)
    lanes.step([2, 1])
    assert not np.array_equal(lanes.latents([1]), kept)
