"""The TensorRT backend on the fake GPU: how often it waits and copies, what it leaves behind, and how it fails."""

import gc
import hashlib
import json
import threading
import warnings

import numpy as np
import pytest

from engine import Pipeline
from engine import errors as e
from engine.backends.tensorrt import engines
from engine.backends.tensorrt.runtime import TensorRtRuntime
from engine.backends.tensorrt.steps import Step
from tests import fakes
from tests.conftest import copy_bundle
from tests.fakes.cuda_types import CUresult

pytestmark = pytest.mark.slow

PROMPT = "a large red circle on a blue background"
FAST = {"num_inference_steps": 6, "seed": 0, "guidance_scale": 5.0, "progress": False}
VERSION = "10.16.1"


@pytest.fixture(params=fakes.VERSIONS)
def version(request):
    return request.param


@pytest.fixture
def machine():
    with fakes.install(VERSION) as machine:
        yield machine


@pytest.fixture
def bundle(planned):
    return planned(VERSION)


@pytest.fixture
def own_bundle(bundle, tmp_path):
    """A copy whose plans may be spoilt."""
    import shutil

    return shutil.copytree(bundle, tmp_path / "demo")


def plan_folder(bundle):
    return next((bundle / "plans").glob("*/build.json")).parent


def pixels(result):
    return np.stack([np.asarray(image) for image in result.images])


# --- the loop


@pytest.mark.parametrize("scheduler", ["ddim", "euler_a"])
def test_a_picture_is_waited_for_once(planned, version, scheduler):
    with fakes.install(version) as machine, Pipeline.load(planned(version)) as pipeline:
        pipeline("a star", **FAST)
        for prompt in (PROMPT, "a star"):
            before = machine.cuda.counts.synchronizations
            pipeline(prompt, **FAST, scheduler=scheduler)
            assert machine.cuda.counts.synchronizations == before + 1


def test_even_the_first_picture_is_waited_for_once(bundle, machine):
    with Pipeline.load(bundle) as pipeline:
        before = machine.cuda.counts.synchronizations
        pipeline(PROMPT, **FAST)
        assert machine.cuda.counts.synchronizations == before + 1


@pytest.mark.slow
@pytest.mark.parametrize("eager", [False, True], ids=["lazy", "eager"])
def test_the_host_may_run_ahead_by_any_number_of_steps(bundle, demo_fp16, eager):
    """The lazy GPU starts when the host waits, the eager one at once: neither sees memory that the host has changed
    since."""
    with Pipeline.load(demo_fp16, backend="onnxruntime") as oracle:
        wanted = pixels(oracle(PROMPT, **{**FAST, "num_inference_steps": 40}, scheduler="euler_a"))
    with fakes.install(VERSION, eager=eager), Pipeline.load(bundle) as pipeline:
        for _ in range(2):
            np.testing.assert_array_equal(
                pixels(pipeline(PROMPT, **{**FAST, "num_inference_steps": 40}, scheduler="euler_a")), wanted
            )


def test_every_step_but_the_first_of_a_size_is_one_graph_launch(bundle, machine):
    with Pipeline.load(bundle) as pipeline:
        pipeline(PROMPT, **FAST)
        assert machine.cuda.counts.graph_launches == 5
        result = pipeline(PROMPT, **FAST)
        assert machine.cuda.counts.graph_launches == 11
        assert result.timings["path"] == "cuda_graph"


def test_a_step_copies_its_row_and_nothing_else(bundle, machine):
    """State goes back inside the graph: per step one copy to the GPU and one on it, none back."""
    with Pipeline.load(bundle) as pipeline:

        def copies(steps):
            pipeline(PROMPT, **{**FAST, "num_inference_steps": steps})
            before = dict(machine.cuda.counts.copies)
            pipeline(PROMPT, **{**FAST, "num_inference_steps": steps, "seed": 1})
            return {kind: count - before.get(kind, 0) for kind, count in machine.cuda.counts.copies.items()}

        few, many = copies(5), copies(9)
        assert {kind: many[kind] - few[kind] for kind in many} == {"D2D": 4, "H2D": 4, "D2H": 0}


