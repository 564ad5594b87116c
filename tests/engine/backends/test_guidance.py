"""Guidance by evaluation on every backend: rows that are left out, weights and texts that change, and the standard
deviation that stays.

The oracle is ONNX Runtime's plain run of the denoiser on all rows of a job, evaluation by evaluation.
"""

from dataclasses import replace

import numpy as np
import pytest

from engine import Pipeline
from engine.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine.contract import SLOTS
from engine.job import Job, Row, conditioning_at
from tests import fakes
from tests.conftest import PROFILES, copy_bundle
from tests.engine.backends.made_up import request_of

pytestmark = pytest.mark.slow
STEPS = 6
OPTIONS = {"prompt": "a ring", "num_inference_steps": STEPS, "seed": 0, "scheduler": "ddim", "height": 64, "width": 64}
GUIDED = {
    "plain": {},
    "without": {"guidance_scale": 1.0},
    "interval": {"guidance_interval": (0.3, 0.7)},
    "schedule": {"guidance_scale": [9.0, 1.0, 3.0, 1.0, 6.0, 2.0]},
    "rescale": {"guidance_rescale": 0.7, "guidance_scale": 9.0},
    "all": {
        "guidance_rescale": 0.5,
        "guidance_interval": (0.1, 0.6),
        "guidance_scale": lambda evaluation, timestep: 2 + evaluation,
        "scheduler": "dpmpp_2m",
        "num_inference_steps": 5,
    },
    "noise": {"guidance_interval": (0.5, 1.0), "scheduler": "euler_a", "num_inference_steps": 4},
}


@pytest.fixture(scope="module", params=["onnxruntime", "openvino", "tensorrt"])
def pipeline(request, tiny_bundles, tmp_path_factory):
    """A tiny random model in float32 on each backend; TensorRT is a fake."""
    if request.param != "tensorrt":
        pytest.importorskip(request.param)
        with Pipeline.load(tiny_bundles["sd1"], backend=request.param) as pipeline:
            yield pipeline
        return
    from export.tensorrt.build import build_plans

    bundle = copy_bundle(tiny_bundles["sd1"], tmp_path_factory.mktemp("guided"))
    with fakes.install("10.16.1"):
        build_plans(bundle, PROFILES, compare=False, report=lambda message: None)
        with Pipeline.load(bundle, backend="tensorrt") as pipeline:
            yield pipeline


@pytest.fixture(scope="module")
def plain(tiny_bundles):
    """The same model on ONNX Runtime: whose embeddings are arrays."""
    with Pipeline.load(tiny_bundles["sd1"], backend="onnxruntime") as pipeline:
        yield pipeline


def job_of(pipeline, **options) -> Job:
    return pipeline.jobs(request_of(pipeline, {**OPTIONS, **options}))[0]


def oracle(backend: OnnxRuntimeBackend, job: Job) -> np.ndarray:
    """A job's latents after its last evaluation."""
    state = np.zeros((1, SLOTS, *job.latents.shape), np.float32)
    state[0, 0] = job.latents
    for index in range(len(job.table)):
        inputs = {
            "state": state,
            "row_sample": np.zeros(len(job.rows), np.int32),
            "context": np.stack([conditioning_at(row.conditioning, index)["context"] for row in job.rows]),
            "mixing": job.weights[index : index + 1],
            "rescale": np.array([[row.rescale for row in job.rows]], np.float32),
            **{name: array[index : index + 1] for name, array in job.steps.items()},
        }
        unmasked = {"mask": np.ones((1, 1, *job.latents.shape[1:]), np.float32)}
        unmasked |= {name: np.zeros((1, *job.latents.shape), np.float32) for name in ("original", "start_noise")}
        noise = job.drawn(index).get("noise", np.zeros_like(job.latents))
        (state,) = backend.run("denoiser", {**inputs, **unmasked, "noise": noise[None]})
    return state[0, 0]


def run(pipeline, job: Job) -> np.ndarray:
    lanes = pipeline.lanes(1, 64, 64)
    lanes.admit(0, job)
    for index in range(len(job.table)):
        lanes.step([index])
    return lanes.latents([0])[0]


