"""A second pass at a larger size: the same as diffusers makes in two calls, and right."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from torch.nn.functional import interpolate

from engine import Hires, Pipeline
from engine.__main__ import main
from engine.errors import GuidanceError, HiresError, PromptError, SizeError, StrengthError
from engine.picture import psnr
from export.demo.judge import judge

from . import fakes
from .engine.backends.test_tensorrt import VERSION
from .engine.sampling.test_samplers import CLASSES
from .test_image_to_image import BACKENDS, PROMPTS, beside_diffusers, picture

pytestmark = pytest.mark.slow
FAST = {"num_inference_steps": 4, "progress": False}


@pytest.fixture(scope="module")
def both(tiny_bundles, tiny_sources):
    yield from beside_diffusers(StableDiffusionPipeline, tiny_bundles["sd1"], tiny_sources["sd1"])


def scheduled(pipeline, config, sampler):
    cls, extra = CLASSES[sampler]
    pipeline.scheduler = cls.from_config({**{k: v for k, v in config.items() if not k.startswith("_")}, **extra})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def with_diffusers(both, seed, hires, enlarge, first="euler_a", second=None, output="latent", prompts=PROMPTS):
    """Two calls with one generator; `enlarge` is in between."""
    _, theirs, config = both
    several = isinstance(seed, list)
    generator = [torch.Generator().manual_seed(s) for s in seed] if several else torch.Generator().manual_seed(seed)
    with torch.no_grad():
        small = scheduled(theirs, config, first)(
            prompts, height=64, width=48, num_inference_steps=4, generator=generator, output_type=output
        ).images
        again = scheduled(StableDiffusionImg2ImgPipeline(**theirs.components), config, second or first)
        return again(
            hires.prompt or prompts,
            image=enlarge(small),
            strength=hires.strength,
            num_inference_steps=hires.steps or 4,
            generator=generator,
            output_type="latent",
        ).images.numpy()


def check_same(both, wanted, seed, hires, prompts=PROMPTS):
    for backend, pipeline in zip(BACKENDS, both[0], strict=True):
        asked = {"height": 64, "width": 48, "scheduler": "euler_a", "seed": seed, **FAST}
        made = pipeline(prompts, hires=hires, output_type="latent", **asked).images
        assert made.shape == wanted.shape
        assert np.abs(made - wanted).max() < 2e-3, backend


@pytest.mark.parametrize("seed", [7, [7, 8]], ids=["one seed", "two seeds"])
def test_a_second_pass_from_latents_is_diffusers_two_calls(both, seed):
    """Both samplers draw noise, so the random numbers of the second pass follow those of the first."""
    hires = Hires(scale=1.5, upscaler="bicubic-antialiased", strength=0.6, steps=5)
    wanted = with_diffusers(
        both, seed, hires, lambda small: interpolate(small, size=(12, 9), mode="bicubic", antialias=True)
    )
    check_same(both, wanted, seed, hires)


def test_a_second_pass_has_a_sampler_and_a_text_of_its_own(both):
    hires = Hires(height=96, width=96, upscaler="nearest", scheduler="dpmpp_2m", prompt="a ring", strength=0.8)
    wanted = with_diffusers(
        both, 7, hires, lambda small: interpolate(small, size=(12, 12)), second="dpmpp_2m", prompts=PROMPTS[0]
    )
    check_same(both, wanted, 7, hires, PROMPTS[0])


def test_a_second_pass_from_pixels_is_diffusers_two_calls(both):
    """An 8-bit picture is in between, so a difference of rounding may be seen."""
    hires = Hires(scale=2, upscaler="Lanczos", strength=0.6, steps=5)

    def enlarge(small):
        return [one.resize((96, 128), 1) for one in small]

    wanted = with_diffusers(both, 7, hires, enlarge, output="pil", prompts=PROMPTS[0])
    made = both[0][0](
        PROMPTS[0], hires=hires, output_type="latent", height=64, width=48, scheduler="euler_a", seed=7, **FAST
    ).images
    assert made.shape == wanted.shape == (1, 4, 16, 12)
    assert np.abs(made - wanted).max() < 0.05


# ------------------------------------------------------------------------------------------- the built-in model


@pytest.mark.parametrize("upscaler", ["bilinear", "lanczos"])
def test_a_larger_picture_shows_what_was_asked_for(demo, upscaler):
    seen = []
    made = demo(
        ["a large red circle on a blue background"] * 3,
        num_inference_steps=20,
        seed=[0, 1, 2],
        hires=Hires(scale=1.25, upscaler=upscaler, strength=0.5),
        callback_on_step_end=lambda _, i, t, tensors: seen.append((i, tensors["latents"].shape[2])),
        progress=False,
    )
    for image in made.images:
        verdict = judge(np.asarray(image.resize((64, 64))))
        assert image.size == (80, 80)
        assert (verdict.shape, verdict.colour, verdict.background, verdict.size) == ("circle", "red", "blue", "large")
    assert made.evaluations == len(made.timings.steps) == 30
    assert seen == [(i, 8 if i < 20 else 10) for i in range(30)]
    parameters = made.images[0].info["parameters"]
    assert "Size: 64x64" in parameters
    assert "Denoising strength: 0.5" in parameters
    assert "Hires upscale: 1.25" in parameters
    assert f"Hires upscaler: {'Latent' if upscaler == 'bilinear' else 'Lanczos'}" in parameters


def test_an_interrupted_first_pass_is_the_picture(demo):
    def stop(pipeline, index, timestep, tensors):
        pipeline.interrupt = True

    made = demo(PROMPTS[0], hires=Hires(), callback_on_step_end=stop, seed=0, **FAST)
    assert made.interrupted
    assert made.images[0].size == (64, 64)


def test_tensorrt_makes_the_second_pass_of_onnxruntime(planned, demo_fp16):
    """On the fake. A size that no plan has is an error before any work."""
    asked = {"height": 48, "width": 48, "hires": Hires(scale=2, strength=0.5), "seed": 0, **FAST}
    with Pipeline.load(demo_fp16, backend="onnxruntime") as oracle:
        wanted = oracle(PROMPTS[0], **asked).images
    with fakes.install(VERSION), Pipeline.load(planned(VERSION)) as pipeline:
        made = pipeline(PROMPTS[0], **asked).images
        with pytest.raises(SizeError, match=r"second pass of hires: height 128 .* build_engines.py --backend tensorrt"):
            pipeline(PROMPTS[0], hires=Hires(), **FAST)
    assert psnr(np.asarray(made[0]), np.asarray(wanted[0])) > 40


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("hires", "error", "words"),
    [
        (2, HiresError, r"hires is 2; pass engine.Hires\(scale=2\)"),
        (Hires(scale=0.5), HiresError, "scale of hires is 0.5; it must be a number from 1 to 64"),
        (Hires(scale=2, height=128), HiresError, "a scale and a size; pass one of them"),
        (Hires(height=0), HiresError, "height of hires is 0"),
        (Hires(width="96"), HiresError, "width of hires is '96'"),
        (Hires(upscaler="esrgan"), HiresError, "upscaler of hires is 'esrgan'; it must be one of nearest, "),
        (Hires(scale=4), SizeError, "second pass of hires: height 256 is not a size .* Build for 256: python build_e"),
        (Hires(height=100, width=100), SizeError, "second pass of hires: height 100 is not a multiple of 8"),
        (Hires(strength=2), StrengthError, "strength is 2; it must be a number from 0 to 1"),
        (Hires(strength=0.1), StrengthError, "leaves no step"),
        (Hires(guidance_scale="7"), GuidanceError, "guidance_scale is '7'"),
        ({"scale": 2, "size": 3}, HiresError, "hires has 'size'; there are: scale, height, width"),
        (Hires(prompt=["a", "b", "c"]), PromptError, "hires has 3 prompts for 2 of the first pass"),
    ],
)
def test_what_cannot_be_a_second_pass_is_an_error_by_name(demo, hires, error, words):
    with pytest.raises(error, match=words):
        demo(PROMPTS, hires=hires, **FAST)


def test_a_second_pass_does_not_go_with_an_image_or_a_schedule_of_guidance(demo):
    with pytest.raises(HiresError, match="image is given; pass one of them"):
        demo(PROMPTS, hires=Hires(), image=picture(0, 64, 64), **FAST)
    with pytest.raises(HiresError, match="give hires a guidance_scale of its own"):
        demo(PROMPTS, hires=Hires(), guidance_scale=[7, 6, 5, 4], **FAST)


# ---------------------------------------------------------------------------------------------- the command line


def command(demo_bundle, tmp_path, *options):
    given = [PROMPTS[0], "--bundle", str(demo_bundle), "--quiet", "--steps", "4", "--output", str(tmp_path / "out.png")]
    return main(["picture", *given, *options])


def test_the_command_line_makes_a_second_pass_of_a_variation(demo_bundle, tmp_path):
    second = ["--hires", "96x80", "--hires-upscaler", "nearest", "--hires-steps", "2", "--hires-strength", "0.5"]
    varied = ["--seed", "3", "--subseed", "4", "--subseed-strength", "0.5", "--count", "2"]
    assert command(demo_bundle, tmp_path, *second, "--hires-prompt", "a ring", *varied) == 0
    for i in range(2):
        with Image.open(tmp_path / f"out-{i}.png") as made:
            assert made.size == (96, 80)
            text = made.info["parameters"]
        assert f"Seed: 3, Size: 64x64, Model: demo, Variation seed: {4 + i}, Variation seed strength: 0.5" in text
        assert "Hires steps: 2, Hires upscaler: Latent (nearest), Hires resize: 96x80, Hires prompt: a ring" in text


def test_the_command_line_refuses_half_a_second_pass(demo_bundle, tmp_path, capsys):
    assert command(demo_bundle, tmp_path, "--hires-steps", "3") == 2
    assert "no --hires; pass --hires 2" in capsys.readouterr().err
    assert command(demo_bundle, tmp_path, "--hires", "2", "--hires-upscaler", "esrgan") == 2
    assert command(demo_bundle, tmp_path, "--subseed", "2") == 2
    with pytest.raises(SystemExit):
        command(demo_bundle, tmp_path, "--hires", "0.5")
