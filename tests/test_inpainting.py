"""A part of a picture is repainted: the same as diffusers' inpainting makes, and right."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from engine import Pipeline
from engine.__main__ import main
from engine.contract import SLOTS
from engine.errors import ImageError, MaskError, MaskSizeError, OutputTypeError, StrengthError
from engine.masks import Crop
from engine.picture import psnr
from export.demo import pictures
from export.demo.judge import judge
from export.demo.pictures import Scene, caption
from export.graphs.denoiser import inpaint

from . import fakes
from .engine.backends.test_tensorrt import VERSION
from .engine.sampling.test_samplers import CLASSES
from .test_image_to_image import BACKENDS, HEIGHT, PROMPTS, WIDTH, beside_diffusers, one_model, picture, with_sampler

FAST = {"num_inference_steps": 4, "progress": False}
slow = pytest.mark.slow


def mask(height=HEIGHT, width=WIDTH, part=(8, 16, 40, 56)) -> Image.Image:
    """White in that part: top, left, bottom, right."""
    top, left, bottom, right = part
    values = np.zeros((height, width), np.uint8)
    values[top:bottom, left:right] = 255
    return Image.fromarray(values)


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def both(request, tiny_bundles, tiny_sources):
    bundle, source = tiny_bundles[request.param], tiny_sources[request.param]
    yield from beside_diffusers(StableDiffusionInpaintPipeline, bundle, source)


def with_diffusers(both, sampler, seed, image, mask_image, prompts=PROMPTS, **options):
    pipeline = with_sampler(both, sampler)
    pipeline.set_progress_bar_config(disable=True)
    several = isinstance(seed, list)
    generator = [torch.Generator().manual_seed(s) for s in seed] if several else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return pipeline(
            prompts,
            image=image,
            mask_image=mask_image,
            height=options.pop("height", HEIGHT),
            width=options.pop("width", WIDTH),
            generator=generator,
            **options,
        ).images


def check_same(both, sampler, seed, image, mask_image, prompts=PROMPTS, **options):
    options = {"strength": 1.0, "num_inference_steps": 6, "guidance_scale": 7.5, **options}
    wanted = with_diffusers(both, sampler, seed, image, mask_image, prompts, output_type="latent", **options).numpy()
    for backend, pipeline in zip(BACKENDS, both[0], strict=True):
        made = pipeline(
            prompts,
            image=image,
            mask_image=mask_image,
            seed=seed,
            scheduler=sampler,
            output_type="latent",
            progress=False,
            **options,
        ).images
        assert made.shape == wanted.shape
        assert np.abs(made - wanted).max() < 1e-3, backend


@slow
@pytest.mark.parametrize("sampler", CLASSES)
def test_the_same_seeds_give_diffusers_pictures(both, sampler):
    check_same(both, sampler, [3, 1234567], [picture(0), picture(1)], [mask(), mask(part=(0, 0, 64, 40))])


@one_model
@slow
@pytest.mark.parametrize("sampler", ["ddim", "euler_a"])
@pytest.mark.parametrize("seed", [7, [7, 8]], ids=["one seed", "two seeds"])
def test_a_strength_below_one_begins_with_the_image(both, sampler, seed):
    """One image and one mask for two texts: diffusers draws the image's latents with the first generator only."""
    check_same(both, sampler, seed, picture(0), mask(), strength=0.6)


@one_model
@slow
def test_one_seed_draws_for_all_pictures_at_once(both):
    check_same(both, "euler_a", 7, [picture(0), picture(1)], mask(), num_inference_steps=4)


@one_model
@slow
def test_several_pictures_of_one_image(both):
    check_same(both, "ddim", 7, picture(0), mask(), PROMPTS[0], num_images_per_prompt=2, num_inference_steps=4)


@one_model
@slow
def test_without_guidance(both):
    check_same(both, "dpmpp_2m", 7, picture(0), mask(), PROMPTS[0], guidance_scale=1.0)


@one_model
@slow
def test_the_part_around_the_mask_is_painted_as_in_diffusers(both):
    """The tiny model's own latents of the part, and what it makes of them, come back with a difference of rounding."""
    small, options = mask(80, 120, (20, 30, 44, 70)), {"padding_mask_crop": 8, "strength": 0.6, **FAST}
    options.pop("progress")
    asked = {**options, "height": 64, "width": 64}
    wanted = np.asarray(with_diffusers(both, "ddim", 7, picture(0, 80, 120), small, PROMPTS[0], **asked)[0])
    for pipeline in both[0]:
        made = pipeline(
            PROMPTS[0],
            image=picture(0, 80, 120),
            mask_image=small,
            seed=7,
            scheduler="ddim",
            progress=False,
            **asked,
        ).images[0]
        assert (np.abs(np.asarray(made).astype(int) - wanted) <= 1).mean() > 0.999


