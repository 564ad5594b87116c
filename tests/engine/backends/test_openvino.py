"""The OpenVINO backend: the same pictures as ONNX Runtime in float32, bfloat16 only where a build measured that it is
right."""

import gc
import json
import shutil
import sys

import numpy as np
import pytest

import engine.backends
from engine import Pipeline
from engine.backends import open_backend
from engine.backends.interface import Denoising
from engine.backends.onnxruntime import OnnxRuntimeBackend
from engine.backends.openvino.backend import COMPILED_SHAPES, OpenVinoBackend
from engine.bundle import Bundle
from engine.contract import SLOTS
from engine.errors import BackendError, DeviceError, ManifestError, NumericalError
from export import verify
from export.compare import random_inputs
from export.graphs.tracing import example

PROMPT = "a large red circle on a blue background"
FAST = {"num_inference_steps": 3, "seed": 0, "guidance_scale": 5.0, "progress": False}
BACKENDS = ("onnxruntime", "openvino")

openvino = pytest.importorskip("openvino")


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request, demo_bundle):
    """A backend of the built-in model, by its name."""
    opened = open_backend(Bundle.open(demo_bundle, verify=False), request.param, None, None, True)
    yield opened
    opened.close()


def denoising(batch=1, rows=2, height=8, width=8, evaluations=3, noise=False, seed=0):
    """A loop of random tables, small enough to stay finite."""
    random = np.random.default_rng(seed)
    normal = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
    updates = 0.3 * normal(evaluations, batch, SLOTS, SLOTS + 2)
    if not noise:
        updates[..., -1] = 0.0  # as in every table of a sampler that draws none
    return Denoising(
        latents=normal(batch, 4, height, width),
        contexts=list(normal(rows, 77, 128)),
        row_sample=np.arange(rows, dtype=np.int32) % batch,
        mixing=normal(batch, rows),
        timesteps=np.broadcast_to(np.array([[900.5], [500.0], [3.0]], np.float32)[:evaluations], (evaluations, rows)),
        updates=updates,
        noise=normal(evaluations, batch, 4, height, width) if noise else None,
    )


@pytest.fixture(scope="module")
def reference(demo_bundle):
    return OnnxRuntimeBackend(Bundle.open(demo_bundle, verify=False).graphs)


def loop(backend, plan):
    session = backend.start(plan)
    for index in range(len(plan.timesteps)):
        session.step(index)
    return session


# The contract of every backend.


@pytest.mark.parametrize("sizes", [{}, {"batch": 2, "rows": 3}, {"rows": 1, "height": 9, "width": 16}, {"noise": True}])
def test_a_loop_gives_what_onnxruntime_gives(backend, reference, sizes):
    plan = denoising(**sizes)
    np.testing.assert_allclose(loop(backend, plan).latents, loop(reference, plan).latents, atol=2e-4)


def test_steps_may_come_in_any_order(backend):
    plan = denoising()
    forward = loop(backend, plan).latents
    session = backend.start(plan)
    for index in (2, 1, 0):
        session.step(index)
    assert not np.array_equal(session.latents, forward)
    np.testing.assert_array_equal(loop(backend, plan).latents, forward)


def test_latents_are_a_copy_and_can_be_replaced(backend):
    plan = denoising()
    session = backend.start(plan)
    np.testing.assert_array_equal(session.latents, plan.latents)
    session.latents[:] = 0
    np.testing.assert_array_equal(session.latents, plan.latents)
    session.latents = np.zeros_like(plan.latents)
    assert (session.latents == 0).all()
    session.step(0)
    zero = backend.start(denoising())
    zero.latents = np.zeros_like(plan.latents)
    zero.step(0)
    np.testing.assert_array_equal(session.latents, zero.latents)


def test_the_arrays_of_a_plan_stay_as_they_are(backend):
    plan, same = denoising(noise=True), denoising(noise=True)
    loop(backend, plan).decode()()
    for name in ("latents", "row_sample", "mixing", "timesteps", "updates", "noise"):
        np.testing.assert_array_equal(getattr(plan, name), getattr(same, name))


def test_pictures_are_decoded_as_one_by_one(backend):
    plan = denoising(batch=3, rows=3)
    together = backend.start(plan).decode()()
    assert together.image.shape == (3, 64, 64, 3)
    assert together.image.dtype == np.uint8
    assert together.finite.all()
    for i, image in enumerate(together.image):
        session = backend.start(denoising())
        session.latents = plan.latents[i : i + 1]
        assert np.abs(session.decode()().image[0].astype(int) - image).max() <= 1


def test_a_decoder_that_overflows_is_told_apart_by_picture(backend):
    session = backend.start(denoising(batch=2))
    latents = session.latents
    latents[1] = np.inf
    session.latents = latents
    assert session.decode()().finite.tolist() == [True, False]


