"""The same seed gives the same picture as diffusers."""

import numpy as np
import pytest
import torch

from engine import Pipeline
from export.sources.checkpoint import resolve

from .engine.sampling.test_samplers import CLASSES

pytestmark = pytest.mark.slow
PROMPTS = ["a large red circle on a blue background", "a small green star on the left of a white background"]
NEGATIVE = ["", "a square"]
BACKENDS = ["onnxruntime", "openvino"]
HEIGHT, WIDTH, STEPS, GUIDANCE = 64, 96, 8, 7.5
FEW = {"num_inference_steps": 3}
"""Enough where the sampler is not the subject."""
tiny = pytest.mark.parametrize("both", ["sd1", "sd2"], indirect=True)
one_model = pytest.mark.parametrize("both", ["sd1"], indirect=True)


@pytest.fixture(scope="module", params=["demo", "sd1", "sd2"])
def both(request, demo_bundle, tiny_bundles, tiny_sources):
    """Our pipelines, one on each backend of a CPU, and diffusers', of the same model. ONNX Runtime is the one that
    others are compared with."""
    source = resolve(None) if request.param == "demo" else tiny_sources[request.param]
    bundle = demo_bundle if request.param == "demo" else tiny_bundles[request.param]
    return (
        [Pipeline.load(bundle, backend=backend) for backend in BACKENDS],
        source.pipeline(),
        source.scheduler_config(),
    )