def test_what_did_not_change_is_not_copied_again(bundle, machine):
    with Pipeline.load(bundle) as pipeline:
        pipeline(PROMPT, **FAST)
        before = dict(machine.cuda.counts.copies)
        pipeline(PROMPT, **{**FAST, "seed": 1})
        after = {kind: count - before[kind] for kind, count in machine.cuda.counts.copies.items()}
        assert after["H2D"] == 6 + 1  # a row for each step; the new latents; not the prompt, not how it is packed
        assert after["D2H"] == 2  # pixels, and whether they are finite
        assert after["D2D"] == 6 + 1  # the state for each step; the latents for the decoder


def test_only_pixels_come_back(bundle, machine):
    with Pipeline.load(bundle) as pipeline:
        pipeline(PROMPT, **FAST)
        before = machine.cuda.counts.copied_bytes["D2H"]
        pipeline(PROMPT, **FAST)
        assert machine.cuda.counts.copied_bytes["D2H"] - before == 64 * 64 * 3 + 4
        assert machine.cuda.counts.pageable_copies == 0


def test_prompt_and_negative_prompt_are_encoded_in_one_call(bundle, machine):
    with Pipeline.load(bundle) as pipeline:
        pipeline(PROMPT, **FAST, negative_prompt="a star")
        assert machine.library.counts.enqueues["text_encoder"] == 1
        pipeline(PROMPT, **FAST, negative_prompt="a star")
        assert machine.library.counts.enqueues["text_encoder"] == 1


def test_four_pictures_are_decoded_two_by_two(bundle, machine):
    with Pipeline.load(bundle) as pipeline:
        pipeline(PROMPT, **FAST, num_images_per_prompt=4)
        assert machine.library.counts.enqueues["vae_decoder"] == 2
        pipeline(PROMPT, **FAST, num_images_per_prompt=3)
        assert machine.library.counts.enqueues["vae_decoder"] == 4


def test_a_callback_costs_a_wait_for_each_step(bundle, machine):
    with Pipeline.load(bundle) as pipeline:
        pipeline(PROMPT, **FAST)
        before = machine.cuda.counts.synchronizations
        pipeline(PROMPT, **FAST, callback_on_step_end=lambda *_: None)
        assert machine.cuda.counts.synchronizations == before + 6 + 1


def test_cuda_graphs_can_be_turned_off(bundle, machine):
    with Pipeline.load(bundle, cuda_graphs=False) as plain:
        result = plain(PROMPT, **FAST)
        assert (result.timings["path"], machine.cuda.counts.graph_launches) == ("plain", 0)
    with Pipeline.load(bundle) as captured:
        np.testing.assert_array_equal(pixels(captured(PROMPT, **FAST)), pixels(result))


def test_sizes_that_were_not_used_for_long_give_back_their_memory(bundle, machine, monkeypatch):
    monkeypatch.setattr(engines, "SHAPES_KEPT", 4)
    with Pipeline.load(bundle) as pipeline:
        pipeline(PROMPT, **FAST, height=32)
        for height in (40, 48, 56, 72):
            pipeline(PROMPT, **FAST, height=height)
        one_round = {kind: len(sites) for kind, sites in machine.cuda.live().items()}
        for height in (32, 40, 48, 56, 72):
            pipeline(PROMPT, **FAST, height=height)
        assert {kind: len(sites) for kind, sites in machine.cuda.live().items()} == one_round
        assert machine.cuda.live()  # there is something that could leak


# --- what is left behind