@slow
def test_tensorrt_makes_the_pictures_of_onnxruntime(planned, demo_fp16):
    """On the fake: two pictures of which a part is kept, then two from nothing in the same buffers."""
    given = {"image": picture(0, 64, 64), "mask_image": [mask(64, 64), mask(64, 64, (0, 0, 64, 32))]}
    asked = {"seed": [0, 1], "scheduler": "euler_a", **FAST}
    with Pipeline.load(demo_fp16, backend="onnxruntime") as oracle:
        wanted = [oracle(PROMPTS, **more, **asked).images for more in (given, {})]
    with fakes.install(VERSION), Pipeline.load(planned(VERSION)) as pipeline:
        made = [pipeline(PROMPTS, **more, **asked).images for more in (given, {})]
    for one, other in zip([*made[0], *made[1]], [*wanted[0], *wanted[1]], strict=True):
        assert psnr(np.asarray(one), np.asarray(other)) > 40


# ------------------------------------------------------------------------------------------- the built-in model


@slow
def test_the_repainted_part_holds_what_was_asked_for_and_nothing_else_changes(demo):
    right = 0
    for seed, colour in enumerate(["blue", "green", "red"]):
        start = pictures.picture(Scene("circle", "yellow", "white", "small", "left"))
        where = np.zeros((64, 64), bool)
        where[:, :32] = True
        prompt = caption(Scene("circle", colour, "white", "small", "left"))
        made = demo(
            prompt,
            image=start,
            mask_image=where,
            composite=True,
            num_inference_steps=30,
            seed=seed,
            progress=False,
        ).images[0]
        pixels = np.asarray(made)
        assert np.array_equal(pixels[:, 32:], start[:, 32:])
        verdict = judge(pixels)
        right += (verdict.shape, verdict.colour, verdict.position) == ("circle", colour, "left")
    assert right == 3


@slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_white_mask_of_strength_one_is_a_picture_from_nothing(demo_bundle, backend):
    """But for its random numbers: the encoder draws first."""
    with Pipeline.load(demo_bundle, backend=backend) as pipeline:
        noise = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
        asked = {"latents": noise, "seed": 0, "scheduler": "ddim", **FAST}
        white = np.ones((64, 64), bool)
        made = pipeline(PROMPTS[0], image=picture(0, 64, 64), mask_image=white, **asked).images[0]
        assert np.array_equal(made, pipeline(PROMPTS[0], **asked).images[0])


@slow
def test_composite_with_the_part_around_the_mask_keeps_the_image(demo):
    image, where = picture(0, 100, 150), mask(100, 150, (20, 30, 44, 70))
    made = demo(
        PROMPTS[0], image=image, mask_image=where, padding_mask_crop=4, composite=True, output_type="np", seed=0, **FAST
    ).images
    changed = (np.round(made[0] * 255) != np.asarray(image)).any(axis=2)
    assert made.shape == (1, 100, 150, 3)
    assert changed.any()
    assert not changed[np.asarray(where) == 0].any()


@slow
def test_a_callback_sees_the_masked_latents_and_may_stop_the_loop(demo):
    seen = []

    def stop(pipeline, index, timestep, tensors):
        seen.append(tensors["latents"].copy())
        pipeline.interrupt = index == 1
        return {}

    asked = {"image": picture(0, 64, 64), "mask_image": mask(64, 64), "seed": 0, **FAST}
    result = demo(PROMPTS[0], callback_on_step_end=stop, guidance_interval=(0, 0.5), **asked)
    assert (result.interrupted, result.evaluations, len(seen)) == (True, 2, 2)


@slow
def test_the_command_line_repaints_the_white_part_of_a_file(demo_bundle, tmp_path):
    picture(0, 64, 64).save(tmp_path / "in.png")
    mask(64, 64).save(tmp_path / "mask.png")
    asked = [PROMPTS[0], "--bundle", str(demo_bundle), "--quiet", "--steps", "4", "--seed", "0", "--composite"]
    files = ["--image", str(tmp_path / "in.png"), "--mask", str(tmp_path / "mask.png")]
    assert main(["picture", *asked, *files, "--output", str(tmp_path / "out.png")]) == 0
    with Image.open(tmp_path / "out.png") as made:
        kept = np.asarray(mask(64, 64)) == 0
        assert np.array_equal(np.asarray(made)[kept], np.asarray(picture(0, 64, 64))[kept])
    mask(64, 32).save(tmp_path / "mask.png")
    assert main(["picture", *asked, *files, "--output", str(tmp_path / "out.png")]) == 2


