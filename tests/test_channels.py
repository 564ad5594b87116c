"""Models whose U-Net sees more than latents: the same pictures as diffusers' pipelines make, and errors by name."""

import numpy as np
import pytest
import torch
from PIL import Image

from engine import Pipeline
from engine.__main__ import main
from engine.bundle import Bundle
from engine.contract import Range, Shapes
from engine.depth import Depth
from engine.edit import Edit
from engine.errors import (
    ChannelsError,
    DepthMapError,
    GuidanceError,
    ImageError,
    MaskError,
    NoiseLevelError,
    StrengthError,
)
from engine.picture import psnr
from engine.resize import resampled
from export.oracles import beside_text
from export.tensorrt.build import build_plans
from export.tensorrt.profiles import with_rows

from . import fakes
from .conftest import copy_bundle
from .engine.backends.test_tensorrt import VERSION
from .engine.sampling.test_samplers import CLASSES
from .test_image_to_image import BACKENDS, HEIGHT, PROMPTS, WIDTH, picture
from .test_inpainting import mask

pytestmark = pytest.mark.slow
FAST = {"num_inference_steps": 2, "progress": False}
QUICK = {"num_inference_steps": 2, "backends": ["onnxruntime"]}
KINDS = ("inpaint", "depth", "edit", "upscale")
IMAGES = [picture(0), picture(1)]
MASKS = [mask(), mask(part=(0, 0, 64, 40))]
DEPTHS = np.random.default_rng(2).random((2, 48, 80), np.float32)
SMALL = [picture(0, 16, 24), picture(1, 16, 24)]
SAMPLERS = ("ddim", "euler_a")


class Both:
    """Our pipelines of a model, one on each backend of a CPU, and diffusers'."""

    def __init__(self, bundle, source):
        self.ours = {name: Pipeline.load(bundle, backend=name) for name in BACKENDS}
        self.theirs, self._config = source.pipeline(), source.scheduler_config()

    def diffusers(self, sampler, seed, **options):
        cls, extra = CLASSES[sampler]
        own = {name: value for name, value in self._config.items() if not name.startswith("_")}
        self.theirs.scheduler = cls.from_config({**own, **extra})
        several = isinstance(seed, list)
        generator = [torch.Generator().manual_seed(s) for s in seed] if several else torch.Generator().manual_seed(seed)
        if "depth_map" in options:
            options["depth_map"] = torch.from_numpy(options["depth_map"])
        with torch.no_grad():
            return self.theirs(generator=generator, **options).images

    def check(self, sampler, seed, size=False, backends=BACKENDS, **options):
        """Latents after the last step. `size`: diffusers is told height and width."""
        options = {"prompt": PROMPTS, "num_inference_steps": 4, "guidance_scale": 7.5, **options}
        told = {"height": HEIGHT, "width": WIDTH} if size else {}
        wanted = self.diffusers(sampler, seed, output_type="latent", **options, **told).numpy()
        for name in backends:
            made = self.ours[name](seed=seed, scheduler=sampler, output_type="latent", progress=False, **options).images
            assert made.shape == wanted.shape
            assert np.abs(made - wanted).max() < 1e-3, name


@pytest.fixture(scope="module")
def both(joined_bundles, joined_sources):
    made = {}

    def of(kind) -> Both:
        if kind not in made:
            made[kind] = Both(joined_bundles[kind], joined_sources[kind])
        return made[kind]

    yield of
    for one in made.values():
        for pipeline in one.ours.values():
            pipeline.close()


# ----------------------------------------------------------------------------------------- the same as diffusers'


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_nine_channels_repaint_as_in_diffusers(both, sampler, strength):
    given = {"image": IMAGES, "mask_image": MASKS, "strength": strength}
    both("inpaint").check(sampler, [3, 1234567], size=True, **given)


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_one_seed_draws_masked_images_after_the_noise(both, strength):
    """And a masked image that two seeds share is drawn by the first."""
    given = {"mask_image": mask(), "strength": strength, **QUICK}
    both("inpaint").check("euler_a", 7, size=True, image=IMAGES, **given)
    both("inpaint").check("euler_a", [7, 8], size=True, image=IMAGES[0], **given)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_depth_maps_guide_as_in_diffusers(both, sampler):
    both("depth").check(sampler, [3, 1234567], image=IMAGES, depth_map=DEPTHS, strength=0.6)
    both("depth").check(sampler, 7, image=IMAGES[0], depth_map=DEPTHS[:1], **QUICK)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_instructions_change_pictures_as_in_diffusers(both, sampler):
    both("edit").check(sampler, [3, 1234567], image=IMAGES, image_guidance_scale=1.8)
    both("edit").check(sampler, 7, image=IMAGES, **QUICK)


