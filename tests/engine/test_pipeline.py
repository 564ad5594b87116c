"""The loop around the graphs: cache, callbacks, seeds, metadata, timings."""

import dataclasses
import gc
import pickle
import shutil
import signal
import threading
import weakref
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from engine import Bundle, BundleError, Pipeline
from engine.errors import (
    BundleChangedError,
    BusyPipelineError,
    CallbackError,
    ClosedPipelineError,
    LatentsError,
    NumericalError,
    PicklingError,
)
from engine.text.conditioning import KEPT, Text
from export.folders import swap
from export.sources.checkpoint import resolve
from tests.engine.backends.made_up import request_of

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
    assert set(times) == {
        "tokenize",
        "text_encoder",
        "prepare",
        "denoise",
        "steps",
        "vae_decoder",
        "total",
        "host",
        "path",
    }
    assert set(times["host"]) == {"text_encoder", "prepare", "denoise", "vae_decoder"}
    assert times["path"] == "plain"
    assert len(times["steps"]) == 3
    assert 0 < sum(times["steps"]) <= times["denoise"] < times["total"]


def test_evaluations_are_counted_not_steps(demo):
    assert demo(PROMPT, **FAST, scheduler="pndm").evaluations == 4


def test_png_holds_the_parameters(demo, tmp_path):
    image = demo(PROMPT, negative_prompt="a square, a star", **FAST).images[0]
    image.save(tmp_path / "circle.png")
    text = Image.open(tmp_path / "circle.png").text["parameters"]
    assert text.startswith(
        f"{PROMPT}\nNegative prompt: a square, a star\nSteps: 3, Sampler: DDIM, CFG scale: 5, Seed: 0, Size: 64x64, "
        "Model: demo"
    )


def test_pictures_are_ordinary_pil_images(demo, tmp_path):
    image = demo(PROMPT, **FAST).images[0]
    assert isinstance(image, Image.Image)
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(image))), np.asarray(image))
    image.resize((32, 32)).save(tmp_path / "small.jpg")
    image.save(tmp_path / "circle.webp")


def test_two_prompts_in_one_call_equal_two_calls(demo):
    together = demo([PROMPT, "a star"], **{**FAST, "seed": [0, 1]}, output_type="latent").images
    apart = [
        demo(PROMPT, **FAST, output_type="latent").images[0],
        demo("a star", **{**FAST, "seed": 1}, output_type="latent").images[0],
    ]
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
        demo(
            PROMPT,
            **FAST,
            callback_on_step_end=lambda p, i, t, tensors: {
                "latents": np.where(tensors["latents"] == tensors["latents"].max(), np.nan, tensors["latents"]).astype(
                    np.float32
                )
            },
        )


@pytest.mark.slow
def test_embeddings_are_kept_by_what_they_were_computed_from(tiny_bundles):
    with Pipeline.load(tiny_bundles["sd1"], backend="onnxruntime") as pipeline:
        calls = []
        encode = pipeline._backend.encode_text
        pipeline._backend.encode_text = lambda inputs: calls.append(len(inputs["embeddings"])) or encode(inputs)
        pipeline(PROMPT, **FAST)
        pipeline(PROMPT, **FAST)
        pipeline(["a star", PROMPT], **{**FAST, "seed": [0, 1]})
        assert calls == [2, 1]  # prompt and negative prompt in one call, then only what is new
        for i in range(KEPT + 3):
            pipeline._encode([Text(f"ring {i}")])
        assert len(pipeline._encode._kept) == KEPT


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


def test_values_that_are_not_finite_are_an_error_not_a_black_picture(demo):
    arguments = {"prompt": PROMPT, "num_inference_steps": 3, "seed": 0, "progress": False, "guidance_scale": 1000.0}
    request = request_of(demo, arguments)
    table = dataclasses.replace(request.table, updates=1e30 * request.table.updates)
    with pytest.raises(
        NumericalError, match=r"not finite after 3 evaluations at guidance_scale 1000; take a smaller guidance_scale"
    ):
        demo._run(dataclasses.replace(request, table=table), 0.0)


def test_a_bar_is_shown_on_a_terminal_only(demo, capsys):
    demo(PROMPT, **FAST)
    assert capsys.readouterr().err == ""


def test_a_static_bundle_serves_its_one_size(tiny_bundles, tmp_path, edit_manifest):
    bundle = shutil.copytree(tiny_bundles["sd1"], tmp_path / "sd1")
    edit_manifest(bundle, shapes={"height": [64, 64, 64], "width": [64, 64, 64], "batch": [1, 1, 1]})
    with Pipeline.load(bundle) as pipeline, Pipeline.load(tiny_bundles["sd1"]) as dynamic:
        assert pipeline.bundle.shapes.static(8) == {"height": 8, "width": 8, "batch": 1}
        np.testing.assert_allclose(
            pipeline("a ring", **FAST, output_type="latent").images,
            dynamic("a ring", **FAST, output_type="latent").images,
            atol=1e-3,
        )
        with pytest.raises(ValueError, match=r"height 72 .*\(64 only"):
            pipeline("a ring", height=72)
        with pytest.raises(ValueError, match=r"this bundle was built for 1\. Split the call"):
            pipeline("a ring", num_images_per_prompt=2)


