"""A1111's text as a call, and what is not honoured."""

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from engine import Hires, metadata
from engine.errors import MetadataError
from engine.record import call_parameters
from engine.reproduce import compare, make_again, plan, read_pixels
from engine.webui_call import call_of

HEAD = "a cat\nNegative prompt: a dog\n"
TEXT = (
    HEAD + "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 5, Size: 512x768, RNG: CPU, "
    "Sigma churn: 1, Schedule rho: 5, Model: other, Version: v1.10.0"
)


def line(**values):
    return HEAD + ", ".join(f"{key.replace('_', ' ')}: {value}" for key, value in values.items())


def test_a1111s_text_is_a_call():
    asked = call_of(TEXT, call_parameters() - {"prompt_syntax"}, {})
    assert asked.arguments == {
        "prompt": "a cat",
        "negative_prompt": "a dog",
        "num_inference_steps": 20,
        "guidance_scale": 7.0,
        "seed": 5,
        "width": 512,
        "height": 768,
        "scheduler": "DPM++ 2M",
        "schedule_type": "karras",
        "sampler_options": {"rho": 5.0},
        "num_images_per_prompt": 1,
    }
    assert (asked.index, asked.model) == (0, "other")
    assert [(one.key, one.reason) for one in asked.ignored] == [("Sigma churn", "DPM++ 2M does not take it")]


def test_what_a_call_takes_is_taken_from_the_text_when_it_can():
    text = line(Steps=20, Sampler="Euler a", Seed=1, Size="64x64", RNG="CPU", Denoising_strength=0.7)
    asked = call_of(text, {"prompt_syntax", "seed", "strength"}, {"image": "a.png"})
    taken = asked.arguments
    assert (taken["prompt_syntax"], taken["strength"], taken["image"]) == ("a1111", 0.7, "a.png")
    assert [one.key for one in asked.ignored] == ["Steps"]
    asked = call_of(text, {"seed", "num_inference_steps", "strength"}, {})
    assert "strength" not in asked.arguments
    assert [(one.key, one.reason) for one in asked.ignored] == [
        ("Denoising strength", "the text has no image; pass --image FILE")
    ]


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"Sampler": "Magic"}, "Sampler", "there is no such sampler here, so the model's own is taken"),
        ({"Schedule type": "Sideways"}, "Schedule type", "there is no such schedule type here"),
        ({"Sampler": "DDIM", "Schedule type": "Karras"}, "Schedule type", "DDIM has a grid of its own"),
        ({"RNG": "NV"}, "RNG", "noise is drawn as on the CPU, so the picture is another"),
        ({"Denoising strength": "0.7"}, "Denoising strength", "the text has no image; pass --image FILE"),
        ({"Masked area padding": "32"}, "Masked area padding", "the text has no mask_image; pass --mask FILE"),
        ({"Mask blur": "4"}, "Mask blur", "there is no such setting here"),
        ({"CFG interval": "x"}, "CFG interval", "this is no value of it"),
        ({"Sigma noise": "99"}, "Sigma noise", "Euler a does not take it"),
        ({"Batch index": "3"}, "Batch index", "the call makes 1 pictures"),
        (
            {"Hires upscale": "2", "Hires upscaler": "R-ESRGAN 4x+", "Denoising strength": "0.5"},
            "Hires upscaler",
            "there is no such upscaler here, so bilinear is taken",
        ),
        ({"Tiling": "True"}, "Tiling", "there is no such setting here"),
    ],
)
def test_what_is_not_honoured_has_its_name_and_a_reason(changes, key, reason):
    values = {"Steps": "20", "Sampler": "Euler a", "Seed": "1", "RNG": "CPU", **changes}
    text = HEAD + ", ".join(f"{name}: {value}" for name, value in values.items())
    ignored = call_of(text, call_parameters(), {}).ignored
    assert [(one.key, one.reason) for one in ignored] == [(key, reason)]


@pytest.mark.parametrize(
    "arguments",
    [
        {"seed": 3, "scheduler": "euler_a", "sampler_options": {"eta": 0.5}},
        {"seed": 3, "scheduler": "Euler a", "num_images_per_prompt": 2},
        {"seed": 3, "scheduler": "ddim", "eta": 0.5, "guidance_scale": [3, 2.5], "guidance_interval": (0, 0.5)},
        {"seed": 3, "scheduler": "euler", "sigmas": [10.1, 1 / 3, 0]},
        {"seed": 3, "scheduler": "dpmpp_2m_karras", "guidance_rescale": 0.5},
        {"seed": 3, "scheduler": "dpm++ 2m", "schedule_type": "SGM Uniform"},
        {"seed": 3, "scheduler": "ddim", "subseed": 9, "subseed_strength": 0.3},
        {"seed": 3, "scheduler": "ddim", "clip_skip": 1, "emphasis": "ignore", "prompt_syntax": "a1111"},
        {
            "seed": 3,
            "scheduler": "ddim",
            "hires": Hires(1.5, steps=3, strength=0.6, upscaler="bicubic", prompt="a star"),
        },
        {"seed": 3, "scheduler": "ddim", "hires": Hires(width=96, height=80, scheduler="euler", guidance_scale=3)},
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_our_own_text_is_enough_to_make_the_picture_again(demo, tmp_path, arguments):
    image = demo("a ring", num_inference_steps=2, progress=False, **arguments).images[-1]
    text = PngInfo()
    text.add_text("parameters", image.info["parameters"])
    image.save(tmp_path / "a.png", pnginfo=text)
    wanted = plan(tmp_path / "a.png", metadata.read(tmp_path / "a.png"), {})
    assert (wanted.record, wanted.ignored) == (None, ())
    assert compare(read_pixels(tmp_path / "a.png"), wanted, make_again(demo, wanted, progress=False)).equal


def test_our_text_and_the_pictures_are_enough_for_an_inpainted_one(demo, tmp_path):
    begin, mask = Image.new("RGB", (64, 64), "red"), np.zeros((64, 64), bool)
    mask[:, :32] = True
    given = {"image": begin, "mask_image": mask}
    arguments = {"strength": 0.9, "composite": True, "padding_mask_crop": 2, "seed": 1, "num_inference_steps": 2}
    image = demo("a ring", **arguments, **given, progress=False).images[0]
    asked = call_of(image.info["parameters"], call_parameters(), given)
    assert (asked.ignored, asked.model) == ((), "demo")
    assert demo(**asked.arguments, progress=False).images[0].tobytes() == image.tobytes()


def test_another_model_is_a_reason_for_other_pixels(demo, tmp_path):
    text = PngInfo()
    text.add_text("parameters", "a ring\nSteps: 1, Sampler: Euler a, Seed: 1, Model: other")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png", pnginfo=text)
    wanted = plan(tmp_path / "a.png", metadata.read(tmp_path / "a.png"), {})
    again = compare(read_pixels(tmp_path / "a.png"), wanted, make_again(demo, wanted, progress=False))
    assert again.reasons == ("model: other then, demo now", "settings: A1111's text, which does not say everything")


def test_a_text_without_settings_is_an_error(tmp_path):
    text = PngInfo()
    text.add_text("parameters", "only a prompt")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(MetadataError, match="has a text, and no settings in it: 'only a prompt'"):
        plan(tmp_path / "a.png", metadata.read(tmp_path / "a.png"), {})