def test_each_guidance_scale_of_one_leaves_a_row_out(both):
    for scales in ({"guidance_scale": 1.0}, {"image_guidance_scale": 1.0}, {"image_guidance_scale": 7.5}):
        both("edit").check("ddim", 7, image=IMAGES[0], prompt=PROMPTS[0], **QUICK, **scales)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_small_pictures_become_larger_as_in_diffusers(both, sampler):
    both("upscale").check(sampler, [3, 1234567], image=SMALL, noise_level=25)
    both("upscale").check(sampler, 7, image=SMALL, **QUICK)


def test_without_a_negative_prompt_the_upscaler_evaluates_one_row(both):
    asked = {"prompt": PROMPTS[0], "image": picture(0, 19, 26), "noise_level": 0, "guidance_scale": 1.0}
    both("upscale").check("ddim", 7, **asked, **QUICK)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_diffusers(both, kind):
    """The upscaler's are four times the picture's, and its decoder is another."""
    model = both(kind)
    size = {"height": HEIGHT, "width": WIDTH} if kind == "inpaint" else {}
    given = {"inpaint": {"image": IMAGES[0], "mask_image": MASKS[0]}, "upscale": {"image": SMALL[0]}}
    given |= {"depth": {"image": IMAGES[0], "depth_map": DEPTHS[:1]}, "edit": {"image": IMAGES[0]}}
    asked = {"prompt": [PROMPTS[0]], "num_inference_steps": 3, "guidance_scale": 7.5, **given[kind]}
    wanted = np.asarray(model.diffusers("ddim", 7, **asked, **size)[0]).astype(int)
    made = np.asarray(model.ours["onnxruntime"](seed=7, scheduler="ddim", progress=False, **asked).images[0])
    assert made.shape == (HEIGHT, WIDTH, 3)
    assert (np.abs(made - wanted) <= 1).mean() > 0.999


def test_nine_channels_paint_the_part_around_the_mask(both):
    model, small = both("inpaint"), mask(80, 120, (20, 30, 44, 70))
    asked = {"prompt": PROMPTS[0], "image": picture(0, 80, 120), "mask_image": small, "padding_mask_crop": 8}
    asked |= {"num_inference_steps": 3, "height": 64, "width": 64}
    wanted = np.asarray(model.diffusers("ddim", 7, **asked)[0]).astype(int)
    made = np.asarray(model.ours["onnxruntime"](seed=7, scheduler="ddim", progress=False, **asked).images[0])
    assert (np.abs(made - wanted) <= 1).mean() > 0.999


def test_composite_keeps_what_is_not_white(both):
    asked = {"image": IMAGES[0], "mask_image": MASKS[0], "composite": True, "seed": 0}
    made = np.asarray(both("inpaint").ours["onnxruntime"](PROMPTS[0], **asked, **FAST).images[0])
    kept = np.asarray(MASKS[0]) == 0
    assert np.array_equal(made[kept], np.asarray(IMAGES[0])[kept])
    assert not np.array_equal(made, np.asarray(IMAGES[0]))


@pytest.mark.parametrize("shape", [(5, 7), (40, 33), (8, 12)])
def test_bicubic_is_torchs(shape):
    plane = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    given = torch.from_numpy(plane)[None, None]
    wanted = torch.nn.functional.interpolate(given, size=(8, 12), mode="bicubic", align_corners=False)[0, 0]
    np.testing.assert_allclose(resampled(plane, 8, 12, "bicubic"), wanted.numpy(), atol=1e-5)


def test_a_picture_of_depths_is_read_as_grey():
    levels = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1))
    one, other = Depth.check(Image.fromarray(levels)), Depth.check(levels.astype(float))
    np.testing.assert_array_equal(one.channels(4, 4), other.channels(4, 4))


# ------------------------------------------------------------------------------------------------------- in lanes