def diffusers_run(pipeline, config, sampler, generator, prompts=PROMPTS, **options):
    cls, extra = CLASSES[sampler]
    pipeline.scheduler = cls.from_config({**{k: v for k, v in config.items() if not k.startswith("_")}, **extra})
    arguments = {
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "negative_prompt": NEGATIVE,
        **options,
    }
    with torch.no_grad():
        latents = pipeline(prompts, generator=generator, output_type="latent", **arguments).images
        image = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    pixels = torch.round((image / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(0, 2, 3, 1)
    return latents.numpy(), pixels.numpy()


def our_runs(pipelines, sampler, seed, **options):
    """What each of our pipelines makes."""
    return [our_run(pipeline, sampler, seed, **options) for pipeline in pipelines]


def our_run(pipeline, sampler, seed, prompts=PROMPTS, **options):
    arguments = {
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "negative_prompt": NEGATIVE,
        **options,
    }
    last = {}
    pictures = pipeline(
        prompts,
        seed=seed,
        scheduler=sampler,
        callback_on_step_end=lambda _, i, t, tensors: last.update(tensors),
        **arguments,
    )
    return last["latents"], np.stack([np.asarray(picture) for picture in pictures.images])


def check_same(ours, theirs):
    latents, pixels = theirs
    for backend, (our_latents, our_pixels) in zip(BACKENDS, ours, strict=True):
        assert np.abs(our_latents - latents).max() < 1e-3, backend
        assert (np.abs(our_pixels.astype(int) - pixels.astype(int)) <= 1).mean() >= 0.999, backend


SEEDS = [0, 1234567]


@pytest.mark.parametrize("sampler", CLASSES)
def test_same_seeds_give_the_same_pictures_as_diffusers(both, sampler):
    """A list of seeds is a list of generators, one for each picture."""
    ours, theirs, config = both
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    check_same(our_runs(ours, sampler, SEEDS), diffusers_run(theirs, config, sampler, generators))


@one_model
@pytest.mark.parametrize("sampler", ["ddpm", "euler_a"])
def test_one_seed_for_two_pictures_is_one_generator(both, sampler):
    """Those that draw noise at every step."""
    ours, theirs, config = both
    generator = torch.Generator().manual_seed(1234567)
    check_same(our_runs(ours, sampler, 1234567), diffusers_run(theirs, config, sampler, generator))


@one_model
def test_several_images_per_prompt_come_in_diffusers_order(both):
    ours, theirs, config = both
    check_same(
        our_runs(ours, "ddim", 5, num_images_per_prompt=2, **FEW),
        diffusers_run(theirs, config, "ddim", torch.Generator().manual_seed(5), num_images_per_prompt=2, **FEW),
    )


@one_model
def test_guidance_scale_1_leaves_the_negative_prompt_out(both):
    ours, theirs, config = both
    check_same(
        our_runs(ours, "ddim", 5, guidance_scale=1.0, **FEW),
        diffusers_run(theirs, config, "ddim", torch.Generator().manual_seed(5), guidance_scale=1.0, **FEW),
    )


@tiny
def test_eta_is_that_of_diffusers(both):
    ours, theirs, config = both
    check_same(
        our_runs(ours, "ddim", 5, eta=0.7, **FEW),
        diffusers_run(theirs, config, "ddim", torch.Generator().manual_seed(5), eta=0.7, **FEW),
    )


@tiny
def test_guidance_rescale_is_that_of_diffusers(both):
    ours, theirs, config = both
    check_same(
        our_runs(ours, "ddim", 5, guidance_rescale=0.7, guidance_scale=9.0),
        diffusers_run(
            theirs, config, "ddim", torch.Generator().manual_seed(5), guidance_rescale=0.7, guidance_scale=9.0
        ),
    )


def dynamic(scales):
    """A callback that changes diffusers' scale before each evaluation but the first. At 1 diffusers evaluates the
    prompt alone, and wants to be given its embedding alone."""
    both_texts = {}

    def callback(pipeline, index, timestep, tensors):
        if index + 1 == len(scales):
            return {}
        pipeline._guidance_scale = scales[index + 1]
        texts = both_texts.setdefault("prompt_embeds", tensors["prompt_embeds"])
        return {"prompt_embeds": texts if scales[index + 1] > 1 else texts.chunk(2)[1]}

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}


LIST = [GUIDANCE] * 3 + [1.0] * 3 + [4.0] * 2


@one_model
@pytest.mark.parametrize(
    ("sampler", "ours_take", "scales", "rescale"),
    [
        ("ddim", {"guidance_interval": (0.0, 0.5)}, [GUIDANCE] * 5 + [1.0] * 3, 0.7),
        ("dpmpp_2m", {"guidance_scale": LIST}, LIST, 0.0),
        ("ddim", {"guidance_scale": lambda i, timestep: 7.5 - 0.3 * i}, [7.5 - 0.3 * i for i in range(STEPS)], 0.0),
    ],
    ids=["interval", "list", "function"],
)
def test_guidance_by_evaluation_is_a_callback_of_diffusers(both, sampler, ours_take, scales, rescale):
    ours, theirs, config = both
    found = our_runs(ours, sampler, 5, guidance_rescale=rescale, **ours_take)
    generator = torch.Generator().manual_seed(5)
    check_same(found, diffusers_run(theirs, config, sampler, generator, guidance_rescale=rescale, **dynamic(scales)))


@one_model
def test_given_latents_take_the_place_of_noise(both):
    ours, theirs, config = both
    latents = torch.randn((2, 4, HEIGHT // 8, WIDTH // 8), generator=torch.Generator().manual_seed(9))
    check_same(
        our_runs(ours, "euler", 0, latents=latents.numpy(), **FEW),
        diffusers_run(theirs, config, "euler", None, latents=latents, **FEW),
    )


@tiny
@pytest.mark.parametrize(("height", "width"), [(72, 40), (64, 64), (104, 128)])
def test_sizes_that_halving_rounds_equal_diffusers(both, height, width):
    ours, theirs, config = both
    check_same(
        our_runs(ours, "ddim", 1, height=height, width=width, **FEW),
        diffusers_run(theirs, config, "ddim", torch.Generator().manual_seed(1), height=height, width=width, **FEW),
    )


@one_model
def test_np_output_is_the_picture_in_0_to_1(both):
    pipeline = both[0][0]
    arguments = {"num_inference_steps": 2, "seed": 0, "height": 32, "width": 32}
    values = pipeline("a ring", output_type="np", **arguments).images
    assert values.shape == (1, 32, 32, 3)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(np.round(values[0] * 255), np.asarray(pipeline("a ring", **arguments).images[0]))
