"""The OpenVINO backend: the same pictures as ONNX Runtime in float32, bfloat16 only where a build measured that it is
right."""

import gc
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

import engine.backends
from engine import Pipeline
from engine.backends import open_backend
from engine.backends.onnxruntime.backend import OnnxRuntimeBackend
from engine.backends.openvino.backend import OpenVinoBackend
from engine.bundle import Bundle
from engine.contract import SLOTS
from engine.errors import BackendError, DeviceError, ManifestError
from engine.family import STABLE_DIFFUSION
from export import verify
from export.compare import random_inputs
from export.graphs.tracing import EXAMPLE_SIZES
from tests.engine.backends.made_up import made_up_job, run, start

pytestmark = pytest.mark.slow
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


@pytest.fixture(scope="module")
def reference(demo_bundle):
    return OnnxRuntimeBackend(Bundle.open(demo_bundle, verify=False).graphs)


# The contract of every backend.


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, {}), (2, {"rows": 1}), (1, {"rows": 1, "height": 9, "width": 16}), (2, {"noise": True})]
)
def test_a_loop_gives_what_onnxruntime_gives(backend, reference, count, sizes):
    ours, theirs = (
        run(one, [made_up_job(**sizes, seed=seed) for seed in range(count)]).latents(range(count))
        for one in (backend, reference)
    )
    np.testing.assert_allclose(ours, theirs, atol=2e-4)


def test_steps_may_come_in_any_order(backend):
    forward = run(backend, [made_up_job()]).latents([0])
    lanes = start(backend, [made_up_job()])
    for index in (2, 1, 0):
        lanes.step([index])
    assert not np.array_equal(lanes.latents([0]), forward)
    np.testing.assert_array_equal(run(backend, [made_up_job()]).latents([0]), forward)


def test_latents_are_copies_and_can_be_replaced(backend):
    job = made_up_job()
    lanes = start(backend, [job])
    np.testing.assert_array_equal(lanes.latents([0])[0], job.latents)
    lanes.latents([0])[:] = 0
    np.testing.assert_array_equal(lanes.latents([0])[0], job.latents)
    lanes.step([0])
    lanes.replace([0], lanes.latents([0]) + 1)
    after = lanes.latents([0])
    lanes.latents([0])[:] = 0
    np.testing.assert_array_equal(lanes.latents([0]), after)
    lanes.step([1])
    again = start(backend, [made_up_job()])
    again.step([0])
    again.replace([0], after)
    again.step([1])
    np.testing.assert_array_equal(lanes.latents([0]), again.latents([0]))


def test_the_arrays_of_a_job_stay_as_they_are(backend):
    job, same = made_up_job(noise=True), made_up_job(noise=True)
    run(backend, [job]).decode([0])()
    np.testing.assert_array_equal(job.latents, same.latents)
    np.testing.assert_array_equal(job.table.updates, same.table.updates)
    for name, values in job.steps.items():
        np.testing.assert_array_equal(values, same.steps[name])
    for row, other in zip(job.rows, same.rows):
        np.testing.assert_array_equal(row.conditioning["context"], other.conditioning["context"])


def test_pictures_are_decoded_as_one_by_one(backend):
    jobs = [made_up_job(rows=1, seed=seed) for seed in range(3)]
    together = start(backend, jobs).decode(range(3))()
    assert together.image.shape == (3, 64, 64, 3)
    assert together.image.dtype == np.uint8
    assert together.finite.all()
    for job, image in zip(jobs, together.image):
        assert np.abs(start(backend, [job]).decode([0])().image[0].astype(int) - image).max() <= 1


def test_a_decoder_that_overflows_is_told_apart_by_picture(backend):
    lanes = start(backend, [made_up_job(), made_up_job()])
    lanes.replace([1], np.full((1, 4, 8, 8), np.inf, np.float32))
    assert lanes.decode([0, 1])().finite.tolist() == [True, False]