@pytest.mark.parametrize(("kind", "backend"), [*((kind, "onnxruntime") for kind in KINDS), ("edit", "openvino")])
def test_pictures_of_different_prompts_and_samplers_share_a_call(both, kind, backend):
    """Each at an evaluation of its own, one without guidance: latents are those of calls of their own."""
    pipeline = both(kind).ours[backend]
    joins = pipeline.bundle.family.joins
    calls = [
        {"prompt": PROMPTS[0], "scheduler": "ddim", "seed": 1, "guidance_scale": 7.5},
        {"prompt": PROMPTS[1], "scheduler": "euler_a", "seed": 2, "guidance_scale": 1.0},
        {"prompt": PROMPTS[0], "scheduler": "euler", "seed": 3, "guidance_scale": 4.0},
    ]
    given = [beside_text(joins, 64, 64) for _ in calls]
    given[2]["image"] = picture(5, *(reversed(given[2]["image"][0].size)))
    calls = [{**call, **more, "height": 64, "width": 64, "num_inference_steps": 4} for call, more in zip(calls, given)]
    jobs = [pipeline.jobs(request_of(pipeline, **call))[0] for call in calls]
    lanes = pipeline.lanes(3, 64, 64)
    for lane, job in enumerate(jobs):
        lanes.admit(lane, job)
    ends = [len(job.table) for job in jobs]
    for turn in range(max(ends) + 2):
        at = [turn - lane for lane in range(3)]
        lanes.step([index if 0 <= index < end else None for index, end in zip(at, ends)])
    for one, call in zip(lanes.latents(range(3)), calls):
        alone = pipeline(output_type="latent", progress=False, **call).images[0]
        np.testing.assert_allclose(one, alone, atol=1e-3)


def request_of(pipeline, **call):
    from engine.request import Request

    defaults = {"negative_prompt": None, "num_images_per_prompt": 1, "eta": 0.0, "latents": None}
    defaults |= {"output_type": "latent", "callback": None, "progress": False}
    return Request.check(pipeline.limits, **{**defaults, **call})


@pytest.mark.parametrize("kind", ["edit", "upscale"])
def test_tensorrt_makes_the_pictures_of_onnxruntime(joined_bundles, tmp_path, kind):
    """On the fake: two pictures with guidance, then one without."""
    bundle = copy_bundle(joined_bundles[kind], tmp_path)
    family = Bundle.open(bundle, verify=False).family
    sizes = Range(32, 64, 96)
    with fakes.install(VERSION):
        profiles = with_rows(Shapes(sizes, sizes, Range(1, 2, 2)), family.most_rows)
        build_plans(bundle, profiles, compare=False, report=lambda message: None)
    calls = [
        {"prompt": PROMPTS, **beside_text(family.joins, 64, 64, 2), "seed": [0, 1], "scheduler": "euler_a"},
        {"prompt": PROMPTS[0], **beside_text(family.joins, 64, 64), "seed": 2, "guidance_scale": 1.0},
    ]
    with Pipeline.load(bundle, backend="onnxruntime") as oracle:
        wanted = [image for call in calls for image in oracle(**call, **FAST).images]
    with fakes.install(VERSION), Pipeline.load(bundle) as pipeline:
        made = [image for call in calls for image in pipeline(**call, **FAST).images]
    for one, other in zip(made, wanted, strict=True):
        assert psnr(np.asarray(one), np.asarray(other)) > 40


def test_the_rows_of_two_guidance_scales():
    rows = Edit(1.5).rows([({}, 1.0)], {}, np.array([7.5, 1.0]))
    assert [row.weight.tolist() for row in rows] == [[-0.5, 0.0], [-6.0, 0.0], [7.5, 1.0]]
    assert [row.blind for row in rows] == [True, False, False]


# --------------------------------------------------------------------------------------- the command line and errors


