"""Models without texts: the same seed gives the same picture as diffusers' pipelines."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from PIL import Image

from engine import Bundle, Pipeline
from engine import errors as e
from engine.__main__ import main
from engine.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine.backends.openvino.backend import OpenVinoBackend
from engine.contract import Range, Shapes
from engine.sampling.catalog import SAMPLERS
from engine.sampling.scheduler_classes import CLASSES
from export.compare import random_inputs
from export.sources.schedulers import SHIPPED
from export.textless import TextlessPipeline

from . import fakes
from .conftest import copy_bundle
from .models import tiny_textless

pytestmark = pytest.mark.slow
BACKENDS = ["onnxruntime", "openvino"]
STEPS, SEEDS = 10, [7, 1234567]


class Opened(dict):
    """Our pipelines by kind and backend, loaded when they are first asked for."""

    def __init__(self, bundles):
        super().__init__()
        self._bundles = bundles

    def __missing__(self, key):
        kind, backend = key
        self[key] = Pipeline.load(self._bundles[kind], backend=backend)
        return self[key]


@pytest.fixture(scope="module")
def ours(textless_bundles):
    return Opened(textless_bundles)


def check_pixels(result, expected):
    """Within 1 of 255, at 99.9 % of the values at least."""
    pixels = np.stack([np.asarray(image) for image in result.images]).astype(int)
    assert pixels.shape == expected.shape
    assert (np.abs(pixels - np.round(255 * expected)) <= 1).mean() >= 0.999


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generators():
    return [torch.Generator().manual_seed(seed) for seed in SEEDS]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["ddpm", "ldm"])
def test_the_same_seeds_give_the_same_pictures_as_the_kinds_pipeline(ours, kind, backend):
    """That of DDPM clips and draws noise; LDMPipeline's DDIMScheduler does neither."""
    theirs = quiet(tiny_textless(kind))
    expected = theirs(2, generators(), num_inference_steps=STEPS, output_type="np").images
    result = ours[kind, backend](num_images_per_prompt=2, num_inference_steps=STEPS, seed=SEEDS)
    check_pixels(result, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_seed_is_one_generator_for_all_pictures(ours, backend):
    theirs = quiet(tiny_textless("ddpm"))
    expected = theirs(2, torch.Generator().manual_seed(3), num_inference_steps=STEPS, output_type="np").images
    result = ours["ddpm", backend](num_images_per_prompt=2, num_inference_steps=STEPS, seed=3)
    check_pixels(result, expected)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_clips_as_ddim_pipeline_does(ours, eta):
    theirs = quiet(DDIMPipeline(tiny_textless("ddpm").unet, DDIMScheduler()))
    expected = theirs(2, generators(), eta=eta, num_inference_steps=STEPS, output_type="np").images
    asked = {"num_images_per_prompt": 2, "num_inference_steps": STEPS, "seed": SEEDS, "scheduler": "ddim", "eta": eta}
    check_pixels(ours["ddpm", "onnxruntime"](**asked), expected)


@torch.no_grad()
def classes_with_diffusers(labels, steps):
    """A U-Net with classes has no pipeline in diffusers: its loop, one generator for all pictures."""
    model, generator = tiny_textless("iddpm"), torch.Generator().manual_seed(0)
    unet, scheduler = model.unet.eval(), model.scheduler
    scheduler.set_timesteps(steps)
    sample = torch.randn(len(labels), 3, 16, 16, generator=generator)
    for t in scheduler.timesteps:
        output = unet(sample, t, class_labels=torch.tensor(labels)).sample
        sample = scheduler.step(output, t, sample, generator=generator).prev_sample
    return sample


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_and_learned_variance_equal_diffusers(ours, backend):
    labels, last = [0, 3, 4], {}
    expected = classes_with_diffusers(labels, STEPS)
    result = ours["iddpm", backend](
        class_labels=labels,
        num_inference_steps=STEPS,
        seed=0,
        callback_on_step_end=lambda _, i, t, tensors: last.update(tensors),
    )
    np.testing.assert_allclose(last["latents"], expected.numpy(), atol=1e-3)
    check_pixels(result, (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy())


def test_every_class_is_another_picture(ours):
    images = ours["iddpm", "onnxruntime"](class_labels=range(5), num_inference_steps=5, seed=[0] * 5).images
    assert len({image.tobytes() for image in images}) == 5


def clips_as_its_class(row):
    return "clip_sample" not in CLASSES[row.scheduler_class] or "clip_sample_range" in row.options


@pytest.mark.parametrize(
    ("kind", "sampler"),
    [("ddpm", name) for name in SHIPPED if clips_as_its_class(SAMPLERS[name])]
    + [("iddpm", name) for name in ("ddim", "ddpm", "euler", "dpmpp_2m")],
)
def test_every_sampler_equals_diffusers_scheduler(ours, textless_sources, kind, sampler):
    """The variance that a U-Net has learned is for DDPM alone; others leave it out."""
    row, source, last = SAMPLERS[sampler], textless_sources[kind], {}
    config = {**source.scheduler_config(), "_class_name": row.scheduler_class, **row.preset}
    theirs = TextlessPipeline(source.load("unet"), None, config, source.family)
    expected, _ = theirs(2, torch.Generator().manual_seed(5), (16, 16), 6)
    labels = {"class_labels": 2} if kind == "iddpm" else {}
    ours[kind, "onnxruntime"](
        **labels,
        num_inference_steps=6,
        seed=5,
        scheduler=sampler,
        callback_on_step_end=lambda _, i, t, tensors: last.update(tensors),
    )
    scale = max(1.0, float(expected.abs().max()))
    np.testing.assert_allclose(last["latents"][0], expected.numpy(), atol=1e-3 * scale)


def test_a_call_without_arguments_makes_one_picture(ours):
    pipeline = ours["ddpm", "onnxruntime"]
    assert [image.size for image in pipeline(num_inference_steps=1).images] == [(16, 16)]


def test_the_parameters_name_the_class_and_no_text(ours):
    image = ours["iddpm", "onnxruntime"](class_labels=3, num_inference_steps=1, seed=0).images[0]
    assert image.info["parameters"].startswith("Steps: 1, Sampler: DDPM, Seed: 0, Size: 16x16, Model: iddpm")
    assert ", Class: 3, Version: " in image.info["parameters"]


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "words"),
    [
        ("ddpm", {"prompt": "a cat"}, e.PromptError, "prompt is 'a cat', and this model makes pictures without texts"),
        ("ddpm", {"negative_prompt": "a dog"}, e.PromptError, "negative_prompt is 'a dog', and this model makes"),
        ("ddpm", {"class_labels": 0}, e.ClassLabelError, "class_labels is 0, and this model has no classes"),
        ("iddpm", {}, e.ClassLabelError, "class_labels is missing; this model has the classes 0 to 4"),
        ("iddpm", {"class_labels": []}, e.ClassLabelError, "class_labels is empty; this model has the classes 0 to 4"),
        ("iddpm", {"class_labels": 5}, e.ClassLabelError, "class label 5 is not an integer of this model"),
        ("iddpm", {"class_labels": [0, -1]}, e.ClassLabelError, "class label -1 is not"),
        ("iddpm", {"class_labels": 1.0}, e.ClassLabelError, "class label 1.0 is not"),
        ("iddpm", {"class_labels": True}, e.ClassLabelError, "class label True is not"),
        ("ddpm", {"guidance_scale": 3.0}, e.GuidanceError, "nothing that guidance could make them follow"),
        ("ddpm", {"guidance_rescale": 0.7}, e.GuidanceError, "nothing that guidance could make them follow"),
        ("ddpm", {"height": 32}, e.SizeError, "height 32 is not a size that this bundle was built for"),
        ("ddpm", {"num_images_per_prompt": 9}, e.BatchError, "9 pictures in one call"),
    ],
)
def test_a_mistake_has_a_named_error(ours, kind, arguments, error, words):
    with pytest.raises(error) as caught:
        ours[kind, "onnxruntime"](**arguments)
    assert words in str(caught.value)


