"""Pictures from pictures: the same as diffusers' image to image makes, and right."""

import json
import shutil
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from engine import Pipeline
from engine.__main__ import main
from engine.errors import ImageError, LatentsError, SizeError, StrengthError
from engine.picture import psnr
from export.demo import pictures
from export.demo.judge import judge
from export.demo.pictures import Scene, caption

from . import fakes
from .engine.backends.test_tensorrt import VERSION
from .engine.sampling.test_samplers import CLASSES

pytestmark = pytest.mark.slow
BACKENDS = ["onnxruntime", "openvino"]
PROMPTS = ["a large red circle on a blue background", "a small green star on the left of a white background"]
HEIGHT, WIDTH = 64, 96
FAST = {"num_inference_steps": 4, "progress": False}
one_model = pytest.mark.parametrize("both", ["sd1"], indirect=True)


def beside_diffusers(theirs, bundle, source):
    """Our pipelines, one on each backend of a CPU, diffusers' of that class, of the same model, and its scheduler's
    configuration."""
    with ExitStack() as stack:
        ours = [stack.enter_context(Pipeline.load(bundle, backend=backend)) for backend in BACKENDS]
        yield ours, theirs(**source.pipeline().components), source.scheduler_config()


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def both(request, tiny_bundles, tiny_sources):
    bundle, source = tiny_bundles[request.param], tiny_sources[request.param]
    yield from beside_diffusers(StableDiffusionImg2ImgPipeline, bundle, source)


def with_sampler(both, sampler):
    """diffusers' pipeline, with the scheduler that is one of our samplers."""
    _, pipeline, config = both
    cls, extra = CLASSES[sampler]
    pipeline.scheduler = cls.from_config({**{k: v for k, v in config.items() if not k.startswith("_")}, **extra})
    return pipeline


def picture(seed=0, height=HEIGHT, width=WIDTH) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)).resize((width, height))


def diffusers_latents(both, sampler, generator, image, prompts=PROMPTS, **options):
    with torch.no_grad():
        made = with_sampler(both, sampler)(prompts, image=image, generator=generator, output_type="latent", **options)
    return made.images.numpy()


def check_same(both, sampler, seed, image, prompts=PROMPTS, **options):
    """Latents of diffusers' scale after the last step, which is no noise."""
    ours = both[0]
    several = isinstance(seed, list)
    generator = [torch.Generator().manual_seed(s) for s in seed] if several else torch.Generator().manual_seed(seed)
    options = {"strength": 0.6, "num_inference_steps": 7, "guidance_scale": 7.5, **options}
    wanted = diffusers_latents(both, sampler, generator, image, prompts, **options)
    for backend, pipeline in zip(BACKENDS, ours, strict=True):
        made = pipeline(
            prompts, image=image, seed=seed, scheduler=sampler, output_type="latent", progress=False, **options
        ).images
        assert made.shape == wanted.shape
        assert np.abs(made - wanted).max() < 1e-3, backend


@pytest.mark.parametrize("sampler", [name for name in CLASSES if name != "pndm"])
def test_the_same_seeds_give_diffusers_pictures(both, sampler):
    check_same(both, sampler, [3, 1234567], [picture(0), picture(1)])


@one_model
@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
def test_one_seed_draws_the_images_first_and_then_the_noise(both, sampler):
    check_same(both, sampler, 7, [picture(0), picture(1)])


@one_model
def test_one_image_serves_several_texts(both):
    check_same(both, "ddim", 7, picture(0))
    check_same(both, "ddim", [1, 2], picture(0))


@one_model
@pytest.mark.parametrize("strength", [0.1, 0.58, 0.99, 1.0])
def test_strength_says_how_many_steps_are_run(both, strength):
    """Also 1: all steps, from the picture and not from noise alone."""
    check_same(both, "dpmpp_2m", 7, picture(0), PROMPTS[0], strength=strength, num_inference_steps=10)


@one_model
def test_several_pictures_of_one_image(both):
    check_same(both, "ddim", 7, picture(0), PROMPTS[0], num_images_per_prompt=2)


@one_model
def test_an_image_of_another_size_is_rounded_down_as_in_diffusers(both):
    check_same(both, "ddim", 7, picture(0, HEIGHT, WIDTH).resize((WIDTH + 5, HEIGHT + 3)), PROMPTS[0])


