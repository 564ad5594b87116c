"""TensorRT's lanes on the fake GPU: what a step copies and when, where states lie, and which memory is used again."""

import gc
from dataclasses import replace

import numpy as np
import pytest

from engine import Pipeline
from engine import errors as e
from engine.backends.tensorrt import engines, pinned, rows
from engine.backends.tensorrt.cuda import Device, Stream
from engine.backends.tensorrt.engines import Engine
from engine.contract import SLOTS, Range, Shapes
from engine.sampling.noise import TorchGenerator
from export.tensorrt import build as to_tensorrt
from export.tensorrt import profiles as to_profiles
from tests import fakes
from tests.conftest import copy_bundle
from tests.engine.backends.made_up import request_of
from tests.fakes.cuda_types import CUresult

pytestmark = pytest.mark.slow

PROMPT = "a large red circle on a blue background"
STEPS = 6
VERSION = "10.16.1"


@pytest.fixture
def machine():
    with fakes.install(VERSION) as machine:
        yield machine


@pytest.fixture
def pipeline(planned, machine):
    with Pipeline.load(planned(VERSION), backend="tensorrt") as pipeline:
        yield pipeline


def job(pipeline, seed=0, steps=STEPS, **options):
    arguments = {"prompt": PROMPT, "seed": seed, "num_inference_steps": steps, "height": 64, "width": 64, **options}
    return pipeline.jobs(request_of(pipeline, arguments))[0]


def admitted(pipeline, *jobs, size=64):
    lanes = pipeline.lanes(len(jobs), size, size)
    for lane, one in enumerate(jobs):
        lanes.admit(lane, one)
    return lanes


def alone(pipeline, steps=STEPS, size=64, **options):
    """A job's latents after all evaluations, and its pixels."""
    lanes = admitted(pipeline, job(pipeline, steps=steps, height=size, width=size, **options), size=size)
    for index in range(steps):
        lanes.step([index])
    return lanes.latents([0]), lanes.decode([0])().image


def copied(machine, work):
    """Bytes that `work` copied to the GPU, once that has done it."""
    before = machine.cuda.counts.copied_bytes["H2D"]
    work()
    return machine.cuda.counts.copied_bytes["H2D"] - before


def live_pinned(machine):
    return sum(block.size for block in machine.cuda.space.blocks.values() if block.ordinal is None and not block.freed)


# --- a step's row


def test_the_first_launch_does_not_wait_for_noise_that_is_not_needed_yet(pipeline, machine, monkeypatch):
    """Each evaluation's noise is drawn after the launch of the one before, but for the first."""
    one = job(pipeline, scheduler="euler_a")
    admitted(pipeline, one).step([0])  # captured from now on
    lanes = admitted(pipeline, job(pipeline, scheduler="euler_a"))
    randn, calls = TorchGenerator.randn, machine.cuda.calls
    monkeypatch.setattr(TorchGenerator, "randn", lambda self, shape: calls.append("noise") or randn(self, shape))
    started = len(calls)
    for index in range(STEPS):
        lanes.step([index])
    events = [call for call in calls[started:] if call in ("noise", "cuGraphLaunch")]
    assert events[:3] == ["noise", "cuGraphLaunch", "noise"]
    assert events.count("cuGraphLaunch") == STEPS
    assert "noise" in events[events.index("cuGraphLaunch") :]


def test_a_row_without_noise_is_shorter(pipeline, machine):
    backend, plane = pipeline._backend, 4 * 4 * 8 * 8
    for scheduler, least, most in (("ddim", 4 + 4 * SLOTS * (SLOTS + 2), plane), ("euler_a", plane, 2 * plane)):
        lanes = admitted(pipeline, job(pipeline, scheduler=scheduler))
        lanes.step([0])
        lanes.latents([0])

        def step(lanes=lanes):
            lanes.step([1])
            with backend.device:
                backend.synchronize("counting")

        assert least <= copied(machine, step) <= most


def test_the_inputs_of_a_step_must_lie_side_by_side(pipeline):
    lanes = admitted(pipeline, job(pipeline))
    lanes.step([0])
    execution = lanes._step.execution
    names = [tensor.name for tensor in execution.component.stepped]
    assert rows.in_one_run(execution, reversed(names)) == names
    execution.address[names[1]] += 256
    with pytest.raises(
        e.TensorRtError, match=rf"{names[0]} and {names[1]} change with every step, but do not lie side"
    ):
        rows.in_one_run(execution, names)


# --- pinned memory