def test_texts_are_encoded_as_one_by_one(backend):
    inputs = random_inputs(backend.family["text_encoder"], {"rows": 3, "text_width": 128})
    together = [one["context"] for one in backend.encode_text(inputs)]
    assert [context.shape for context in together] == [(77, 128)] * 3
    for i, context in enumerate(together):
        alone = {name: array[i : i + 1] for name, array in inputs.items()}
        np.testing.assert_allclose(backend.encode_text(alone)[0]["context"], context, atol=1e-4)


def test_the_stopwatch_has_one_time_between_marks(backend):
    watch = backend.stopwatch()
    for _ in range(3):
        watch.mark()
    assert len(watch.seconds()) == 2
    assert min(watch.seconds()) >= 0


def test_a_backend_says_what_it_is_and_serves(backend, demo_bundle):
    assert backend.description
    assert backend.profiles == (Bundle.open(demo_bundle, verify=False).shapes,)
    assert backend.build_command is None  # other sizes are the bundle's


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
        OpenVinoBackend({"vae_decoder": tmp_path / "vae_decoder.onnx"}).decode(np.zeros((1, 4, 8, 8), np.float32))


def test_float32_makes_the_picture_of_onnxruntime(demo, demo_bundle):
    with Pipeline.load(demo_bundle, backend="openvino") as pipeline:
        for sampler in ("ddim", "euler_a", "dpmpp_2m"):
            asked = {**FAST, "num_inference_steps": 10, "scheduler": sampler, "output_type": "np"}
            ours, theirs = (one(PROMPT, **asked).images for one in (pipeline, demo))
            assert np.abs(ours - theirs).max() <= 1.01 / 255, sampler


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


def test_a_cpu_without_bf16_runs_in_float32_and_says_so(tiny_bundles, monkeypatch):
    monkeypatch.setattr(OpenVinoBackend, "has_bf16", lambda self: False)
    graphs = Bundle.open(tiny_bundles["sd1"], verify=False).graphs
    with pytest.warns(RuntimeWarning, match="no instructions for that, so it runs in fp32"):
        backend = OpenVinoBackend(graphs, precision={"denoiser": "bf16"})
    assert backend.precision["denoiser"] == "fp32"


def test_in_bfloat16_the_sampler_and_the_timestep_stay_in_float32(bf16, reference):
    inputs = random_inputs(STABLE_DIFFUSION["denoiser"], {**EXAMPLE_SIZES, "context_size": 128})
    inputs["update"][:] = 0
    inputs["update"][:, :, :SLOTS] = np.eye(SLOTS)  # the state as it is: any rounding would show
    inputs["mask"][:] = 1
    np.testing.assert_array_equal(bf16.run("denoiser", inputs)[0], inputs["state"])
    inputs["update"][:, 0, SLOTS] = 1.0
    outputs = []
    for timestep in (776.0, 777.0):  # one number in bfloat16
        inputs["timestep"][:] = timestep
        outputs.append(bf16.run("denoiser", inputs)[0][:, 0])
    assert not np.array_equal(*outputs)


def test_what_does_not_depend_on_the_text_is_computed_once_for_a_sample(demo_bundle):
    call = OpenVinoBackend(Bundle.open(demo_bundle, verify=False).graphs).call(sizes(batch=1, rows=2))
    rows = {
        name: {port.get_shape()[0] for port in runner._request.model_outputs} for name, runner in call.runners.items()
    }
    assert rows == {"exact": {1}, "sample": {1}, "loop": {2}, "unet": {2}, "solver": {1}}


def sizes(batch, rows):
    return {"batch": batch, "rows": rows, "tokens": 77, "height": 8, "width": 8}


def test_a_large_graph_stays_compiled_for_one_size_and_a_small_one_for_some(tiny_bundles, monkeypatch):
    graphs = Bundle.open(tiny_bundles["sd1"], verify=False).graphs
    monkeypatch.setattr("engine.backends.openvino.backend.COMPILED_SHAPES", 2)
    small = OpenVinoBackend(graphs)
    monkeypatch.setattr("engine.backends.openvino.backend.LARGE_GRAPH", 1)
    large = OpenVinoBackend(graphs)
    for backend, kept in ((small, 2), (large, 1)):
        for height in range(4, 8):
            backend.decode(np.zeros((1, 4, height, 8), np.float32))
        assert len(backend._runners["vae_decoder"]) == kept