def test_texts_are_encoded_as_one_by_one(backend):
    ids = np.random.default_rng(0).integers(0, 200, (3, 77)).astype(np.int32)
    together = backend.encode_text(ids)
    assert [context.shape for context in together] == [(77, 128)] * 3
    for i, context in enumerate(together):
        np.testing.assert_allclose(backend.encode_text(ids[i : i + 1])[0], context, atol=1e-4)


def test_the_stopwatch_has_one_time_between_marks(backend):
    watch = backend.stopwatch()
    for _ in range(3):
        watch.mark()
    assert len(watch.seconds()) == 2
    assert min(watch.seconds()) >= 0


def test_a_backend_says_what_it_is_and_serves(backend, demo_bundle):
    assert backend.description
    assert backend.profiles == (Bundle.open(demo_bundle, verify=False).shapes,)
    assert backend.rebuild is None  # other sizes are the bundle's


# OpenVINO alone.


@pytest.fixture(scope="module")
def bf16(demo_bundle):
    """The built-in model with every component in bfloat16."""
    graphs = Bundle.open(demo_bundle, verify=False).graphs
    made = OpenVinoBackend(graphs, precision=dict.fromkeys(graphs, "bf16"))
    if not made.has_bf16():
        pytest.skip("this CPU has no bf16 instructions")
    return made


def test_openvino_is_chosen_on_a_cpu_where_it_is_installed(demo_bundle, monkeypatch):
    bundle = Bundle.open(demo_bundle, verify=False)
    assert isinstance(open_backend(bundle, None, "cpu", None, True), OpenVinoBackend)
    monkeypatch.setattr(engine.backends, "installed", lambda name: False)
    assert isinstance(open_backend(bundle, None, "cpu", None, True), OnnxRuntimeBackend)


def test_without_openvino_the_error_says_what_to_install(demo_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"python -m pip install 'openvino>=2025\.2'"):
        Pipeline.load(demo_bundle, backend="openvino")


def test_openvino_runs_on_the_cpu_only(demo_bundle):
    with pytest.raises(DeviceError, match="runs on the CPU only"):
        Pipeline.load(demo_bundle, backend="openvino", device="cuda:0")


def test_a_graph_that_is_none_is_a_named_error(tmp_path):
    (tmp_path / "vae_decoder.onnx").write_bytes(b"nothing")
    with pytest.raises(BackendError, match=r"does not load .*vae_decoder\.onnx"):
        OpenVinoBackend({"vae_decoder": tmp_path / "vae_decoder.onnx"}).vae_decoder(1, 8, 8)


@pytest.mark.parametrize("sampler", ["ddim", "euler_a", "dpmpp_2m"])
def test_float32_makes_the_picture_of_onnxruntime(demo_bundle, sampler):
    pictures = []
    for name in BACKENDS:
        with Pipeline.load(demo_bundle, backend=name) as pipeline:
            pictures.append(
                pipeline(PROMPT, **{**FAST, "num_inference_steps": 20}, scheduler=sampler, output_type="np").images
            )
    assert np.abs(pictures[0] - pictures[1]).max() <= 1.01 / 255


def test_a_bundle_without_measurements_runs_in_float32(demo_bundle):
    with Pipeline.load(demo_bundle, backend="openvino") as pipeline:
        assert set(pipeline._backend.precision.values()) == {"fp32"}


def test_a_bundle_that_was_measured_runs_as_its_manifest_says(demo_bundle, tmp_path, edit_manifest, bf16):
    bundle = shutil.copytree(demo_bundle, tmp_path / "demo")
    edit_manifest(bundle, openvino={"precision": {"denoiser": "bf16", "vae_decoder": "fp32"}})
    with Pipeline.load(bundle, backend="openvino") as pipeline, Pipeline.load(demo_bundle, backend="openvino") as exact:
        assert pipeline._backend.precision == {
            "text_encoder": "fp32",
            "denoiser": "bf16",
            "vae_decoder": "fp32",
            "vae_encoder": "fp32",
        }
        picture, expected = (
            np.asarray(p(PROMPT, **{**FAST, "num_inference_steps": 20}).images[0]) for p in (pipeline, exact)
        )
    assert 35 <= verify.psnr(picture, expected) < 99


def test_a_garbled_precision_is_an_error(demo_bundle, tmp_path, edit_manifest):
    bundle = shutil.copytree(demo_bundle, tmp_path / "demo")
    edit_manifest(bundle, openvino={"precision": {"denoiser": "int8"}})
    with pytest.raises(
        ManifestError, match=r"openvino\.precision\.denoiser is \"int8\"; it must be one of 'fp32', 'bf16'"
    ):
        Pipeline.load(bundle, backend="openvino")


def test_float16_graphs_run(tiny_fp16):
    latents = []
    for name in BACKENDS:
        with Pipeline.load(tiny_fp16, backend=name) as pipeline:
            latents.append(pipeline("a ring", **FAST, output_type="latent").images)
            assert np.asarray(pipeline("a ring", **FAST).images[0]).std() > 0
    assert verify.difference(*latents).relative_rms < 5e-3