def test_close_frees_everything(planned, version):
    with fakes.install(version) as machine:
        with Pipeline.load(planned(version)) as pipeline:
            pipeline(PROMPT, **FAST)
            pipeline(PROMPT, **{**FAST, "height": 32, "guidance_scale": 1.0})
            assert machine.cuda.live()
        assert machine.cuda.live() == {}
        pipeline.close()
        with pytest.raises(e.EngineError, match=r"this pipeline was closed; load it again: Pipeline\.load"):
            pipeline(PROMPT, **FAST)


def test_a_pipeline_that_nobody_closed_gives_its_memory_back(bundle, machine):
    pipeline = Pipeline.load(bundle)
    pipeline(PROMPT, **FAST)
    del pipeline
    gc.collect()
    assert machine.cuda.live() == {}


def test_two_pipelines_on_two_gpus(bundle):
    with fakes.install(VERSION, devices=[fakes.Device(), fakes.Device()]) as machine:
        with Pipeline.load(bundle) as first, Pipeline.load(bundle, device="cuda:1") as second:
            wanted, made = pixels(first(PROMPT, **FAST)), {}
            threads = [
                threading.Thread(target=lambda i=i, one=one: made.update({i: pixels(one(PROMPT, **FAST))}))
                for i, one in enumerate((first, second))
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            np.testing.assert_array_equal(made[0], wanted)
            np.testing.assert_array_equal(made[1], wanted)
            assert "GPU 1" in second.description
        assert machine.cuda.live() == {}


def test_a_gpu_that_is_not_there(bundle, machine):
    with pytest.raises(e.DeviceError, match="'cuda:3' does not exist; this machine has 1 GPU, numbered from 0"):
        Pipeline.load(bundle, device="cuda:3")


def test_no_gpu_and_no_driver(bundle):
    for options in ({"devices": []}, {"driver": False}):
        with (
            fakes.install(VERSION, **options),
            pytest.raises(e.BackendError, match=r"NVIDIA driver|CUDA does not start"),
        ):
            Pipeline.load(bundle, backend="tensorrt")


def test_without_a_gpu_the_default_is_the_cpu(bundle):
    with fakes.install(VERSION, devices=[]), Pipeline.load(bundle) as pipeline:
        assert "on the CPU" in pipeline.description


# --- capture


@pytest.mark.parametrize("call", ["cuStreamBeginCapture", "cuGraphInstantiate", "cuGraphUpload"])
def test_a_capture_that_fails_is_told_once_and_the_picture_is_the_same(bundle, machine, call):
    with Pipeline.load(bundle) as good:
        wanted = pixels(good(PROMPT, **FAST))
    with Pipeline.load(bundle) as pipeline:
        machine.cuda.fail(call, CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
        with pytest.warns(
            RuntimeWarning,
            match="could not be captured as a CUDA graph .*STREAM_CAPTURE_UNSUPPORTED.*launched one by one",
        ):
            result = pipeline(PROMPT, **FAST)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            again = pipeline(PROMPT, **FAST)
        assert result.timings["path"] == again.timings["path"] == "plain"
        np.testing.assert_array_equal(pixels(result), wanted)
        np.testing.assert_array_equal(pixels(again), wanted)
    assert machine.cuda.live() == {}


def test_a_capture_that_something_invalidates(bundle, machine, monkeypatch):
    """As a library would that asks for the stream's state while it is enqueued."""
    enqueue = Step._enqueue

    def meddle(step):
        enqueue(step)
        machine.cuda.module().cuStreamQuery(step._backend.stream.handle)

    with Pipeline.load(bundle) as pipeline:
        monkeypatch.setattr(Step, "_enqueue", meddle)
        with pytest.warns(RuntimeWarning, match=r"could not be captured as a CUDA graph .*STREAM_CAPTURE_INVALIDATED"):
            assert pipeline(PROMPT, **FAST).timings["path"] == "plain"
    assert machine.cuda.live() == {}


def test_no_garbage_is_collected_during_a_capture(bundle, machine, monkeypatch):
    """It could free memory of another pipeline, which spoils the capture."""
    enqueue, collecting = Step._enqueue, []
    monkeypatch.setattr(Step, "_enqueue", lambda step: collecting.append(gc.isenabled()) or enqueue(step))
    with Pipeline.load(bundle) as pipeline:
        pipeline(PROMPT, **FAST)
    assert collecting == [True, False]  # plainly, then captured
    assert gc.isenabled()


def test_an_engine_that_refuses_to_be_captured(bundle, machine):
    with Pipeline.load(bundle) as pipeline:
        machine.library.faults.fail("execute_async_v3", at=3)  # text encoder, first step, capture
        with pytest.warns(RuntimeWarning, match="did not start the denoiser"):
            assert pipeline(PROMPT, **FAST).timings["path"] == "plain"


# --- long prompts


def test_a_prompt_that_is_longer_than_the_plans_names_the_option_that_builds_for_it(bundle, machine):
    words = r"up to 231 tokens, 3 chunks of 77, and the plans were built for up to 2\. .* --prompt-chunks 1:1:3$"
    with Pipeline.load(bundle) as pipeline, pytest.raises(e.PromptLengthError, match=words):
        pipeline(" BREAK ".join("abc"), **FAST, prompt_syntax="a1111")


# --- failures


@pytest.mark.parametrize(
    ("call", "at", "words"),
    [
        ("Runtime", 1, "does not start on GPU 0"),
        ("deserialize_cuda_engine", 2, "plan of the denoiser could not be deserialized"),
        ("create_execution_context", 1, "made no execution context for the text_encoder"),
        ("set_optimization_profile_async", 1, "refused profile 0 of the text_encoder"),
        ("set_input_shape", 1, "refused shape .* for the text_encoder's input embeddings"),
        ("set_tensor_address", 1, "refused an address for the text_encoder's embeddings"),
        ("execute_async_v3", 1, "did not start the text_encoder"),
        ("execute_async_v3", 2, "did not start the denoiser"),
        ("execute_async_v3", 4, "did not start the vae_decoder"),
    ],
)
def test_every_refusal_of_tensorrt_is_an_error_with_its_log(bundle, machine, call, at, words):
    machine.library.faults.fail(call, at=at)
    with pytest.raises(e.TensorRtError, match=words) as raised, Pipeline.load(bundle) as pipeline:
        pipeline(PROMPT, **FAST)
    assert "TensorRT's log ends with" in str(raised.value)
    assert machine.cuda.live() == {}


def allocations(machine, bundle):
    """How many allocations of each kind a load and a picture make."""
    with Pipeline.load(bundle) as pipeline:
        pipeline(PROMPT, **FAST)
    return {call: machine.cuda.calls.count(call) for call in ("cuMemAlloc", "cuMemHostAlloc", "cudaMalloc")}


def test_too_little_memory_at_every_single_allocation(bundle):
    with fakes.install(VERSION) as machine:
        counts = allocations(machine, bundle)
    assert min(counts.values()) > 0
    for call, count in counts.items():
        for at in range(1, count + 1):
            with fakes.install(VERSION) as machine:
                machine.cuda.fail(call, CUresult.CUDA_ERROR_OUT_OF_MEMORY, at=at)
                with pytest.raises(e.BackendError) as raised, Pipeline.load(bundle) as pipeline:
                    pipeline(PROMPT, **FAST)
                if call != "cudaMalloc":
                    assert isinstance(raised.value, e.CudaMemoryError), f"{call} {at}: {raised.value}"
                    assert "OUT_OF_MEMORY" in str(raised.value)
                    assert "GiB are free" in str(raised.value)
                assert machine.cuda.live() == {}, f"{call} {at}"


def test_after_a_shortage_the_pipeline_goes_on(bundle, machine):
    with Pipeline.load(bundle) as pipeline:
        wanted = pixels(pipeline(PROMPT, **FAST))
        machine.cuda.fail("cuMemAlloc", CUresult.CUDA_ERROR_OUT_OF_MEMORY)
        with pytest.raises(e.CudaMemoryError):
            pipeline(PROMPT, **FAST, height=32)
        np.testing.assert_array_equal(pixels(pipeline(PROMPT, **FAST)), wanted)


def test_after_a_sticky_error_the_pipeline_refuses_and_says_to_restart(bundle, machine):
    with Pipeline.load(bundle) as pipeline:
        machine.cuda.fail("cuEventSynchronize", CUresult.CUDA_ERROR_ILLEGAL_ADDRESS)
        with pytest.raises(
            e.DeviceLostError, match=r"ILLEGAL_ADDRESS .*while waiting for the pixels .*start a new one"
        ):
            pipeline(PROMPT, **FAST)
        with pytest.raises(
            e.DeviceLostError, match=r"is lost to this process since .*ILLEGAL_ADDRESS.*start a new process"
        ):
            pipeline(PROMPT, **FAST)


def test_a_launch_that_fails_names_what_was_running(bundle, machine):
    with Pipeline.load(bundle) as pipeline:
        machine.cuda.fail("cuGraphLaunch", CUresult.CUDA_ERROR_INVALID_VALUE)
        with pytest.raises(e.CudaError, match=r"INVALID_VALUE .*while launching a graph"):
            pipeline(PROMPT, **FAST)


# --- plans that are not for here


@pytest.mark.parametrize(
    ("device", "version", "words"),
    [
        (
            fakes.Device("NVIDIA A100", (8, 0)),
            VERSION,
            ["GPU NVIDIA H200 there, NVIDIA A100 here", "compute capability 9.0 there, 8.0 here"],
        ),
        (fakes.Device(), "11.4.0", ["TensorRT 10.16.1 there, 11.4.0 here"]),
        (fakes.Device(), "8.6.0", ["TensorRT 10.16.1 there, 8.6.0 here"]),
    ],
)
def test_plans_of_another_machine_are_named_and_never_deserialized(bundle, device, version, words):
    with fakes.install(version, devices=[device]) as machine:
        with pytest.raises(e.PlanNotFoundError) as raised:
            Pipeline.load(bundle)
        for word in (*words, f"python build_engines.py --backend tensorrt --bundle {bundle}", "backend='onnxruntime'"):
            assert word in str(raised.value)
        assert machine.library.counts.deserializations == 0


def test_a_bundle_without_plans(demo_fp16, tmp_path, machine):
    bundle = copy_bundle(demo_fp16, tmp_path)
    with pytest.raises(
        e.PlanNotFoundError,
        match=r"no TensorRT plans for this machine \(NVIDIA H200, compute capability 9.0, TensorRT 10.16.1\); it has "
        r"none",
    ):
        Pipeline.load(bundle)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"machine": {"gpu": "NVIDIA H100", "compute_capability": "9.0", "tensorrt": VERSION}},
            "GPU NVIDIA H100 there, NVIDIA H200 here",
        ),
        (
            {"machine": {"gpu": "NVIDIA H200", "compute_capability": "9.0", "tensorrt": "10.14.1"}},
            "TensorRT 10.14.1 there",
        ),
        ({"precision": "bf16"}, "precision bf16 there, fp16 in the bundle"),
        ({"format": 0}, "has format 0, not 3"),
        (
            {"settings": {"optimization_level": 5}},
            "profiles or builder settings in build.json are not those that text_encoder, denoiser",
        ),
    ],
)
def test_build_json_is_compared_field_by_field(own_bundle, machine, change, words):
    file = plan_folder(own_bundle) / "build.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(e.PlanMismatchError, match=words) as raised:
        Pipeline.load(own_bundle)
    assert f"--bundle {own_bundle}" in str(raised.value)
    assert machine.library.counts.deserializations == 0