# --------------------------------------------------------------------------------------------- graphs and masks


def test_a_mask_of_ones_leaves_every_bit():
    state = torch.randn(2, SLOTS, 4, 3, 5)
    ones, zeros = torch.ones(2, 1, 3, 5), torch.zeros(2, 4, 3, 5)
    assert torch.equal(inpaint(state, ones, zeros, zeros, torch.zeros(2, 2)), state)


def test_outside_of_the_mask_slot_0_is_the_original_with_noise():
    state, original, noise = torch.randn(1, SLOTS, 4, 3, 5), torch.randn(1, 4, 3, 5), torch.randn(1, 4, 3, 5)
    where = torch.zeros(1, 1, 3, 5)
    where[..., 2:] = 1
    made = inpaint(state, where, original, noise, torch.tensor([[0.8, 0.6]]))
    assert torch.equal(made[:, 1:], state[:, 1:])
    assert torch.equal(made[:, 0, ..., 2:], state[:, 0, ..., 2:])
    torch.testing.assert_close(made[:, 0, ..., :2], (0.8 * original + 0.6 * noise)[..., :2])


@pytest.mark.parametrize(
    "part", [(20, 30, 44, 70), (0, 0, 5, 119), (70, 3, 80, 9), (0, 0, 80, 120), (30, 110, 70, 120)]
)
@pytest.mark.parametrize("padding", [0, 7, 40])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 128), (96, 32)])
def test_the_part_around_a_mask_is_that_of_diffusers(part, padding, height, width):
    processor, image, where = VaeImageProcessor(), picture(0, 80, 120), mask(80, 120, part)
    region = processor.get_crop_region(where, width, height, pad=padding)
    crop = Crop.around(np.asarray(where), padding, height, width)
    assert crop.region == region
    painted = picture(1, height, width)
    cut = processor.resize(image.crop(region), height, width, resize_mode="fill")
    np.testing.assert_array_equal(crop.cut(np.asarray(image)), np.asarray(cut))
    wanted = processor.apply_overlay(where, image, painted, region)
    np.testing.assert_array_equal(
        crop.put_back(np.asarray(painted), np.asarray(image), np.asarray(where)), np.asarray(wanted)
    )


# -------------------------------------------------------------------------------------------------------- errors


@slow
@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"image": None}, MaskError, "pass image too"),
        ({"mask_image": None, "composite": True}, MaskError, "composite is about a mask; pass mask_image"),
        ({"mask_image": None, "padding_mask_crop": 8}, MaskError, "padding_mask_crop is about a mask"),
        ({"mask_image": mask(64, 32)}, MaskSizeError, "mask_image is 32 x 64 pixels and image 64 x 64"),
        ({"mask_image": 3}, ImageError, "mask_image is a int"),
        ({"mask_image": []}, MaskError, "mask_image is an empty list"),
        ({"mask_image": [mask(64, 64)] * 3}, ImageError, "there are 3 masks for 1 pictures; pass 1"),
        ({"mask_image": np.full((64, 64), 2.0)}, ImageError, "holds values from 2 to 2"),
        ({"strength": 0.1}, StrengthError, "leaves no step"),
        ({"composite": "yes"}, MaskError, "composite is 'yes'; it must be True or False"),
        ({"composite": True, "output_type": "latent"}, OutputTypeError, "composite puts the image's pixels back"),
        ({"composite": True, "image": np.zeros((1, 4, 8, 8), np.float32)}, ImageError, "image holds latents"),
        ({"padding_mask_crop": -1}, MaskError, "padding_mask_crop is -1; it must be an integer from 0"),
        ({"padding_mask_crop": 8, "mask_image": mask(64, 64, (0, 0, 0, 0))}, MaskError, "mask_image is black"),
        ({"padding_mask_crop": 8, "image": [picture(0, 64, 64)] * 2}, MaskError, "takes one image and one mask"),
    ],
)
def test_what_cannot_be_repainted_is_an_error_by_name(demo, arguments, error, words):
    with pytest.raises(error, match=words):
        demo(PROMPTS[0], **{"image": picture(0, 64, 64), "mask_image": mask(64, 64), **FAST, **arguments})


@slow
def test_a_model_without_texts_repaints_nothing(textless_bundles):
    latents = np.zeros((1, 3, 16, 16), np.float32)
    with (
        Pipeline.load(textless_bundles["ldm"], backend="onnxruntime") as pipeline,
        pytest.raises(MaskError, match="models without texts repaint no part"),
    ):
        pipeline(image=latents, mask_image=mask(32, 32, (0, 0, 8, 8)), **FAST)
