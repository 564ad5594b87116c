"""A record has all that makes a picture again, and a damaged one is an error by name."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from engine import Hires, Pipeline, metadata
from engine.bundle import Bundle
from engine.errors import MetadataError, ReproductionError
from engine.images import finished_images
from engine.inputs import INPUTS, Array, load
from engine.record import UNRECORDED, Record, call_arguments, call_parameters, check_call
from engine.reproduce import check_family, compare, make_again, plan, read_pixels, report

FAST = {"num_inference_steps": 2, "progress": False}
NOISE = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)


def reproduced(pipeline, image, folder, given=None, name="a.png", text=False):
    """What the file of a picture makes, beside it."""
    image.save(folder / name)
    wanted = plan(folder / name, metadata.read(folder / name), given or {}, text)
    return compare(read_pixels(folder / name), wanted, make_again(pipeline, wanted, progress=False))


def test_every_argument_of_a_call_is_in_the_record_or_is_named_as_not_needed(demo):
    given = call_arguments(check_call(demo.limits, {"prompt": "a ring"}), 0, texts=True)
    assert given.keys() | {*INPUTS, *UNRECORDED} == call_parameters()
    assert not given.keys() & {*INPUTS, *UNRECORDED}


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": ["a ring", "", "a star"], "seed": 3, "scheduler": "euler_a"},
        {"prompt": ["a ring", "a star"], "negative_prompt": ["a", "b"], "seed": [5, 6], "num_images_per_prompt": 1},
        {"prompt": "a ring", "seed": 2**64 - 1, "height": 64, "width": 96, "scheduler": "DPM++ 2M Karras"},
        {"prompt": "a", "guidance_scale": [5, 3.3], "guidance_rescale": 0.7, "guidance_interval": (0, 0.5)},
        {"prompt": "a", "scheduler": "heun", "guidance_scale": lambda i, t: 3 + i / 7},
        {
            "prompt": "a",
            "scheduler": "euler",
            "sigmas": [10.0, 3.3, 0.1],
            "sampler_options": {"s_churn": np.float32(1)},
        },
        {"prompt": "a", "scheduler": "ddim", "timestep_respacing": "ddim4", "eta": 0.7},
        {"prompt": "a", "scheduler": "euler_a", "schedule_type": "sgm_uniform", "num_images_per_prompt": 2},
        {"prompt": "a [red:blue:1] (ring:1.2)", "prompt_syntax": "a1111", "emphasis": "no norm", "clip_skip": 1},
        {"prompt": "a ring AND a star:0.5", "prompt_syntax": "a1111", "num_images_per_prompt": 2},
        {"prompt": ["a ring", "a star"], "seed": 7, "subseed": [4, 5], "subseed_strength": [0.2, 0.5]},
        {"prompt": "a", "hires": Hires(scale=1.5, steps=3, prompt="a star", scheduler="euler"), "seed": 2},
        {"prompt": "a", "hires": Hires(height=96, guidance_scale=lambda i, t: 2.5 + i), "vae_tiling": 64},
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_every_picture_of_a_call_comes_again_from_its_file(demo, tmp_path, arguments):
    for image in demo(**{**FAST, **arguments}).images:
        again = reproduced(demo, image, tmp_path)
        assert again.equal
        assert again.reasons == ()


def test_a_textual_inversion_belongs_to_what_made_a_picture(demo_bundle, tmp_path):
    save_file({"dot": np.ones((1, 128), np.float32)}, tmp_path / "dot.safetensors")
    with Pipeline.load(demo_bundle, backend="onnxruntime") as pipeline:
        word = pipeline.load_textual_inversion(tmp_path / "dot.safetensors")
        image = pipeline("a dot", seed=0, **FAST).images[0]
        assert reproduced(pipeline, image, tmp_path).reasons == ()
        pipeline.unload_textual_inversion(word)
        again = reproduced(pipeline, image, tmp_path)
    assert not again.equal
    assert re.fullmatch(r"loaded: textual inversion 'dot' [0-9a-f]{10} then, nothing now", again.reasons[0])


def test_embeddings_are_inputs(demo, tmp_path):
    rng = np.random.default_rng(0)
    given = {
        "prompt_embeds": rng.standard_normal((2, 77, 128), np.float32),
        "negative_prompt_embeds": rng.standard_normal((2, 77, 128), np.float32),
    }
    image = demo(**given, seed=[1, 2], **FAST).images[1]
    assert reproduced(demo, image, tmp_path, given).equal
    with pytest.raises(
        ReproductionError, match=r"was given prompt_embeds, of which .* pass --input prompt_embeds=FILE"
    ):
        reproduced(demo, image, tmp_path)


def test_models_without_texts_are_reproduced_too(textless_bundles, tmp_path):
    with Pipeline.load(textless_bundles["iddpm"], backend="onnxruntime") as pipeline:
        image = pipeline(class_labels=[1, 3], seed=0, **FAST).images[1]
        assert reproduced(pipeline, image, tmp_path).equal
        assert reproduced(pipeline, image, tmp_path, text=True).equal


def test_a_record_does_not_hold_the_texts_of_other_pictures(demo):
    first, second = demo(["a ring", "a star"], seed=0, **FAST).images
    assert "star" not in json.dumps(first.info["latentrt"])
    assert "ring" not in json.dumps(second.info["latentrt"])


def test_a_record_names_model_and_backend(demo):
    content = json.loads(demo("a ring", seed=0, **FAST).images[0].info["latentrt"])
    assert content["model"]["bundle"] == "demo"
    assert content["model"]["backend"] == demo.description
    assert content["model"]["weights"] == demo.bundle.contents.source.weights
    assert len(content["model"]["build"]) == 64


def test_what_was_made_from_an_array_needs_the_array(demo, tmp_path):
    image = demo(["a ring", "a star"], latents=NOISE, **FAST).images[1]
    with pytest.raises(ReproductionError, match=r"was given latents, of which .* pass --input latents=FILE"):
        reproduced(demo, image, tmp_path)
    np.save(tmp_path / "noise.npy", NOISE)
    assert reproduced(demo, image, tmp_path, {"latents": load("latents", tmp_path / "noise.npy")}).equal
    other = reproduced(demo, image, tmp_path, {"latents": NOISE[::-1]})
    assert not other.equal
    assert other.reasons == ("latents: not the one that the picture was made from",)
    plain = demo("a ring", seed=0, **FAST).images[0]
    with pytest.raises(ReproductionError, match="was given no latents; leave out --input latents="):
        reproduced(demo, plain, tmp_path, {"latents": NOISE})


def test_a_bundle_of_another_kind_of_model_is_an_error(demo, textless_bundles, tmp_path):
    demo("a ring", seed=0, **FAST).images[0].save(tmp_path / "a.png")
    wanted = plan(tmp_path / "a.png", metadata.read(tmp_path / "a.png"), {})
    with pytest.raises(ReproductionError, match=r"made with demo, a .* model, and .*iddpm is a textless"):
        check_family(tmp_path / "a.png", wanted, Bundle.open(textless_bundles["iddpm"]))


def test_an_input_that_is_none_is_an_error(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"no array")
    with pytest.raises(ReproductionError, match=r"a\.npy' can't be read as an array"):
        load("latents", tmp_path / "a.npy")
    with pytest.raises(ReproductionError, match="no call is given such an input; there are: latents, image, depth_map"):
        load("prompt", tmp_path / "a.npy")


def test_a_callback_is_an_obstacle_that_the_record_names(demo, tmp_path):
    def darken(pipeline, evaluation, timestep, given):
        return {"latents": given["latents"] / 2}

    image = demo("a ring", seed=0, callback_on_step_end=darken, **FAST).images[0]
    again = reproduced(demo, image, tmp_path)
    assert not again.equal
    assert again.reasons == ("a callback saw the latents, and may have changed them",)


def test_an_interrupted_picture_says_so(demo):
    request = check_call(demo.limits, {"prompt": "a ring"})
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    record = finished_images(pixels, request, demo.bundle, "a backend", interrupted=True)[0].info["latentrt"]
    assert json.loads(record)["obstacles"] == ["the loop was interrupted before its last step"]


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_other_formats_hold_the_record_and_a_jpeg_loses_pixels(demo, tmp_path, name):
    image = demo("a ring", seed=0, **FAST).images[0]
    again = reproduced(demo, image, tmp_path, name=name)
    assert 20 < again.psnr < 99
    assert again.reasons == (("file: a JPEG does not keep the pixels",) if name == "a.jpg" else ())


def test_without_metadata_nothing_is_left(demo, tmp_path):
    image = demo("a ring", seed=0, metadata=False, **FAST).images[0]
    assert image.info == {}
    for name in ("a.png", "a.jpg", "a.webp"):
        image.save(tmp_path / name)
        assert metadata.read(tmp_path / name) == metadata.Metadata(None, None)
    assert b"ring" not in (tmp_path / "a.png").read_bytes()
    with pytest.raises(MetadataError, match="has no settings: neither LatentRT's record nor A1111's text"):
        reproduced(demo, image, tmp_path)


def test_differences_of_the_model_and_the_size_are_named(demo, tmp_path):
    image = demo("a ring", seed=0, **FAST).images[0]
    content = json.loads(image.info["latentrt"])
    content["model"] |= {"weights": "0" * 64, "backend": "TensorRT 8.6.0", "precision": "fp16"}
    image.info["latentrt"] = json.dumps(content)
    Image.Image.resize(image, (32, 32)).copy()
    again = reproduced(demo, image, tmp_path)
    assert again.equal
    now = demo.bundle.contents.source.weights[:10]
    assert again.reasons == (
        f"weights: 0000000000 then, {now} now",
        "precision: fp16 then, fp32 now",
        f"backend: TensorRT 8.6.0 then, {demo.description} now",
    )
    content["arguments"]["height"] = 96
    image.info["latentrt"] = json.dumps(content)
    again = reproduced(demo, image, tmp_path)
    assert (again.psnr, again.largest) == (None, None)
    assert again.reasons[0] == "size: 64x64 in the file, 64x96 now"
    wanted = plan(tmp_path / "a.png", metadata.read(tmp_path / "a.png"), {})
    assert "the pixels differ\n  size: 64x64 in the file" in "\n".join(
        report(tmp_path / "a.png", wanted, again, demo.description, None)
    )


GOOD = {
    "arguments": {"prompt": "a ring", "seed": 1},
    "index": 0,
    "pictures": 1,
    "inputs": {"image": [{"sha256": "0", "shape": [8, 8, 3], "dtype": "uint8", "file": "a.png"}]},
    "model": {
        "bundle": "demo",
        "family": "f",
        "weights": None,
        "build": "0",
        "precision": "fp32",
        "backend": "b",
        "version": "1",
    },
    "obstacles": [],
}


def test_a_record_is_read_as_it_was_written():
    record = Record.from_content(GOOD)
    assert record.inputs == {"image": (Array("0", (8, 8, 3), "uint8", "a.png"),)}
    assert Record.from_content(json.loads(json.dumps(record.content()))) == record


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"arguments": 1}, "has no arguments; its A1111 text may still be right"),
        ({"arguments": {"magic": 1}}, "has the argument 'magic', which this version does not know"),
        ({"arguments": {"callback_on_step_end": 1}}, "has the argument 'callback_on_step_end'"),
        ({"arguments": {"latents": [1]}}, "has the argument 'latents'"),
        ({"index": 1}, "is of number 1 of 1 pictures"),
        ({"index": True}, "is of number None of 1 pictures"),
        ({"pictures": "x"}, "is of number 0 of None pictures"),
        ({"inputs": []}, "has no inputs"),
        ({"inputs": {"latents": []}}, r"has an input 'latents' that is \[\]"),
        ({"inputs": {"prompt": [{"sha256": "0", "shape": [], "dtype": "x"}]}}, "has an input 'prompt'"),
        ({"inputs": {"image": [{"sha256": "0", "shape": [], "dtype": "x", "file": 1}]}}, "has an input 'image'"),
        ({"inputs": {"image": ["a.png"]}}, "has an input 'image'"),
        ({"inputs": {"image": [{"sha256": "0", "shape": [], "dtype": "x", "file": "a.png"}]}}, "has an input 'image'"),
        ({"inputs": {"image": [{"sha256": "0", "shape": ["8", 8], "dtype": "x"}]}}, "has an input 'image'"),
        ({"model": {}}, "has a model whose bundle is None"),
        ({"obstacles": [1]}, r"has obstacles that are no texts: \[1\]"),
    ],
)
def test_a_record_with_something_wrong_is_an_error(change, words):
    with pytest.raises(MetadataError, match=words):
        Record.from_content({**GOOD, **change})


def test_values_of_a_record_are_checked_as_a_calls(demo, tmp_path):
    image = demo("a ring", seed=0, **FAST).images[0]
    content = json.loads(image.info["latentrt"])
    image.info["latentrt"] = json.dumps({**content, "index": 3, "pictures": 4})
    with pytest.raises(MetadataError, match="is of number 3 of a call that makes 1 pictures; its A1111 text"):
        reproduced(demo, image, tmp_path)
    content["arguments"]["num_inference_steps"] = "many"
    image.info["latentrt"] = json.dumps(content)
    with pytest.raises(ValueError, match="num_inference_steps is 'many'"):
        reproduced(demo, image, tmp_path)