def test_plans_of_other_graphs_are_refused(own_bundle, machine, edit_manifest):
    manifest = json.loads((own_bundle / "manifest.json").read_text())
    graph = own_bundle / "onnx" / "denoiser.onnx"
    graph.write_bytes(graph.read_bytes() + b" ")
    manifest["files"]["onnx/denoiser.onnx"] = {
        "sha256": hashlib.sha256(graph.read_bytes()).hexdigest(),
        "bytes": graph.stat().st_size,
    }
    edit_manifest(own_bundle, files=manifest["files"])
    with pytest.raises(e.PlanMismatchError, match="the ONNX graphs of denoiser have changed since"):
        Pipeline.load(own_bundle)


def test_a_plan_cut_in_half_is_not_read(own_bundle, machine):
    plan = plan_folder(own_bundle) / "denoiser.plan"
    plan.write_bytes(plan.read_bytes()[: plan.stat().st_size // 2])
    with pytest.raises(
        e.PlanDamagedError, match=r"denoiser.plan has \d+ bytes instead of \d+; build it again: python build_engines.py"
    ):
        Pipeline.load(own_bundle)
    assert machine.library.counts.deserializations == 0


@pytest.mark.parametrize("verify", [True, False])
def test_a_plan_with_one_other_byte_is_never_executed(own_bundle, machine, verify):
    plan = plan_folder(own_bundle) / "denoiser.plan"
    content = bytearray(plan.read_bytes())
    content[1000] ^= 1
    plan.write_bytes(content)
    with pytest.raises(e.PlanDamagedError, match=r"has SHA-256 .* instead of .* and was not executed"):
        Pipeline.load(own_bundle, verify=verify)
    assert machine.library.counts.deserializations == 1  # the text encoder, which is all right


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 3}', "\x00"])
def test_a_garbled_build_json(own_bundle, machine, content):
    (plan_folder(own_bundle) / "build.json").write_text(content)
    with pytest.raises(e.PlanDamagedError, match=r"build.json has a missing or wrong field: .*build the plans again"):
        Pipeline.load(own_bundle)


def test_missing_plans(own_bundle, machine):
    (plan_folder(own_bundle) / "vae_decoder.plan").unlink()
    with pytest.raises(e.PlanDamagedError, match=r"vae_decoder.plan is missing"):
        Pipeline.load(own_bundle)


# --- sizes


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"height": 128},
            e.SizeError,
            "height 128 is not a size that this bundle was built for; the nearest size that this bundle allows is 96",
        ),
        (
            {"num_images_per_prompt": 5},
            e.BatchError,
            r"are 5 pictures in one call; this bundle was built for 1 or 1 to 4. .*--batch 1:1:5",
        ),
    ],
)
def test_sizes_are_those_of_the_plans(bundle, machine, options, error, words):
    with Pipeline.load(bundle) as pipeline, pytest.raises(error, match=words) as raised:
        pipeline(PROMPT, **FAST, **options)
    assert f"build_engines.py --backend tensorrt --bundle {bundle}" in str(raised.value)


def test_the_default_size_is_the_first_profiles(bundle, machine):
    with Pipeline.load(bundle) as pipeline:
        assert pipeline(PROMPT, **FAST).images[0].size == (64, 64)


@pytest.mark.parametrize("version", fakes.VERSIONS)
def test_plugins_are_registered_where_a_plan_may_hold_one(version):
    with fakes.install(version) as machine:
        TensorRtRuntime().close()
        assert machine.library.plugins_registered == (version == "8.6.0")


def test_versions_that_nobody_wrote_this_for(bundle, machine, monkeypatch):
    for version in ("8.5.3", "9.2.0", "10.9.0", "12.0.1"):
        monkeypatch.setattr(machine.tensorrt, "__version__", version)
        with pytest.raises(
            e.BackendError,
            match=rf"TensorRT {version} is installed; LatentRT runs on 8.6, 10.12 and later, and 11: pip install",
        ):
            Pipeline.load(bundle, backend="tensorrt")