@one_model
def test_latents_are_taken_for_an_image(both):
    latents = np.random.default_rng(0).standard_normal((1, 4, HEIGHT // 8, WIDTH // 8), np.float32)
    ours = both[0]
    options = {"strength": 0.5, "num_inference_steps": 4}
    wanted = diffusers_latents(
        both, "ddim", torch.Generator().manual_seed(0), torch.from_numpy(latents), PROMPTS[0], **options
    )
    made = ours[0](PROMPTS[0], image=latents, seed=0, scheduler="ddim", output_type="latent", progress=False, **options)
    assert np.abs(made.images - wanted).max() < 1e-3


# ------------------------------------------------------------------------------------------- the built-in model


def test_at_half_strength_the_place_stays_and_the_colour_changes(demo):
    right = 0
    for position in ("left", "right", "centre"):
        start = pictures.picture(Scene("circle", "red", "white", "small", position))
        prompt = caption(Scene("circle", "blue", "white", "small", position))
        made = demo(prompt, image=start, strength=0.5, num_inference_steps=30, seed=3, progress=False).images[0]
        verdict = judge(np.asarray(made))
        right += (verdict.shape, verdict.colour, verdict.position) == ("circle", "blue", position)
    assert right == 3


def test_a_path_a_picture_and_an_array_are_the_same(demo, tmp_path):
    image = picture(0, 64, 64)
    image.save(tmp_path / "a.png")
    forms = [image, tmp_path / "a.png", str(tmp_path / "a.png"), np.asarray(image), np.asarray(image)[np.newaxis]]
    made = [np.asarray(demo(PROMPTS[0], image=form, seed=0, **FAST).images[0]) for form in forms]
    assert all(np.array_equal(made[0], other) for other in made)


def test_height_and_width_resize_the_image(demo):
    made = demo(PROMPTS[0], image=picture(0, 200, 100), height=64, width=64, seed=0, **FAST)
    assert made.images[0].size == (64, 64)
    assert "Denoising strength: 0.8" in made.images[0].info["parameters"]
    assert made.evaluations == 3


def test_tensorrt_makes_the_pictures_of_onnxruntime(planned, demo_fp16):
    """On the fake, with two pictures, one image for each."""
    asked = {"image": [picture(0, 64, 64), picture(1, 64, 64)], "seed": [0, 1], "scheduler": "euler_a", **FAST}
    with Pipeline.load(demo_fp16, backend="onnxruntime") as oracle:
        wanted = oracle(PROMPTS, **asked).images
    with fakes.install(VERSION), Pipeline.load(planned(VERSION)) as pipeline:
        made = pipeline(PROMPTS, **asked).images
    for one, other in zip(made, wanted, strict=True):
        assert psnr(np.asarray(one), np.asarray(other)) > 40


def test_the_command_line_starts_from_a_file(demo_bundle, tmp_path):
    picture(0, 64, 64).save(tmp_path / "in.png")
    asked = [PROMPTS[0], "--bundle", str(demo_bundle), "--quiet", "--steps", "4", "--seed", "0", "--image"]
    given = [str(tmp_path / "in.png"), "--strength", "0.5", "--output", str(tmp_path / "out.png")]
    assert main(["picture", *asked, *given]) == 0
    with Image.open(tmp_path / "out.png") as made:
        assert "Denoising strength: 0.5" in made.info["parameters"]
    (tmp_path / "in.png").write_bytes(b"no picture")
    assert main(["picture", *asked, *given]) == 2


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"strength": 1.5}, StrengthError, "strength is 1.5; it must be a number from 0 to 1"),
        ({"strength": float("nan")}, StrengthError, "from 0 to 1"),
        ({"strength": 0.1}, StrengthError, "0.1 of 4 steps leaves no step; pass at least 0.25"),
        ({"image": None, "strength": 0.5}, StrengthError, "pass image too"),
        ({"image": 3}, ImageError, "image is a int; pass a path, a PIL image or a NumPy array"),
        ({"image": []}, ImageError, "image is an empty list"),
        ({"image": [picture(), picture(), picture()]}, ImageError, "there are 3 images for 1 pictures; pass 1"),
        ({"image": [picture(), picture(0, 64, 64)]}, ImageError, r"one size, and these are 64 x 64, 96 x 64 pixels"),
        ({"image": picture(0, 64, 1000)}, SizeError, "or pass height and width, to which the image is then resized"),
        ({"image": np.zeros((1, 4, 8, 125), np.float32)}, SizeError, "width is 1000|width 1000"),
        (
            {"image": np.zeros((1, 4, 8, 8), np.float32), "height": 128},
            ImageError,
            "of 64 x 64 pixels; leave",
        ),
        ({"image": picture(0, 64, 64), "height": 0}, SizeError, "height"),
        ({"image": np.full((1, 4, 8, 8), np.nan, np.float32)}, LatentsError, "the latents in image hold 256 values"),
    ],
)
def test_what_cannot_be_started_from_is_an_error_by_name(demo, arguments, error, words):
    with pytest.raises(error, match=words):
        demo(PROMPTS[0], **{"image": picture(0, 64, 64), **FAST, **arguments})


def test_plans_without_a_vae_encoder_start_from_noise_only(planned, tmp_path):
    """`--components` may leave it out."""
    shutil.copytree(planned(VERSION), tmp_path / "demo")
    (build,) = (tmp_path / "demo" / "plans").glob("*/build.json")
    content = json.loads(build.read_text())
    del content["components"]["vae_encoder"]
    build.write_text(json.dumps(content))
    with fakes.install(VERSION), Pipeline.load(tmp_path / "demo") as pipeline:
        pipeline(PROMPTS[0], height=64, width=64, **FAST)
        with pytest.raises(ImageError, match=r"no VAE encoder.* build it: python build_engines.py --backend tensorrt"):
            pipeline(PROMPTS[0], image=picture(0, 64, 64), **FAST)


def test_a_model_without_a_vae_encoder_starts_from_noise_only(textless_bundles):
    bundle = next(iter(textless_bundles.values()))
    with (
        Pipeline.load(bundle, backend="onnxruntime") as pipeline,
        pytest.raises(ImageError, match="has no VAE encoder"),
    ):
        pipeline(image=picture(0, 64, 64), progress=False)