# Callbacks: what diffusers' own see, do and return.

SCHEDULERS = ["ddim", "euler", "euler_a", "dpmpp_2m", "pndm"]


def nudge(tensors):
    return tensors["latents"] + 0.25


def add(pipeline, index, timestep, tensors):
    return {"latents": nudge(tensors)} if index == 1 else {}


def add_in_place(pipeline, index, timestep, tensors):
    if index == 1:
        tensors["latents"] += 0.25
    return tensors


def add_in_place_and_return_nothing(pipeline, index, timestep, tensors):
    if index == 1:
        tensors["latents"][:] += 0.25


def stop(pipeline, index, timestep, tensors):
    pipeline._interrupt = index == 1
    return tensors


@pytest.fixture(scope="module")
def oracle():
    """diffusers' pipeline of the built-in model with one of our samplers, by name."""
    source = resolve(None)
    pipeline = source.pipeline()
    config = dict(pipeline.scheduler.config)
    classes = {
        "ddim": diffusers.DDIMScheduler,
        "euler": diffusers.EulerDiscreteScheduler,
        "euler_a": diffusers.EulerAncestralDiscreteScheduler,
        "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
        "pndm": diffusers.PNDMScheduler,
    }

    def run(scheduler, callback):
        pipeline.scheduler = classes[scheduler].from_config(config)
        return pipeline(
            PROMPT,
            num_inference_steps=4,
            guidance_scale=5.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
            callback_on_step_end=callback,
        ).images.numpy()

    return run


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("callback", [add, add_in_place, stop])
def test_a_callback_means_what_it_means_in_diffusers(demo, oracle, scheduler, callback):
    expected = oracle(scheduler, callback)
    found = demo(
        PROMPT,
        num_inference_steps=4,
        guidance_scale=5.0,
        seed=0,
        output_type="latent",
        scheduler=scheduler,
        callback_on_step_end=callback,
    )
    np.testing.assert_allclose(found.images, expected, atol=1e-4 * np.abs(expected).max())
    assert found.interrupted == (callback is stop)


def test_latents_that_a_callback_writes_to_count_without_being_returned(demo):
    returned = demo(PROMPT, **FAST, output_type="latent", callback_on_step_end=add).images
    written = demo(PROMPT, **FAST, output_type="latent", callback_on_step_end=add_in_place_and_return_nothing).images
    np.testing.assert_array_equal(written, returned)


def test_a_callback_that_only_looks_changes_nothing(demo):
    plain = demo(PROMPT, **FAST, scheduler="euler", output_type="latent").images
    looked = demo(
        PROMPT, **FAST, scheduler="euler", output_type="latent", callback_on_step_end=lambda p, i, t, tensors: tensors
    ).images
    np.testing.assert_array_equal(looked, plain)


ZEROS = np.zeros((1, 4, 8, 8), np.float32)


@pytest.mark.parametrize(
    "returned",
    [
        5,
        True,
        "latents",
        ["latents"],
        ZEROS,
        (ZEROS,),
        {"prompt_embeds": ZEROS},
        {1: 2},
        pytest.param(10**5000, id="huge"),
    ],
)
def test_what_a_callback_may_not_return_is_named(demo, returned):
    with pytest.raises(CallbackError, match="callback_on_step_end returned"):
        demo(PROMPT, **FAST, callback_on_step_end=lambda *_: returned)


@pytest.mark.parametrize(
    "returned", [{"latents": None}, {"latents": [1]}, {"latents": ZEROS[0]}, {"latents": ZEROS.astype(int)}]
)
def test_latents_that_a_callback_may_not_return_are_named(demo, returned):
    with pytest.raises(LatentsError, match="latents returned by the callback"):
        demo(PROMPT, **FAST, callback_on_step_end=lambda *_: returned)


@pytest.mark.parametrize(
    "use",
    [
        lambda pipeline: pipeline("b", num_inference_steps=1),
        lambda pipeline: pipeline.close(),
        lambda pipeline: pipeline.__exit__(None, None, None),
    ],
)
def test_a_callback_that_uses_its_own_pipeline_gets_an_error_and_does_not_hang(demo, use):
    with pytest.raises(BusyPipelineError, match="in the middle of a call"):
        demo(PROMPT, **FAST, callback_on_step_end=lambda pipeline, *_: use(pipeline))
    assert demo(PROMPT, **FAST).evaluations == 3