def test_lanes_of_a_large_model_take_turns_in_calls_of_one_size(tiny_bundles, monkeypatch):
    graphs = Bundle.open(tiny_bundles["sd1"], verify=False).graphs
    jobs = [made_up_job(channels=32, rows=rows, noise=True, seed=rows) for rows in (1, 2)]
    alone = [run(OpenVinoBackend(graphs), [job]).latents([0])[0] for job in jobs]
    monkeypatch.setattr("engine.backends.openvino.backend.LARGE_GRAPH", 1)
    large = OpenVinoBackend(graphs)
    lanes = run(large, [made_up_job(channels=32, rows=rows, noise=True, seed=rows) for rows in (1, 2)])
    np.testing.assert_allclose(lanes.latents([0, 1]), alone, atol=1e-4)
    assert [key[:2] for key in large._calls._values] == [(1, 2)]


def test_a_large_model_has_a_second_size_while_a_picture_has_evaluations_with_fewer_rows(tiny_bundles, monkeypatch):
    def jobs():
        first = made_up_job(rows=2, channels=32)
        weights = np.array([0.0, 1.5, 0.0])
        return [replace(first, rows=(replace(first.rows[0], weight=weights), first.rows[1])), made_up_job(channels=32)]

    graphs = Bundle.open(tiny_bundles["sd1"], verify=False).graphs
    alone = [run(OpenVinoBackend(graphs), [job]).latents([0])[0] for job in jobs()]
    monkeypatch.setattr("engine.backends.openvino.backend.LARGE_GRAPH", 1)
    large = OpenVinoBackend(graphs)
    compiled = []
    compile_parts = OpenVinoBackend._compile_parts
    noted = lambda backend, sizes: compiled.append(sizes["rows"]) or compile_parts(backend, sizes)  # noqa: E731
    monkeypatch.setattr(OpenVinoBackend, "_compile_parts", noted)
    np.testing.assert_allclose(run(large, jobs()).latents([0, 1]), alone, atol=1e-4)
    assert sorted(compiled) == [1, 2]
    run(large, jobs()[1:])
    assert [key[:2] for key in large._calls._values] == [(1, 2)]


def test_a_large_model_rests_between_its_components_and_makes_the_same_pictures(tiny_bundles, monkeypatch):
    monkeypatch.setattr(
        "engine.backends.openvino.pages.Scratch.least", 1
    )  # as large weights do, these come back from files
    with Pipeline.load(tiny_bundles["sd1"], backend="openvino") as pipeline:
        expected = [np.asarray(pipeline(prompt, **FAST).images[0]) for prompt in (PROMPT, "a ring")]
    monkeypatch.setattr("engine.backends.openvino.backend.LARGE_GRAPH", 1)
    with Pipeline.load(tiny_bundles["sd1"], backend="openvino") as pipeline:
        for prompt, picture in zip((PROMPT, "a ring") * 2, expected * 2):
            np.testing.assert_array_equal(np.asarray(pipeline(prompt, **FAST).images[0]), picture)


def test_what_is_bound_stays_alive_when_its_owner_goes(tiny_bundles):
    backend = OpenVinoBackend(Bundle.open(tiny_bundles["sd1"], verify=False).graphs)
    expected = run(backend, [made_up_job(channels=32)]).latents([0])
    lanes = start(backend, [made_up_job(channels=32)])
    gc.collect()
    filling = [np.full((1, 4, 8, 8), np.nan, np.float32) for _ in range(10_000)]
    for index in range(3):
        lanes.step([index])
    np.testing.assert_array_equal(lanes.latents([0]), expected)
    assert len(filling) == 10_000


def test_threads_are_openvinos(tiny_bundles):
    backend = OpenVinoBackend(Bundle.open(tiny_bundles["sd1"], verify=False).graphs, threads=1)
    assert backend._options["INFERENCE_NUM_THREADS"] == 1
    assert backend.decode(np.zeros((1, 4, 8, 8), np.float32)).finite.all()
