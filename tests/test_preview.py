"""A callback may ask for the picture that will come."""

import numpy as np
import pytest

from engine import Hires, Pipeline
from engine.errors import PreviewError
from engine.sampling.catalog import SAMPLERS, step_table
from engine.sampling.watched import watched

from . import fakes
from .engine.backends.test_tensorrt import VERSION

slow = pytest.mark.slow
PROMPTS = ["a large red circle on a blue background", "a small green star on the left of a white background"]
FAST = {"num_inference_steps": 4, "progress": False, "seed": 0}


def watch(pipeline, prompts=PROMPTS, **options):
    """What a callback sees, and the result."""
    seen = []

    def callback(pipeline, index, timestep, tensors):
        seen.append((tensors.x0(), tensors.preview()))

    return seen, pipeline(prompts, callback_on_step_end=callback, **{**FAST, **options})


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "pndm_prk"])
def test_every_sampler_has_room_for_x0(demo, sampler):
    """And only the slots that nothing reads again hold it."""
    schedule = demo.limits.schedule
    table = step_table(sampler, schedule, 12)
    made = watched(table, schedule.prediction_type)
    assert None not in made.slots
    counting = {0}
    for index in range(len(table) - 1, -1, -1):
        changed = set(np.flatnonzero((made.table.updates[index] != table.updates[index]).any(axis=1)))
        assert not changed & counting
        counting = {0} | set(np.flatnonzero(table.updates[index][sorted(counting), :5].any(axis=0)))


@slow
@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "euler_a", "unipc", "heun", "lms"])
def test_the_picture_is_the_same_with_a_preview(demo, sampler):
    plain = demo(PROMPTS, scheduler=sampler, output_type="latent", **FAST).images
    seen, made = watch(demo, scheduler=sampler, output_type="latent")
    np.testing.assert_allclose(made.images, plain, atol=1e-5)
    assert len(seen) == made.evaluations


@slow
def test_x0_is_what_the_model_predicts(demo):
    """DDIM's step from x with alpha and sigma leads to alpha' x0 + sigma' epsilon, so two x say x0."""
    states = []

    def callback(pipeline, index, timestep, tensors):
        states.append((tensors["latents"].copy(), tensors.x0()))

    demo(PROMPTS[0], scheduler="ddim", callback_on_step_end=callback, **FAST)
    table = step_table("ddim", demo.limits.schedule, 4)
    for i in range(1, 3):
        (before, _), (after, x0) = states[i - 1], states[i]
        alpha, alpha_next = table.alphas[i : i + 2]
        sigma, sigma_next = table.sigmas[i : i + 2]
        wanted = (sigma_next * before - sigma * after) / (alpha * sigma_next - alpha_next * sigma)
        np.testing.assert_allclose(x0, wanted, atol=1e-4)


@slow
def test_a_preview_has_the_colours_of_the_picture(demo):
    """Mean colours of pictures, and of previews half way through and at the end."""
    prompts = [f"a large {a} circle on a {b} background" for a, b in (("red", "blue"), ("green", "white"))]
    prompts += ["a large yellow ring on a black background", "a large purple square on an orange background"]
    seen, made = watch(demo, prompts, num_inference_steps=20, scheduler="dpmpp_2m", seed=[0, 1, 2, 3])
    assert seen[0][1][0].size == (8, 8)
    wanted = np.array([np.asarray(one).mean(axis=(0, 1)) for one in made.images])
    for _, previews in (seen[9], seen[-1]):
        found = np.array([np.asarray(one).mean(axis=(0, 1)) for one in previews])
        assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > 0.85


@slow
def test_both_passes_and_tensorrt_have_previews(planned, demo_fp16):
    asked = {"height": 48, "width": 48, "hires": Hires(height=64, width=64, strength=0.5)}
    with Pipeline.load(demo_fp16, backend="onnxruntime") as oracle:
        wanted, _ = watch(oracle, PROMPTS[0], **asked)
    with fakes.install(VERSION), Pipeline.load(planned(VERSION)) as pipeline:
        made, _ = watch(pipeline, PROMPTS[0], **asked)
    assert [one[0].shape[2] for one in made] == [6, 6, 6, 6, 8, 8]
    for (x0, pictures), (other, others) in zip(made, wanted, strict=True):
        assert np.abs(x0 - other).mean() < 0.05
        assert np.corrcoef(np.asarray(pictures[0]).ravel(), np.asarray(others[0]).ravel())[0, 1] > 0.9


@slow
def test_a_model_without_a_vae_encoder_has_previews(textless_bundles):
    with Pipeline.load(textless_bundles["ldm"], backend="onnxruntime") as pipeline:
        seen, made = watch(pipeline, None, num_inference_steps=2)
    assert len(seen) == made.evaluations
    assert np.isfinite(seen[-1][0]).all()


@slow
def test_a_sampler_without_room_is_an_error_by_name(demo):
    with pytest.raises(PreviewError, match=r"'pndm_prk' leaves no room for x0 at evaluation 8; ask at another one"):
        watch(demo, scheduler="pndm_prk", num_inference_steps=5)