def check_close(found, wanted):
    np.testing.assert_allclose(found, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("options", GUIDED.values(), ids=GUIDED)
def test_rows_that_are_left_out_are_those_without_weight(pipeline, plain, options):
    """The oracle evaluates every row always."""
    check_close(run(pipeline, job_of(pipeline, **options)), oracle(plain._backend, job_of(plain, **options)))


def test_pictures_of_any_guidance_that_join_and_leave_equal_those_made_alone(pipeline):
    """Two lanes, which each new picture joins when one leaves, and the second a step late."""
    jobs = [job_of(pipeline, **{"seed": seed, **options}) for seed, options in enumerate(GUIDED.values())]
    waiting, running, made = list(enumerate(jobs)), {}, {}
    lanes = pipeline.lanes(2, 64, 64)
    while waiting or running:
        free = [lane for lane in range(2) if lane not in running]
        if free and waiting:
            number, job = waiting.pop(0)
            lanes.admit(free[0], job)
            running[free[0]] = (number, job, 0)
        lanes.step([running[lane][2] if lane in running else None for lane in range(2)])
        for lane, (number, job, index) in list(running.items()):
            running[lane] = (number, job, index + 1)
            if index + 1 == len(job.table):
                made[number] = lanes.latents([lane])[0]
                lanes.release(lane)
                del running[lane]
    for number, options in enumerate(GUIDED.values()):
        check_close(made[number], run(pipeline, job_of(pipeline, **{"seed": number, **options})))


def buffers(lanes):
    """The captured step, or the call, that the lanes' jobs are in."""
    return lanes._step if hasattr(lanes, "_step") else lanes._call


def test_evaluations_outside_the_interval_run_half_the_rows_and_build_nothing_again(pipeline):
    job = job_of(pipeline, guidance_interval=(0.3, 0.7))
    used = []
    for _ in range(2):
        lanes = pipeline.lanes(1, 64, 64)
        lanes.admit(0, job)
        for index in range(STEPS):
            lanes.step([index])
            used.append((lanes._packing.rows, buffers(lanes)))
    assert [rows for rows, _ in used] == 2 * [1, 1, 2, 2, 2, 1]
    assert len({id(one) for _, one in used}) == 2


def with_texts(pipeline) -> Job:
    """A job whose prompt changes at evaluation 2, and whose negative prompt alternates."""
    job, other = job_of(pipeline), job_of(pipeline, prompt="a star", negative_prompt="a square")
    negative, prompt = job.rows
    second_negative, second = (row.conditioning for row in other.rows)
    turns = [(index, (negative.conditioning, second_negative)[index % 2]) for index in range(STEPS)]
    return replace(
        job,
        rows=(
            replace(negative, conditioning=turns),
            replace(prompt, conditioning=[(0, prompt.conditioning), (2, second)]),
        ),
    )


def test_a_text_that_changes_counts_from_its_evaluation_on(pipeline, plain):
    job = with_texts(pipeline)
    assert len(set(map(id, job.phases))) == 4
    check_close(run(pipeline, job), oracle(plain._backend, with_texts(plain)))
    assert np.abs(run(pipeline, job) - run(pipeline, job_of(pipeline))).max() > 1e-3


def test_any_number_of_texts_takes_part_and_a_text_alone_may_come_and_go(pipeline, plain):
    """As for prompts joined by AND: each has a weight of its own, and here an interval of its own."""

    def three(one):
        job, other = job_of(one), job_of(one, prompt="a star")
        late = np.where(np.arange(STEPS) < 3, 0.0, 1.5)
        return replace(job, rows=(*job.rows, replace(other.rows[1], weight=late)))

    assert [phase.rows for phase in three(plain).phases] == 3 * [(0, 1)] + 3 * [(0, 1, 2)]
    check_close(run(pipeline, three(pipeline)), oracle(plain._backend, three(plain)))


def test_a_job_without_weight_at_an_evaluation_keeps_one_row():
    rows = tuple(Row({}, np.array([1.0, 0.0])) for _ in range(2))
    job = Job(np.zeros((4, 1, 1), np.float32), [0, 1], rows, {})
    assert [phase.rows for phase in job.phases] == [(0, 1), (0,)]


def test_weights_that_do_not_fit_the_table_are_refused():
    with pytest.raises(ValueError, match="broadcast"):
        _ = Job(np.zeros((4, 1, 1), np.float32), [0, 1], (Row({}, np.ones(3)),), {}).weights