@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
def test_a_server_that_never_waits_needs_no_more_pinned_memory_after_2000_steps(planned, eager, monkeypatch):
    monkeypatch.setattr(rows, "AHEAD_STEPS", 128)
    with fakes.install(VERSION, eager=eager) as machine, Pipeline.load(planned(VERSION)) as pipeline:
        jobs = [job(pipeline, seed=seed, steps=500, scheduler="ddim") for seed in range(2)]
        lanes = admitted(pipeline, *jobs)
        for index in range(2):
            lanes.step([index, index])
        machine.cuda.empty_graphs()
        needed = []
        for index in range(2000):
            lanes.step([index % 500, (index + 7) % 500])
            needed.append(live_pinned(machine))
        assert max(needed[400:]) == needed[400]
        if eager:
            assert machine.cuda.counts.synchronizations == 0
    assert machine.cuda.live() == {}


def test_a_ring_grows_to_its_limit_and_then_waits_for_the_oldest_block(machine):
    device = Device(0)
    with device.closing():
        stream = Stream(device)
        target = device.allocate(64, "a test").address
        ring = pinned.Ring(device, stream, 3 * 256, "a test")
        blocks = []
        for _ in range(3):
            blocks.append(ring.turn(256))
            for _ in range(8):  # more than the lazy GPU does while it is asked
                stream.upload(target, blocks[-1].address, 64)
        assert len(set(blocks)) == 3
        assert machine.cuda.counts.synchronizations == 0
        assert ring.turn(256) is blocks[0]
        assert machine.cuda.counts.synchronizations == 1
        machine.cuda.fail("cuEventRecord", CUresult.CUDA_ERROR_INVALID_VALUE)
        with pytest.raises(e.CudaError):
            ring.turn(256)
        assert ring.current is blocks[0]  # nothing has changed


def test_two_decodes_under_way_have_results_of_their_own(pipeline):
    wanted = [alone(pipeline, seed=seed, steps=4)[1] for seed in range(2)]
    lanes = admitted(pipeline, *(job(pipeline, seed=seed, steps=4) for seed in range(2)))
    for index in range(4):
        lanes.step([index, index - 1 if index else None])
    first = lanes.decode([0])
    lanes.release(0)
    lanes.step([None, 3])
    second = lanes.decode([1])
    lanes.release(1)
    for finish, pixels in ((second, wanted[1]), (first, wanted[0])):
        difference = np.abs(finish().image.astype(int) - pixels.astype(int))
        assert (difference <= 1).mean() > 0.995  # half precision rounds otherwise in a call of two


def test_a_decode_that_nobody_waits_for_leaves_nothing_behind(pipeline, machine):
    lanes = admitted(pipeline, job(pipeline))
    lanes.step([0])
    wanted = lanes.decode([0])().image
    before = live_pinned(machine)
    for _ in range(5):
        lanes.decode([0])
    np.testing.assert_array_equal(lanes.decode([0])().image, wanted)
    assert live_pinned(machine) == before


def test_waiting_for_a_picture_does_not_wait_for_steps_that_came_later(pipeline, machine):
    lanes = admitted(pipeline, job(pipeline), job(pipeline, seed=1))
    lanes.step([0, 0])
    lanes.step([1, 1])
    finish = lanes.decode([0])
    lanes.step([2, 2])
    finish()
    launched = machine.cuda.counts.graph_launches
    lanes.latents([0])
    assert machine.cuda.counts.graph_launches == launched + 1


# --- where jobs lie


def test_lanes_that_share_buffers_take_their_jobs_out_for_each_other(pipeline):
    wanted = [alone(pipeline, seed=seed)[0] for seed in range(3)]
    several = [admitted(pipeline, job(pipeline, seed=seed)) for seed in range(3)]
    for index in range(STEPS):
        for lanes in several:
            lanes.step([index])
    for lanes, latents in zip(several, wanted):
        np.testing.assert_array_equal(lanes.latents([0]), latents)


def test_jobs_survive_when_their_size_is_dropped(planned, machine, monkeypatch):
    monkeypatch.setattr(engines, "SHAPES_KEPT", 2)
    with Pipeline.load(planned(VERSION), backend="tensorrt") as pipeline:
        wanted = alone(pipeline)[0]
        lanes = admitted(pipeline, job(pipeline))
        lanes.step([0])
        for size in (32, 40, 72):
            alone(pipeline, steps=1, size=size)
        for index in range(1, STEPS):
            lanes.step([index])
        np.testing.assert_array_equal(lanes.latents([0]), wanted)


# --- guidance by evaluation