def test_schedulers_may_clip_no_quantiles(textless_bundles, tmp_path, edit_manifest):
    bundle = copy_bundle(textless_bundles["ddpm"], tmp_path)
    edit_manifest(bundle, scheduler={"_class_name": "DDPMScheduler", "thresholding": True})
    with pytest.raises(e.SchedulerConfigError, match="thresholding=true clamps the samples"):
        Pipeline.load(bundle, backend="onnxruntime")


def test_tensorrt_makes_the_same_pictures(ours, textless_bundles, tmp_path):
    """The fake one, with plans for up to two pictures: lanes, packing and decoder need nothing of their own."""
    from export.tensorrt.build import build_plans
    from export.tensorrt.profiles import with_rows

    bundle = copy_bundle(textless_bundles["iddpm"], tmp_path)
    sides, batch = Range(16, 16, 16), Range(1, 2, 2)
    asked = {"class_labels": [1, 4], "num_inference_steps": 4, "seed": SEEDS}
    with fakes.install("10.16.1"):
        quiet = {"compare": False, "report": lambda message: None}
        build_plans(bundle, with_rows(Shapes(sides, sides, batch), most_rows=1), **quiet)
        with Pipeline.load(bundle, backend="tensorrt") as pipeline:
            made = pipeline(**asked).images
    expected = ours["iddpm", "onnxruntime"](**asked).images
    assert [image.tobytes() for image in made] == [image.tobytes() for image in expected]


