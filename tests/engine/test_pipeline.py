"""The loop around the graphs: cache, callbacks, seeds, metadata, timings."""
import json
import pickle
import shutil
import threading

import numpy as np
import pytest
from PIL import Image

from engine import Pipeline
from engine.errors import LatentsError, NumericalError

PROMPT = "a large red circle on a blue background"
FAST = {"num_inference_steps": 3, "seed": 0, "guidance_scale": 5.0}


def pixels(result):
    return np.stack([np.asarray(image) for image in result.images])


def test_the_same_call_gives_the_same_picture(demo):
    np.testing.assert_array_equal(pixels(demo(PROMPT, **FAST)), pixels(demo(PROMPT, **FAST)))


def test_another_seed_gives_another_picture(demo):
    assert (pixels(demo(PROMPT, **FAST)) != pixels(demo(PROMPT, **{**FAST, "seed": 1}))).any()


def test_no_seed_takes_a_random_one_and_tells_it(demo):
    result = demo(PROMPT, num_inference_steps=3)
    again = demo(PROMPT, num_inference_steps=3, seed=result.seeds[0])
    np.testing.assert_array_equal(pixels(result), pixels(again))
    assert demo(PROMPT, num_inference_steps=1).seeds != result.seeds


def test_timings_name_every_stage(demo):
    times = demo(PROMPT, **FAST).timings
    assert set(times) == {"tokenize", "text_encoder", "denoise", "steps", "vae_decoder", "total", "host", "path"}
    assert set(times["host"]) == {"text_encoder", "denoise", "vae_decoder"}
    assert times["path"] == "plain"
    assert len(times["steps"]) == 3
    assert 0 < sum(times["steps"]) <= times["denoise"] < times["total"]


def test_evaluations_are_counted_not_steps(demo):
    assert demo(PROMPT, **FAST, scheduler="pndm").evaluations == 4


def test_png_holds_the_parameters(demo, tmp_path):
    image = demo(PROMPT, negative_prompt="a square, a star", **FAST).images[0]
    image.save(tmp_path / "circle.png")
    text = Image.open(tmp_path / "circle.png").text["parameters"]
    assert text.startswith(f"{PROMPT}\nNegative prompt: a square, a star\nSteps: 3, Sampler: DDIM, CFG scale: 5, Seed: 0, Size: 64x64, Model: demo")


def test_pictures_are_ordinary_pil_images(demo, tmp_path):
    image = demo(PROMPT, **FAST).images[0]
    assert isinstance(image, Image.Image)
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(image))), np.asarray(image))
    image.resize((32, 32)).save(tmp_path / "small.jpg")
    image.save(tmp_path / "circle.webp")


def test_two_prompts_in_one_call_equal_two_calls(demo):
    together = demo([PROMPT, "a star"], **{**FAST, "seed": [0, 1]}, output_type="latent").images
    apart = [demo(PROMPT, **FAST, output_type="latent").images[0], demo("a star", **{**FAST, "seed": 1}, output_type="latent").images[0]]
    np.testing.assert_allclose(together, np.stack(apart), atol=1e-4)


def test_a_callback_sees_every_evaluation_and_can_change_the_latents(demo):
    seen = []

    def callback(pipeline, index, timestep, tensors):
        seen.append((index, timestep))
        return {"latents": np.zeros_like(tensors["latents"])} if index == 2 else None

    result = demo(PROMPT, **FAST, output_type="latent", callback_on_step_end=callback)
    assert [index for index, _ in seen] == [0, 1, 2]
    assert seen[0][1] == 667.0
    assert (result.images == 0).all()


@pytest.mark.parametrize("name", ["interrupt", "_interrupt"])
def test_a_callback_can_stop_the_run(demo, name):
    def stop(pipeline, index, timestep, tensors):
        setattr(pipeline, name, index == 0)  # diffusers' callbacks set _interrupt

    result = demo(PROMPT, **FAST, callback_on_step_end=stop)
    assert (result.interrupted, result.evaluations) == (True, 1)
    assert not demo(PROMPT, **FAST).interrupted


def test_what_a_callback_raises_comes_out_and_the_pipeline_goes_on(demo):
    def fail(pipeline, index, timestep, tensors):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        demo(PROMPT, **FAST, callback_on_step_end=fail)
    assert demo(PROMPT, **FAST).evaluations == 3


def test_latents_from_a_callback_are_checked(demo):
    with pytest.raises(LatentsError, match="latents returned by the callback hold 1 values"):
        demo(PROMPT, **FAST, callback_on_step_end=lambda p, i, t, tensors: {"latents": np.where(tensors["latents"] == tensors["latents"].max(), np.nan,
                                                                                                  tensors["latents"]).astype(np.float32)})


def test_embeddings_are_cached_by_text(demo_bundle):
    with Pipeline.load(demo_bundle) as pipeline:
        calls = []
        encode = pipeline._backend.encode_text
        pipeline._backend.encode_text = lambda ids: calls.append(len(ids)) or encode(ids)
        pipeline(PROMPT, **FAST)
        pipeline(PROMPT, **FAST)
        pipeline(["a star", PROMPT], **{**FAST, "seed": [0, 1]})
        assert calls == [2, 1]  # prompt and negative prompt in one call, then only what is new
        for i in range(80):
            pipeline(f"ring {i}", num_inference_steps=1, guidance_scale=1.0, seed=0)
        assert len(pipeline._contexts) == 64


def test_threads_take_turns(demo):
    expected = pixels(demo(PROMPT, **FAST))
    found = []
    threads = [threading.Thread(target=lambda: found.append(pixels(demo(PROMPT, **FAST)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(np.array_equal(expected, one) for one in found)


def test_values_that_are_not_finite_are_an_error_not_a_black_picture(demo_bundle, tmp_path, edit_manifest):
    bundle = shutil.copytree(demo_bundle, tmp_path / "demo")
    scheduler = json.loads((bundle / "manifest.json").read_text())["scheduler"]
    edit_manifest(bundle, scheduler={**scheduler, "trained_betas": [0.5] * 900 + [0.999] * 100, "prediction_type": "epsilon"})
    with pytest.raises(NumericalError, match=r"not finite after \d+ evaluations at guidance_scale 1e\+30"):
        Pipeline.load(bundle)(PROMPT, num_inference_steps=10, seed=0, guidance_scale=1e30)


def test_a_bar_is_shown_on_a_terminal_only(demo, capsys):
    demo(PROMPT, **FAST)
    assert capsys.readouterr().err == ""


def test_a_static_bundle_serves_its_one_size(tiny_bundles, tmp_path, edit_manifest):
    bundle = shutil.copytree(tiny_bundles["sd1"], tmp_path / "sd1")
    edit_manifest(bundle, shapes={"height": [64, 64, 64], "width": [64, 64, 64], "batch": [1, 1, 1]})
    with Pipeline.load(bundle) as pipeline, Pipeline.load(tiny_bundles["sd1"]) as dynamic:
        assert pipeline.bundle.shapes.static() == {"height": 8, "width": 8, "batch": 1}
        np.testing.assert_allclose(pipeline("a ring", **FAST, output_type="latent").images, dynamic("a ring", **FAST, output_type="latent").images,
                                   atol=1e-3)
        with pytest.raises(ValueError, match=r"height 72 .*\(64 only"):
            pipeline("a ring", height=72)
        with pytest.raises(ValueError, match=r"this bundle was built for 1\. Split the call"):
            pipeline("a ring", num_images_per_prompt=2)