def test_a_cpu_without_bf16_runs_in_float32_and_says_so(demo_bundle, monkeypatch):
    monkeypatch.setattr(OpenVinoBackend, "has_bf16", lambda self: False)
    graphs = Bundle.open(demo_bundle, verify=False).graphs
    with pytest.warns(RuntimeWarning, match="no instructions for that, so it runs in fp32"):
        backend = OpenVinoBackend(graphs, precision={"denoiser": "bf16"})
    assert backend.precision["denoiser"] == "fp32"


def test_in_bfloat16_the_sampler_and_the_timestep_stay_in_float32(bf16, reference):
    plan = example("denoiser", 128)
    inputs = {name: value.numpy() for name, value in plan.inputs.items()}
    inputs["update"][:] = 0
    inputs["update"][:, :, :SLOTS] = np.eye(SLOTS)  # the state as it is: any rounding would show
    np.testing.assert_array_equal(bf16.run("denoiser", inputs)[0], inputs["state"])
    inputs["update"][:, 0, SLOTS] = 1.0
    outputs = []
    for timestep in (776.0, 777.0):  # one number in bfloat16
        inputs["timestep"][:] = timestep
        outputs.append(bf16.run("denoiser", inputs)[0][:, 0])
    assert not np.array_equal(*outputs)


def test_the_rows_of_a_sample_have_one_timestep(demo_bundle):
    backend = OpenVinoBackend(Bundle.open(demo_bundle, verify=False).graphs)
    inputs = random_inputs("denoiser", 1, 2, 8, 8, 128)
    inputs["timestep"][:] = (3.0, 4.0)
    with pytest.raises(BackendError, match=r"different timesteps: \[3. 4.\] for the samples \[0 0\]"):
        backend.run("denoiser", inputs)


def test_what_does_not_depend_on_the_text_is_computed_once_for_a_sample(demo_bundle):
    runners = OpenVinoBackend(Bundle.open(demo_bundle, verify=False).graphs).denoiser(1, 2, 8, 8)
    assert {port.get_shape()[0] for port in runners.sample._request.model_outputs} == {1}
    assert {port.get_shape()[0] for port in runners.unet._request.model_outputs} == {2}


def test_a_large_graph_stays_compiled_for_one_size_and_a_small_one_for_some(demo_bundle, monkeypatch):
    backend = OpenVinoBackend(Bundle.open(demo_bundle, verify=False).graphs)
    for height in range(4, 4 + COMPILED_SHAPES + 2):
        backend.vae_decoder(1, height, 8)
    assert len(backend._compiled) == COMPILED_SHAPES
    monkeypatch.setattr("engine.backends.openvino.backend.LARGE_GRAPH", 1)
    backend.vae_decoder(1, 4, 16)
    assert list(backend._compiled) == [("vae_decoder", 1, 4, 4, 16)]


def test_a_large_model_rests_between_its_components_and_makes_the_same_pictures(demo_bundle, monkeypatch):
    monkeypatch.setattr(
        "engine.backends.openvino.pages.Scratch.least", 1
    )  # as large weights do, these come back from files
    with Pipeline.load(demo_bundle, backend="openvino") as pipeline:
        expected = [np.asarray(pipeline(prompt, **FAST).images[0]) for prompt in (PROMPT, "a ring")]
        monkeypatch.setattr("engine.backends.openvino.backend.LARGE_GRAPH", 1)
        for prompt, picture in zip((PROMPT, "a ring") * 2, expected * 2):
            np.testing.assert_array_equal(np.asarray(pipeline(prompt, **FAST).images[0]), picture)


def test_what_is_bound_stays_alive_when_its_owner_goes(demo_bundle):
    backend = OpenVinoBackend(Bundle.open(demo_bundle, verify=False).graphs)
    expected = loop(backend, denoising()).latents
    session = backend.start(denoising())
    gc.collect()
    filling = [np.full((1, 4, 8, 8), np.nan, np.float32) for _ in range(10_000)]
    for index in range(3):
        session.step(index)
    np.testing.assert_array_equal(session.latents, expected)
    assert len(filling) == 10_000


def test_threads_are_openvinos(demo_bundle):
    backend = OpenVinoBackend(Bundle.open(demo_bundle, verify=False).graphs, threads=1)
    assert backend._options["INFERENCE_NUM_THREADS"] == 1
    assert backend.decode(np.zeros((1, 4, 8, 8), np.float32)).finite.all()


def test_latents_that_overflow_are_an_error_not_a_black_picture(demo_bundle, tmp_path, edit_manifest):
    bundle = shutil.copytree(demo_bundle, tmp_path / "demo")
    scheduler = json.loads((bundle / "manifest.json").read_text())["scheduler"]
    edit_manifest(bundle, scheduler={**scheduler, "trained_betas": [0.5] * 1000, "prediction_type": "epsilon"})
    with pytest.raises(NumericalError, match=r"not finite after \d+ evaluations"):
        Pipeline.load(bundle, backend="openvino")(
            PROMPT, num_inference_steps=10, seed=0, guidance_scale=1000.0, progress=False
        )
