"""The ONNX Runtime backend: what stays on a device, shown on the CPU with buffers that are kept apart as on a GPU."""

import numpy as np
import pytest

from engine import Pipeline
from engine.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine.backends.onnxruntime.device import DeviceArray
from engine.bundle import Bundle
from engine.text.conditioning import Text

PROMPT = "a large red circle on a blue background"
FAST = {"num_inference_steps": 4, "seed": [0, 1], "guidance_scale": 5.0, "progress": False, "scheduler": "euler_a"}


@pytest.fixture(scope="module")
def resident(tiny_bundles):
    """A pipeline whose buffers are as far from the host's arrays as those on a GPU."""
    bundle = Bundle.open(tiny_bundles["sd1"], verify=False)
    backend = OnnxRuntimeBackend(bundle.graphs, bundle.shapes)
    backend._resident = True
    return Pipeline(bundle, backend)


def test_what_stays_on_the_device_makes_the_same_pictures(resident, tiny_bundles):
    with Pipeline.load(tiny_bundles["sd1"], backend="onnxruntime") as pipeline:
        for options in ({}, {"guidance_scale": 1.0}, {"negative_prompt": "a star", "height": 72}):
            made = [
                one([PROMPT, "a ring"], **{**FAST, **options}, output_type="np").images for one in (pipeline, resident)
            ]
            np.testing.assert_array_equal(*made)


def test_a_callback_sees_and_changes_what_is_on_the_device(resident, tiny_bundles):
    def halve_one(_, index, timestep, tensors):
        tensors["latents"][1] *= 0.5

    options = {**FAST, "output_type": "latent", "callback_on_step_end": halve_one}
    with Pipeline.load(tiny_bundles["sd1"], backend="onnxruntime") as pipeline:
        made = [one([PROMPT, "a ring"], **options).images for one in (pipeline, resident)]
    np.testing.assert_array_equal(*made)


def test_embeddings_and_latents_do_not_come_back_to_the_host(resident, monkeypatch):
    downloads = []
    read = type(resident._backend.call(sizes())).read
    monkeypatch.setattr(
        "engine.backends.onnxruntime.call.DeviceCall.read",
        lambda self, current: downloads.append(current) or read(self, current),
    )
    resident([PROMPT, "a ring"], **FAST)
    assert downloads == []
    embeddings = resident._encode([Text(PROMPT), Text("a ring BREAK red", "a1111")])
    assert [len(one["context"].parts) for one in embeddings] == [1, 2]
    assert all(isinstance(part, DeviceArray) for one in embeddings for part in one["context"].parts)


def test_prompts_of_several_texts_make_the_same_pictures_on_the_device(resident, tiny_bundles):
    """Of one chunk and of two in a call, which takes two: the shorter is repeated."""
    options = {**FAST, "prompt_syntax": "a1111", "output_type": "latent"}
    with Pipeline.load(tiny_bundles["sd1"], backend="onnxruntime") as pipeline:
        for prompt in ("a ring BREAK red", "[a ring|a star BREAK red] AND blue:0.5"):
            np.testing.assert_array_equal(*[one([prompt, "a ring"], **options).images for one in (pipeline, resident)])


def sizes():
    return {"batch": 2, "rows": 4, "tokens": 77, "height": 8, "width": 8}