def test_the_command_line_takes_depth_maps_scales_and_noise_levels(joined_bundles, tmp_path):
    picture(0, 64, 64).save(tmp_path / "image.png")
    mask(64, 64).save(tmp_path / "grey.png")
    picture(0, 16, 16).save(tmp_path / "small.png")
    asked = [PROMPTS[0], "--quiet", "--steps", "2", "--seed", "0", "--output", str(tmp_path / "out.png")]
    image = ["--image", str(tmp_path / "image.png")]
    given = {
        "inpaint": [*image, "--mask", str(tmp_path / "grey.png")],
        "depth": [*image, "--depth-map", str(tmp_path / "grey.png")],
        "edit": [*image, "--image-guidance-scale", "1.7"],
        "upscale": ["--image", str(tmp_path / "small.png"), "--noise-level", "12"],
    }
    texts = {}
    for kind, options in given.items():
        assert main(["picture", *asked, "--bundle", str(joined_bundles[kind]), *options]) == 0
        with Image.open(tmp_path / "out.png") as made:
            assert made.size == (64, 64)
            texts[kind] = made.info["parameters"]
    assert "Image CFG scale: 1.7" in texts["edit"]
    assert "Noise level: 12" in texts["upscale"]
    assert "Denoising strength" in texts["depth"]
    assert "Denoising strength" not in texts["edit"]
    wrong = ["--bundle", str(joined_bundles["edit"]), "--noise-level", "12"]
    assert main(["picture", *asked, *image, *wrong]) == 2


LATENTS = np.zeros((1, 4, 8, 8), np.float32)


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "words"),
    [
        ("inpaint", {}, ChannelsError, "an inpainting model .9 channels., which makes no picture of a text alone"),
        ("inpaint", {"image": IMAGES[0]}, ChannelsError, "pass image and mask_image"),
        ("inpaint", {"image": LATENTS, "mask_image": mask(64, 64)}, ImageError, "image holds latents"),
        ("depth", {"image": IMAGES[0]}, ChannelsError, "pass image and depth_map"),
        ("depth", {"image": IMAGES[0], "depth_map": DEPTHS, "mask_image": MASKS[0]}, MaskError, "of this kind repaint"),
        ("depth", {"image": IMAGES[0], "depth_map": []}, DepthMapError, "an empty list"),
        ("depth", {"image": IMAGES[0], "depth_map": DEPTHS[None]}, DepthMapError, "has shape .1, 2, 48, 80."),
        ("depth", {"image": IMAGES[0], "depth_map": DEPTHS[0] > 0}, DepthMapError, "an array of bool"),
        ("depth", {"image": IMAGES[0], "depth_map": np.ones((8, 8))}, DepthMapError, "is 1 everywhere"),
        ("depth", {"image": IMAGES[0], "depth_map": np.diag([1.0, np.inf])}, DepthMapError, "not finite"),
        ("depth", {"image": IMAGES[0], "depth_map": [DEPTHS[0]] * 3}, ImageError, "3 depth maps for 1 pictures"),
        ("depth", {"image": IMAGES[0], "depth_map": "no.png"}, ImageError, "depth_map 'no.png' cannot be read"),
        ("edit", {}, ChannelsError, "InstructPix2Pix .8 channels., which makes no picture of a text alone"),
        ("edit", {"image": IMAGES[0], "strength": 0.5}, StrengthError, "takes no strength; leave it out"),
        ("edit", {"image": IMAGES[0], "image_guidance_scale": 0.5}, GuidanceError, "a number from 1 to 1000"),
        ("edit", {"image": IMAGES[0], "depth_map": DEPTHS[0]}, ChannelsError, "depth_map is about channels"),
        ("upscale", {}, ChannelsError, "pass image, the picture to make larger"),
        ("upscale", {"image": SMALL[0], "noise_level": 30}, NoiseLevelError, "an integer from 0 to 29, such as 20"),
        ("upscale", {"image": SMALL[0], "noise_level": 1.5}, NoiseLevelError, "noise_level is 1.5"),
        ("upscale", {"image": LATENTS}, ImageError, "has shape .4, 8, 8."),
    ],
)
def test_what_a_model_cannot_see_is_an_error_by_name(both, kind, arguments, error, words):
    with pytest.raises(error, match=words):
        both(kind).ours["onnxruntime"](PROMPTS[0], **{**FAST, **arguments})


@pytest.mark.parametrize(
    ("name", "value"), [("depth_map", DEPTHS[0]), ("image_guidance_scale", 2.0), ("noise_level", 3)]
)
def test_a_text_to_image_model_has_no_such_channels(demo, name, value):
    with pytest.raises(ChannelsError, match=r"channels that this model's U-Net does not have.*take a bundle of such"):
        demo(PROMPTS[0], **FAST, **{name: value})
