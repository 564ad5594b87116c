"""Latent diffusion with a text, from before Stable Diffusion: the same seed gives the same picture as diffusers."""

import json

import numpy as np
import pytest
import torch

from engine import Pipeline
from export import errors as e
from export.build import build, shapes_of
from export.latent_diffusion import draw
from export.sources.checkpoint import open_folder, resolve
from export.sources.latent_folder import LatentFolder

from .conftest import ENGINES
from .models import tiny_latent_diffusion

pytestmark = pytest.mark.slow
PROMPT = "A large red circle, on a blue background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("latent") / "bert"
    tiny_latent_diffusion().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def bundle(folder):
    source = open_folder(folder, "bert", {"kind": "folder", "id": "bert"}, None)
    assert isinstance(source, LatentFolder)
    return build(source, ENGINES / "textless", "fp32", shapes_of(source), report=lambda message: None).folder


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("guidance_scale", [1.0, 5.0])
def test_the_same_seed_gives_the_same_picture_as_diffusers(bundle, backend, guidance_scale):
    last = {}
    asked = {"height": 64, "width": 64, "num_inference_steps": 10, "guidance_scale": guidance_scale}
    with Pipeline.load(bundle, backend=backend) as pipeline:
        result = pipeline(PROMPT, seed=3, callback_on_step_end=lambda _, i, t, tensors: last.update(tensors), **asked)
    latents, values = draw(tiny_latent_diffusion(), PROMPT, generator=torch.Generator().manual_seed(3), **asked)
    np.testing.assert_allclose(last["latents"][0], latents.numpy(), atol=1e-3)
    difference = np.abs(np.asarray(result.images[0]).astype(int) - np.round(255 * values.numpy()))
    assert (difference <= 1).mean() >= 0.999


def test_tokens_are_berts(bundle, folder):
    texts = ["", PROMPT, "stars", "nothing known", "a " * 100]
    expected = resolve(str(folder)).tokenizer()(texts, padding="max_length", max_length=77, truncation=True).input_ids
    with Pipeline.load(bundle, backend="onnxruntime") as pipeline:
        np.testing.assert_array_equal(pipeline._encode._tokenizer(texts), expected)


@pytest.mark.parametrize(
    ("file", "change", "error", "words"),
    [
        ("model_index.json", {"bert": ["transformers", "T5"]}, e.UnsupportedModelError, "with bert='T5'; supported"),
        ("bert/config.json", {"d_model": 64}, e.UnsupportedModelError, "d_model=64; supported are 77 and the U-Net's"),
        (
            "bert/config.json",
            {"vocab_size": 5},
            e.UnreadableModelError,
            "the text encoder 5 .vocab_size.; they are not",
        ),
        ("vqvae/config.json", {"latent_channels": 3}, e.UnsupportedModelError, "4 channels and the VQModel 3"),
        ("scheduler/scheduler_config.json", {"clip_sample": True}, e.UnsupportedModelError, "clamps the latents"),
    ],
)
def test_parts_that_do_not_fit_are_named(folder, tmp_path, file, change, error, words):
    import shutil

    changed = shutil.copytree(folder, tmp_path / "changed") / file
    changed.write_text(json.dumps({**json.loads(changed.read_text()), **change}))
    with pytest.raises(error, match=words):
        resolve(str(tmp_path / "changed")).check_configs()