def test_a_text_that_changes_is_copied_at_its_evaluation_only(pipeline, machine):
    """A step copies what changes with it to the GPU, the weights of the rows among that, in one run of memory. A text
    lies on the GPU already."""
    one, other = job(pipeline), job(pipeline, prompt="a star")
    negative, prompt = one.rows
    texts = [(0, prompt.conditioning), (3, other.rows[1].conditioning)]
    lanes = admitted(pipeline, replace(one, rows=(negative, replace(prompt, conditioning=texts))))
    bytes_on_gpu, uploads = [], []
    for index in range(STEPS):
        counts = machine.cuda.counts
        before = counts.copied_bytes["D2D"], counts.copies["H2D"]
        lanes.step([index])
        lanes.latents([0])
        bytes_on_gpu.append(counts.copied_bytes["D2D"] - before[0])
        uploads.append(counts.copies["H2D"] - before[1])
    state = 4 * SLOTS * 4 * 8 * 8
    text = lanes._step.execution.part("context", 1)[1]
    assert bytes_on_gpu[2:] == [state, state + text, state, state]
    assert uploads[2:] == [1, 1, 1, 1]


def test_states_that_wait_use_the_same_memory_again(pipeline, machine):
    def turns(count):
        lanes = admitted(pipeline, job(pipeline, steps=50), job(pipeline, seed=1, steps=50))
        for index in range(count):
            lanes.step([index, None])
            lanes.step([None, index])

    turns(2)
    gc.collect()
    before = {kind: len(sites) for kind, sites in machine.cuda.live().items()}
    turns(10)
    assert {kind: len(sites) for kind, sites in machine.cuda.live().items()} == before


def test_a_shortage_while_jobs_are_taken_out_leaves_them_where_they_are(pipeline, machine):
    wanted = alone(pipeline)[0]
    first, second = admitted(pipeline, job(pipeline)), admitted(pipeline, job(pipeline, seed=1))
    first.step([0])
    machine.cuda.fail("cuMemAlloc", CUresult.CUDA_ERROR_OUT_OF_MEMORY)
    with pytest.raises(e.CudaMemoryError, match="for pictures that wait"):
        second.step([0])
    for index in range(1, STEPS):
        first.step([index])
        second.step([index - 1])
    np.testing.assert_array_equal(first.latents([0]), wanted)


def test_a_job_that_did_not_start_can_be_read_changed_and_decoded(pipeline):
    one = job(pipeline)
    lanes = admitted(pipeline, one)
    np.testing.assert_array_equal(lanes.latents([0])[0], one.latents)
    before = lanes.decode([0])().image
    lanes.replace([0], -lanes.latents([0]))
    np.testing.assert_array_equal(lanes.latents([0])[0], -one.latents)
    assert not np.array_equal(lanes.decode([0])().image, before)


def test_a_prompt_that_stays_is_not_copied_again_when_others_join(pipeline, machine):
    jobs = [job(pipeline, seed=seed, guidance_scale=1.0) for seed in range(2)]
    lanes = admitted(pipeline, *jobs)
    lanes.step([0, 0])
    lanes.latents([0])
    lanes.release(1)
    lanes.admit(1, job(pipeline, seed=5, guidance_scale=1.0))
    before = machine.cuda.counts.copied_bytes["D2D"]
    lanes.step([1, 0])
    lanes.latents([0])
    state = 4 * SLOTS * 4 * 8 * 8
    assert machine.cuda.counts.copied_bytes["D2D"] - before == (1 + 1 + 2) * state  # out, in, and back in the graph


# --- sizes


@pytest.fixture(scope="module")
def uneven(demo_fp16, tmp_path_factory):
    """Plans whose VAE takes two pictures at a time of 64 x 64, and one of 96 x 96."""
    bundle = copy_bundle(demo_fp16, tmp_path_factory.mktemp("uneven"))
    sides = [Range(side, side, side) for side in (64, 96)]
    profiles = [Shapes(side, side, Range(1, 2, 4), Range(1, 4, 8)) for side in sides]
    with fakes.install(VERSION), pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_profiles, "PIXELS_PER_DECODE", 2 * 64 * 64)
        to_tensorrt.build_plans(bundle, profiles, compare=False, report=lambda message: None)
    return bundle


@pytest.mark.parametrize(("size", "runs"), [(64, 1), (96, 2)])
def test_as_many_pictures_are_decoded_together_as_the_plan_allows_at_their_size(uneven, machine, size, runs):
    with Pipeline.load(uneven, backend="tensorrt") as pipeline:
        made = pipeline(PROMPT, num_inference_steps=1, num_images_per_prompt=2, height=size, width=size, progress=False)
        assert len(made.images) == 2
        assert machine.library.counts.enqueues["vae_decoder"] == runs


def test_one_picture_is_decoded_where_the_plan_takes_two(pipeline, monkeypatch):
    wanted = alone(pipeline)[1]
    monkeypatch.setattr(Engine, "allowed", lambda *_: (2, 2))
    np.testing.assert_array_equal(alone(pipeline)[1], wanted)