def test_the_manifest_says_what_the_family_is(textless_bundles, tmp_path, edit_manifest):
    manifest = json.loads((textless_bundles["iddpm"] / "manifest.json").read_text())
    assert (manifest["family"], "tokenizer" in manifest) == ("textless", False)
    assert manifest["traits"] == {"channels": 3, "factor": 1, "classes": 5, "learned_variance": True}
    bundle = copy_bundle(textless_bundles["iddpm"], tmp_path)
    edit_manifest(bundle, traits={**manifest["traits"], "channels": 0})
    with pytest.raises(e.ManifestError, match=r"traits.channels is 0; it must be an integer from 1 to 1024"):
        Pipeline.load(bundle, backend="onnxruntime")


def command(bundle, output, *arguments):
    common = ["picture", "--bundle", str(bundle), "--output", str(output), "--backend", "onnxruntime", "--steps", "2"]
    return main([*common, *arguments])


def test_the_command_takes_classes(textless_bundles, tmp_path, capsys):
    asked = ["--class-label", "3", "--class-label", "0", "--seed", "7"]
    assert command(textless_bundles["iddpm"], tmp_path / "a.png", *asked) == 0
    printed = capsys.readouterr().out
    assert "a-0.png (seed 7, class 3)" in printed
    assert "a-1.png (seed 7, class 0)" in printed
    assert Image.open(tmp_path / "a-0.png").tobytes() != Image.open(tmp_path / "a-1.png").tobytes()


def test_the_command_needs_no_text_where_the_model_has_none(textless_bundles, tmp_path, capsys):
    assert command(textless_bundles["ddpm"], tmp_path / "a.png", "--count", "2") == 0
    assert len(list(tmp_path.glob("a-*.png"))) == 2


@pytest.mark.parametrize(
    ("kind", "arguments", "words"),
    [
        ("ddpm", ["a cat"], "this model makes pictures without texts"),
        ("ddpm", ["--negative-prompt", "a dog"], "this model makes pictures without texts"),
        ("ddpm", ["--class-label", "1"], "this model has no classes"),
        ("iddpm", [], "class_labels is missing; this model has the classes 0 to 4"),
        ("iddpm", ["--class-label", "5"], "class label 5 is not an integer of this model"),
    ],
)
def test_the_command_names_a_mistake(textless_bundles, tmp_path, capsys, kind, arguments, words):
    assert command(textless_bundles[kind], tmp_path / "a.png", *arguments) == 2
    assert words in capsys.readouterr().err


def test_openvino_and_onnxruntime_make_the_same_step(textless_bundles):
    """Every slot: clipping and the learned variance too, with fewer samples than rows."""
    bundle = Bundle.open(textless_bundles["iddpm"])
    inputs = random_inputs(bundle.family["denoiser"], {"batch": 2, "rows": 3, "height": 16, "width": 24})
    first, second = (
        backend(bundle.graphs, family=bundle.family).run("denoiser", inputs)[0]
        for backend in (OnnxRuntimeBackend, OpenVinoBackend)
    )
    np.testing.assert_allclose(second, first, atol=1e-4 * np.abs(first).max())