def test_a_signal_handler_that_closes_the_pipeline_gets_an_error_and_does_not_hang(demo_bundle):
    with Pipeline.load(demo_bundle, backend="onnxruntime") as pipeline:
        before = signal.signal(signal.SIGUSR1, lambda *_: pipeline.close())
        try:
            with pytest.raises(BusyPipelineError):
                pipeline(PROMPT, **FAST, callback_on_step_end=lambda *_: signal.raise_signal(signal.SIGUSR1))
        finally:
            signal.signal(signal.SIGUSR1, before)


@pytest.mark.slow
def test_whether_a_run_was_interrupted_belongs_to_its_own_call(demo):
    wrong = []

    def call(stops):
        for _ in range(15):

            def callback(pipeline, index, timestep, tensors):
                pipeline.interrupt = stops

            if demo(PROMPT, num_inference_steps=2, seed=0, callback_on_step_end=callback).interrupted != stops:
                wrong.append(stops)

    threads = [threading.Thread(target=call, args=(stops,)) for stops in (True, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# A loaded pipeline is what was loaded.

BACKENDS = ["onnxruntime", "openvino"]


@pytest.fixture
def own_bundle(tiny_bundles, tmp_path):
    """A copy of a tiny bundle to change under a pipeline."""
    return Path(shutil.copytree(tiny_bundles["sd1"], tmp_path / "engines" / "sd1"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_pipeline_says_so(own_bundle, backend):
    pipeline = Pipeline.load(own_bundle, backend=backend)
    pipeline.close()
    pipeline.close()
    with pytest.raises(ClosedPipelineError, match=r"was closed; load it again: Pipeline\.load\("):
        pipeline("a ring", num_inference_steps=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_pipeline_that_is_dropped_is_gone_at_once(own_bundle, backend):
    pipeline = Pipeline.load(own_bundle, backend=backend)
    pipeline("a ring", num_inference_steps=1, progress=False)
    kept = [weakref.ref(pipeline), weakref.ref(pipeline._backend)]
    gc.disable()
    try:
        del pipeline
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()


def test_a_pipeline_cannot_be_pickled_and_says_what_to_do(demo):
    with pytest.raises(PicklingError, match=r"load it in the other process: Pipeline\.load"):
        pickle.dumps(demo)


def replace(bundle, other):
    shutil.move(bundle, bundle.with_name("old"))
    shutil.copytree(other, bundle)


def delete(bundle, other):
    shutil.rmtree(bundle)


def overwrite(bundle, other):
    for file in (bundle / "onnx").glob("*.data"):
        with open(file, "r+b") as stream:
            stream.write(b"\0" * file.stat().st_size)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [replace, delete, overwrite])
def test_a_bundle_that_changes_under_a_pipeline_is_an_error_or_does_not_matter(
    own_bundle, tiny_bundles, backend, change
):
    with Pipeline.load(own_bundle, backend=backend) as pipeline:
        expected = {size: pixels(pipeline("a ring", size, size, num_inference_steps=2, seed=0)) for size in (64, 72)}
        change(own_bundle, tiny_bundles["sd2"])
        found = []
        for size in (64, 72, 80):
            try:
                found.append(pixels(pipeline("a ring", size, size, num_inference_steps=2, seed=0)))
            except BundleChangedError:
                found.append(None)
        if change is overwrite:
            assert found == [None, None, None]
            with pytest.raises(BundleChangedError, match=r"changed or deleted\. Load it again: Pipeline\.load\("):
                pipeline("a ring", num_inference_steps=2)
        else:
            assert np.array_equal(found[0], expected[64])
            assert np.array_equal(found[1], expected[72])
            assert (found[2] is None) == (backend == "openvino")


def test_files_that_were_touched_and_are_the_same_do_not_matter(own_bundle):
    with Pipeline.load(own_bundle, backend="openvino") as pipeline:
        for file in (own_bundle / "onnx").iterdir():
            file.touch()
        assert pipeline("a ring", 72, 72, num_inference_steps=1, progress=False).evaluations == 1


def test_a_bundle_can_be_loaded_while_it_is_replaced(own_bundle, tmp_path):
    others = [Path(shutil.copytree(own_bundle, tmp_path / f"other{i}")) for i in range(2)]
    done, failures, loads = threading.Event(), [], []

    def read():
        while not done.is_set():
            try:
                loads.append(Bundle.open(own_bundle).name)
            except BundleError as error:
                failures.append(repr(error))

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(60):
        unfinished = own_bundle.with_name(".sd1.building")
        shutil.copytree(others[i % 2], unfinished)
        swap(own_bundle, unfinished, own_bundle.with_name(".sd1.replaced"))
    done.set()
    reader.join()
    assert failures == []
    assert loads


def test_the_pause_between_two_renames_is_waited_for(own_bundle):
    replaced = own_bundle.with_name(".sd1.replaced")
    own_bundle.rename(replaced)
    threading.Timer(0.2, lambda: replaced.rename(own_bundle)).start()
    assert Bundle.open(own_bundle).name == "sd1"
