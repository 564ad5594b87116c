"""Plans: what is built for which version, what is kept, what is said when it fails. On the fake GPU."""

import gc
import json
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

import build_engines
from engine import Pipeline
from engine.backends.tensorrt import versions as tensorrt_versions
from engine.backends.tensorrt.runtime import TensorRtRuntime
from engine.contract import SLOTS, Range, Shapes
from engine.errors import BackendError, BundleNotFoundError, CudaMemoryError, PlanNotFoundError, TensorRtError
from engine.family import STABLE_DIFFUSION
from export.build import build
from export.errors import OutputError, PlanBuildError, RoomError, UsageError, VerificationError
from export.tensorrt import check as to_check
from export.tensorrt import diagnose
from export.tensorrt import profiles as to_profiles
from export.tensorrt.build import build_plans
from export.tensorrt.compiling import Settings
from export.tensorrt.profiles import component_profiles, with_rows
from export.tensorrt.progress import Phases, watch
from tests import fakes
from tests.conftest import copy_bundle
from tests.fakes.cuda_types import CUresult

pytestmark = pytest.mark.slow
COMPONENTS = STABLE_DIFFUSION.names
ROOT = Path(__file__).parents[3]
ONE, FIXED = Range(1, 1, 1), Range(64, 64, 64)
PROFILES = [Shapes(FIXED, FIXED, ONE, Range(2, 2, 2))]


@pytest.fixture(params=fakes.VERSIONS)
def version(request):
    return request.param


@pytest.fixture
def machine():
    with fakes.install("10.16.1") as machine:
        yield machine


@pytest.fixture
def bundle(tiny_fp16, tmp_path):
    return copy_bundle(tiny_fp16, tmp_path)


def plan_folder(bundle):
    return next((bundle / "plans").glob("*/build.json")).parent


def said(bundle, profiles=PROFILES, settings=None, **options):
    """What a build reports."""
    lines = []
    build_plans(bundle, profiles, settings or Settings(), **options, report=lines.append)
    return lines


# --- what is built


def test_every_component_is_compared_scanned_and_timed(bundle, version):
    with fakes.install(version) as machine:
        outcome = build_plans(bundle, PROFILES, report=lambda message: None)
        assert machine.cuda.live() == {}
    folder = bundle / "plans" / f"NVIDIA_H200-sm90-trt{version}"
    assert outcome.folder == folder
    assert outcome.built == COMPONENTS
    written = json.loads((folder / "build.json").read_text())
    assert written == outcome.build
    assert written["machine"] == {"gpu": "NVIDIA H200", "compute_capability": "9.0", "tensorrt": version}
    for component in COMPONENTS:
        entry = written["components"][component]
        assert (folder / f"{component}.plan").stat().st_size == entry["bytes"]
        assert entry["check"]["compared"]
        assert entry["check"]["difference"]["relative_rms"] <= 5e-3
        assert entry["check"]["timed"][0]["milliseconds"] > 0
        assert entry["seconds"]["build"] > 0


def header(plan: Path) -> dict:
    """What the fake TensorRT was told when it built a plan."""
    from tests.fakes.tensorrt_plan import read_plan

    return read_plan(plan.read_bytes()).header


def test_precision_comes_from_the_graph(bundle, version):
    """From 10 on by strong typing; on 8.6 by the FP16 flag and constraints on what must stay in float32."""
    with fakes.install(version):
        build_plans(bundle, PROFILES, compare=False, report=lambda message: None)
    told = header(plan_folder(bundle) / "denoiser.plan")
    if version == "8.6.0":
        assert {"FP16", "PREFER_PRECISION_CONSTRAINTS"} <= set(told["flags"])
        assert set(told["precisions"].values()) == {"FLOAT"}
    else:
        assert told["strongly_typed"]
        assert not {"FP16", "BF16", "INT8"} & set(told["flags"])
    assert not {"VERSION_COMPATIBLE", "TF32"} & set(told["flags"])


def test_8_keeps_the_timestep_and_what_follows_the_last_convolution_in_float32(bundle):
    """And neither norms nor softmax, which would keep attention from being fused. The fake's types in between read
    FLOAT, as NVIDIA says."""
    with fakes.install("8.6.0"):
        lines = said(bundle, compare=False)
    pinned = {component: header(plan_folder(bundle) / f"{component}.plan")["precisions"] for component in COMPONENTS}
    operators = {layer["Name"]: layer["LayerType"] for layer in header(plan_folder(bundle) / "denoiser.plan")["layers"]}
    kinds = Counter(operators[name] for name in pinned["denoiser"])
    assert kinds["MATRIX_MULTIPLY"] == 4  # two of the timestep's embedding, guidance, sampler
    assert not kinds.keys() & {"NORMALIZATION", "SOFTMAX", "CONVOLUTION"}
    assert len(pinned["denoiser"]) < 30
    assert len(pinned["text_encoder"]) == 5  # the emphasis, after the last norm
    assert any(re.fullmatch(r".* denoiser: \d+ of \d+ layers pinned to float32", line) for line in lines)


def test_8_does_not_build_a_network_that_is_pinned_as_a_whole(bundle, monkeypatch):
    monkeypatch.setattr(tensorrt_versions, "is_cast", lambda trt, layer: False)
    with (
        fakes.install("8.6.0"),
        pytest.raises(
            PlanBuildError, match=r"\d+ of \d+ layers of the \w+ would be pinned to float32.*at most a quarter"
        ),
    ):
        said(bundle, compare=False)


@pytest.mark.parametrize("version", fakes.VERSIONS)
def test_no_plan_holds_a_plugin(bundle, version):
    """8.6's parser makes one that needs cuDNN of every GroupNorm; what is put in its place computes the same."""
    with fakes.install(version):
        build_plans(bundle, PROFILES, report=lambda message: None)
    plans = [header(plan_folder(bundle) / f"{component}.plan") for component in COMPONENTS]
    assert [plan["plugins"] for plan in plans] == [[]] * len(COMPONENTS)
    norms = [layer for layer in plans[COMPONENTS.index("denoiser")]["layers"] if layer["LayerType"] == "NORMALIZATION"]
    assert len(norms) == 33


def test_a_normalization_that_8_refuses(bundle):
    with fakes.install("8.6.0") as machine:
        machine.library.faults.fail("add_normalization")
        with pytest.raises(
            TensorRtError, match=r"TensorRT 8.6.0 made no normalization of the layer node_InstanceNormalization"
        ):
            said(bundle, compare=False)


def test_fixed_sizes_are_fixed_in_the_network(bundle, machine):
    build_plans(bundle, PROFILES, compare=False, report=lambda message: None)
    inputs = {name: shape for name, _, shape in header(plan_folder(bundle) / "denoiser.plan")["inputs"]}
    assert inputs["state"] == [1, SLOTS, 4, 8, 8]
    assert inputs["context"][:2] == [2, 77]


def test_a_size_that_varies_between_profiles_is_left_open(bundle, machine):
    build_plans(bundle, with_rows(Shapes(FIXED, FIXED, ONE)), compare=False, report=lambda message: None)
    inputs = {name: shape for name, _, shape in header(plan_folder(bundle) / "denoiser.plan")["inputs"]}
    assert inputs["row_sample"] == [-1]
    assert inputs["state"] == [1, SLOTS, 4, 8, 8]


def test_settings_reach_the_builder(bundle, machine):
    build_plans(
        bundle,
        PROFILES,
        Settings(optimization_level=1, workspace=1 << 28, max_aux_streams=0),
        compare=False,
        report=lambda message: None,
    )
    told = header(plan_folder(bundle) / "denoiser.plan")
    assert (told["level"], told["workspace"], told["aux_streams"]) == (1, 1 << 28, 0)


def test_rows_are_those_with_and_without_guidance():
    assert [profile.rows for profile in with_rows(Shapes(FIXED, FIXED, Range(3, 3, 3)))] == [
        Range(6, 6, 6),
        Range(3, 3, 3),
    ]
    assert [profile.rows for profile in with_rows(Shapes(FIXED, FIXED, Range(1, 2, 4)))] == [Range(1, 4, 8)]


def test_the_vae_takes_as_many_pictures_as_fit():
    large = Shapes(Range(1024, 1024, 1024), Range(1024, 1024, 1024), Range(1, 2, 8), Range(1, 4, 16))
    assert [profile.batch for profile in component_profiles(STABLE_DIFFUSION["vae_decoder"], [large])] == [ONE]
    middle = Shapes(Range(512, 512, 512), Range(512, 512, 512), Range(1, 2, 8), Range(1, 4, 16))
    assert [profile.batch for profile in component_profiles(STABLE_DIFFUSION["vae_decoder"], [middle])] == [
        Range(1, 2, 4)
    ]
    assert len(component_profiles(STABLE_DIFFUSION["vae_decoder"], with_rows(Shapes(FIXED, FIXED, ONE)))) == 1


def test_the_built_plans_make_the_picture_of_onnx_runtime(bundle, version):
    with Pipeline.load(bundle, backend="onnxruntime") as oracle:
        wanted = np.asarray(oracle("a star", num_inference_steps=3, seed=1).images[0])
    with fakes.install(version):
        build_plans(bundle, with_rows(Shapes(FIXED, FIXED, ONE)), compare=False, report=lambda message: None)
        with Pipeline.load(bundle) as pipeline:
            np.testing.assert_array_equal(
                np.asarray(pipeline("a star", num_inference_steps=3, seed=1).images[0]), wanted
            )


# --- what is kept


def test_unchanged_plans_are_not_built_again(bundle, machine):
    build_plans(bundle, PROFILES, compare=False, report=lambda message: None)
    builds = machine.library.counts.builds
    assert said(bundle)[-1].endswith("is up to date")
    assert machine.library.counts.builds == builds


def test_only_what_changed_is_built(bundle, machine):
    said(bundle, compare=False)
    outcome = build_plans(
        bundle, [Shapes(FIXED, FIXED, ONE, Range(1, 1, 1))], compare=False, report=lambda message: None
    )
    assert outcome.built == ("denoiser",)


def test_a_damaged_plan_is_built_again(bundle, machine):
    said(bundle, compare=False)
    (plan_folder(bundle) / "denoiser.plan").write_bytes(b"")
    lines = said(bundle, compare=False)
    assert re.search(
        r"the plans in .* do not run and will be replaced: .*denoiser.plan has 0 bytes instead of \d+", lines[0]
    )
    assert [line for line in lines if "built in" in line] == [
        line for line in lines if "[1/1] denoiser: built in" in line
    ]


def test_the_timing_cache_is_used_and_says_what_it_saved(bundle, machine):
    said(bundle, compare=False)
    cache = plan_folder(bundle).with_name(f"{plan_folder(bundle).name}.timing.cache")
    assert cache.stat().st_size > 0
    timed = machine.library.counts.tactics_timed
    assert timed > 0
    lines = said(bundle, compare=False, force=True)
    assert machine.library.counts.tactics_timed == timed
    assert sum("; the timing cache saved " in line for line in lines) == len(COMPONENTS)


def test_a_timing_cache_of_another_machine_is_replaced(bundle, machine):
    said(bundle, compare=False)
    cache = plan_folder(bundle).with_name(f"{plan_folder(bundle).name}.timing.cache")
    cache.write_bytes(b"not a timing cache")
    assert any(
        "timing.cache is not usable here and will be replaced" in line
        for line in said(bundle, compare=False, force=True)
    )
    assert cache.read_bytes() != b"not a timing cache"


def test_plans_outlive_a_new_manifest(tiny_sources, bundle, machine):
    """Other sizes for ONNX Runtime trace nothing again, and the plans and their timing cache stay."""
    said(bundle, compare=False)
    side = Range(32, 64, 96)
    shapes = Shapes(side, side, Range(1, 1, 2))
    outcome = build(tiny_sources["sd1"], bundle.parent, "fp16", shapes, verify=False, report=lambda message: None)
    assert outcome.exported == ()
    assert said(bundle)[-1].endswith("is up to date")
    with Pipeline.load(bundle, backend="tensorrt") as pipeline:
        assert len(pipeline("a star", num_inference_steps=1, seed=0).images) == 1


def plans_of(folder):
    return sorted(file.stem for file in folder.glob("*.plan"))


def test_what_is_finished_outlives_a_failure_and_is_not_built_again(bundle, machine):
    """Where no plans run yet, it is in place at once: here all that a picture needs."""
    machine.library.faults.fail("build_serialized_network", at=4)
    with pytest.raises(PlanBuildError, match="built no plan for the vae_encoder"):
        said(bundle, compare=False)
    assert plans_of(plan_folder(bundle)) == ["denoiser", "text_encoder", "vae_decoder"]
    with Pipeline.load(bundle, backend="tensorrt") as pipeline:
        assert len(pipeline("a star", num_inference_steps=1, seed=0).images) == 1
    outcome = build_plans(bundle, PROFILES, compare=False, report=lambda message: None)
    assert outcome.built == ("vae_encoder",)
    assert plans_of(plan_folder(bundle)) == sorted(COMPONENTS)
    assert not list((bundle / "plans").glob(".*"))


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from tests import fakes
from tests.export.tensorrt.test_build import PROFILES
from export.tensorrt import build as to_tensorrt
from pathlib import Path
with fakes.install("10.16.1"):
    def report(message):
        if "vae_decoder: building" in message:
            os.kill(os.getpid(), 9)
    to_tensorrt.build_plans(Path(sys.argv[2]), PROFILES, compare=False, report=report)
"""


def test_a_build_that_is_killed_goes_on_where_it_was(bundle, machine):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(ROOT), str(bundle)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert plans_of(plan_folder(bundle)) == ["denoiser"]
    with pytest.raises(PlanNotFoundError, match="has no plan of the text_encoder; build the plans again"):
        Pipeline.load(bundle, backend="tensorrt")
    assert build_plans(bundle, PROFILES, compare=False, report=lambda message: None).built == (
        "text_encoder",
        "vae_decoder",
        "vae_encoder",
    )


def test_plans_that_run_stay_until_the_new_ones_do_and_these_are_built_once(bundle, machine):
    said(bundle, compare=False)
    old = {file.name: file.read_bytes() for file in plan_folder(bundle).iterdir()}
    settings = Settings(optimization_level=1)
    machine.library.faults.fail("build_serialized_network", at=2)
    with pytest.raises(PlanBuildError, match="for the vae_decoder"):
        said(bundle, settings=settings, compare=False)
    assert {file.name: file.read_bytes() for file in plan_folder(bundle).iterdir()} == old
    lines = said(bundle, settings=settings, components=["text_encoder"], compare=False)
    assert "stays as it was; for these sizes and settings a pipeline needs the plans of vae_decoder too" in lines[-1]
    assert {file.name: file.read_bytes() for file in plan_folder(bundle).iterdir()} == old
    lines = said(bundle, settings=settings, compare=False)
    assert [line.split(": ")[0] for line in lines if "built in" in line] == ["[1/2] vae_decoder", "[2/2] vae_encoder"]
    assert header(plan_folder(bundle) / "denoiser.plan")["level"] == 1
    assert not list((bundle / "plans").glob(".*"))


def test_some_components_can_be_built(bundle, machine):
    assert (
        "; a pipeline needs the plans of text_encoder, vae_decoder too"
        in said(bundle, components=["denoiser"], compare=False)[-1]
    )
    assert plans_of(plan_folder(bundle)) == ["denoiser"]
    assert said(bundle, components=["denoiser"], compare=False)[0] == "denoiser: unchanged"
    assert plans_of(plan_folder(bundle)) == ["denoiser"]
    assert (
        run("--bundle", bundle, "--rows", "2", "--components", "vae_decoder,text_encoder", "--no-verify", "--quiet")
        == 0
    )
    assert plans_of(plan_folder(bundle)) == ["denoiser", "text_encoder", "vae_decoder"]
    assert said(bundle, components=["denoiser"])[-1].endswith("is up to date")
    forced = build_plans(
        bundle, PROFILES, components=["denoiser"], compare=False, force=True, report=lambda message: None
    )
    assert forced.built == ("denoiser",)
    assert plans_of(plan_folder(bundle)) == ["denoiser", "text_encoder", "vae_decoder"]


# --- failures

FAILURES = [
    ("Builder", "made no builder"),
    ("create_network", "made no network"),
    ("create_builder_config", "made no configuration"),
    ("parse_from_file", "does not parse"),
    ("build_serialized_network", "built no plan"),
    ("add_optimization_profile", "refused the profile"),
]


@pytest.mark.parametrize(
    ("version", "call", "words"),
    [("10.16.1", *failure) for failure in FAILURES] + [("8.6.0", *FAILURES[4]), ("11.4.0", *FAILURES[4])],
)
def test_every_refusal_is_an_error_with_the_log_and_the_old_plans_stay(bundle, version, call, words):
    with fakes.install(version) as machine:
        said(bundle, compare=False)
        old = {file.name: file.read_bytes() for file in plan_folder(bundle).iterdir()}
        machine.library.faults.fail(call)
        with pytest.raises(
            PlanBuildError,
            match=rf"TensorRT {version} {words}.* for the denoiser; TensorRT's log ends with: .*The old plans are "
            r"untouched",
        ):
            said(bundle, compare=False, force=True)
        assert {file.name: file.read_bytes() for file in plan_folder(bundle).iterdir()} == old
        assert not list((bundle / "plans").glob(".*"))
        assert machine.cuda.live() == {}


def test_a_graph_that_the_parser_does_not_know(bundle, edit_manifest):
    graph = bundle / "onnx" / "denoiser.onnx"
    graph.write_bytes(b"not a graph")
    manifest = json.loads((bundle / "manifest.json").read_text())
    from engine.bundle import sha256

    manifest["files"]["onnx/denoiser.onnx"] = {"sha256": sha256(graph), "bytes": graph.stat().st_size}
    edit_manifest(bundle, files=manifest["files"])
    with (
        fakes.install("8.6.0"),
        pytest.raises(PlanBuildError, match=r"does not parse .*denoiser.onnx \(Failed to parse the ONNX model"),
    ):
        said(bundle, compare=False)


def test_beyond_the_tolerance_the_build_fails_and_names_component_and_layer(bundle, machine, monkeypatch):
    monkeypatch.setattr(to_check, "tolerance", lambda component, precision: -1.0)
    monkeypatch.setattr(diagnose, "tolerance", lambda component, precision: -1.0)
    with pytest.raises(
        VerificationError,
        match=r"the plan of the denoiser differs from ONNX Runtime by .*allowed in fp16. The old plans are untouched. "
        r"The first layer that diverges is node_\w+ \(\w+, output .*it is in (half|float) and its values go from ",
    ):
        said(bundle)
    assert not (bundle / "plans").exists() or not list((bundle / "plans").glob("*/build.json"))


def test_values_that_are_not_finite_fail_the_build(bundle, machine, monkeypatch):
    good = to_profiles.random_inputs

    def overflowing(component, *arguments, **options):
        inputs = good(component, *arguments, **options)
        if component.name == "denoiser":
            inputs["context"][:] = 1e38
        return inputs

    monkeypatch.setattr(to_profiles, "random_inputs", overflowing)
    with pytest.raises(
        VerificationError,
        match=r"the plan of the denoiser gives values that are not finite in next_state at 64 x 64, batch 1, 2 U-Net "
        r"rows; "
        r"build the bundle with --precision bf16 or fp32",
    ):
        said(bundle)


def test_diagnose_compares_layer_by_layer(bundle, machine):
    lines = said(bundle, diagnose=True)
    verdicts = [line for line in lines if "layers diverges" in line]
    assert len(verdicts) == len(COMPONENTS)
    assert all("None of " in line for line in verdicts)


@pytest.mark.parametrize("fails", [False, True])
def test_what_tensorrt_made_goes_while_its_gpu_is_current(bundle, fails):
    """Its destructors would run on GPU 0 otherwise, or on none."""
    with fakes.install("10.16.1", devices=[fakes.Device(), fakes.Device()]) as machine:
        if fails:
            machine.library.faults.fail("build_serialized_network")
        with pytest.raises(PlanBuildError) if fails else nullcontext():
            said(bundle, components=["text_encoder"], compare=False, gpu=1)
        gc.collect()
        assert machine.library.died_elsewhere == []


def test_a_driver_that_8_would_crash_on_is_refused(bundle):
    with fakes.install("8.6.0") as machine, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["cuda.bindings.driver"], "cuDriverGetVersion", lambda: (CUresult.CUDA_SUCCESS, 11080))
        with pytest.raises(
            BackendError,
            match=r"TensorRT 8.6.0 needs a driver for CUDA 12.0 or later, and the one here is for CUDA 11.8; update "
            r"the driver",
        ):
            said(bundle)
        with pytest.raises(BackendError, match=r"the one here is for CUDA 11\.8"):
            TensorRtRuntime()
        assert machine.cuda.live() == {}


def test_too_small_a_gpu_is_found_before_the_build(bundle):
    with fakes.install("10.16.1", devices=[fakes.Device("NVIDIA T400", (7, 5), memory=512 << 20)]) as machine:
        with pytest.raises(
            RoomError,
            match=r"estimated to need 1\.\d GiB of the GPU's memory, and 0\.5 of 0\.5 GiB are free on GPU 0 \(NVIDIA "
            r"T400\)",
        ):
            said(bundle)
        assert machine.library.counts.builds == 0


def test_too_small_a_disk_is_found_before_the_build(bundle, machine, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OutputError, match=r"the plans are estimated to need 0\.\d+ GB, and 0\.00 GB are free at"):
        said(bundle)


def test_device_memory_that_runs_out_while_checking(bundle, machine):
    machine.cuda.fail("cuMemAlloc", CUresult.CUDA_ERROR_OUT_OF_MEMORY, at=2)
    with pytest.raises(CudaMemoryError, match="OUT_OF_MEMORY"):
        said(bundle)
    assert machine.cuda.live() == {}


def test_bf16_needs_a_newer_tensorrt(bundle, edit_manifest):
    edit_manifest(bundle, precision="bf16")
    with (
        fakes.install("8.6.0"),
        pytest.raises(UsageError, match=r"TensorRT 8.6.0 has no bfloat16; build the bundle with --precision fp16"),
    ):
        said(bundle)


def test_opset_23_needs_a_newer_tensorrt(bundle, edit_manifest):
    components = json.loads((bundle / "manifest.json").read_text())["components"]
    edit_manifest(bundle, components={name: {**entry, "opset": 23} for name, entry in components.items()})
    with (
        fakes.install("8.6.0"),
        pytest.raises(
            UsageError, match=r"are of opset 23, and TensorRT 8.6.0 takes 18; build the bundle with --opset 18"
        ),
    ):
        said(bundle)


def test_no_bundle(tmp_path, machine):
    with pytest.raises(BundleNotFoundError, match="there is no bundle at"):
        said(tmp_path / "missing")


# --- progress and Ctrl-C


def test_ctrl_c_cancels_a_build_and_leaves_the_old_plans(bundle, machine, monkeypatch):
    said(bundle, compare=False)
    old = {file.name: file.read_bytes() for file in plan_folder(bundle).iterdir()}
    step = Phases.step

    def interrupted(phases, phase, number):
        if not phases.cancelled:
            signal.raise_signal(signal.SIGINT)
            while not phases.cancelled:
                pass
        return step(phases, phase, number)

    monkeypatch.setattr(Phases, "step", interrupted)
    handler = signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # a job in the background inherits that it is ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            said(bundle, compare=False, force=True)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert {file.name: file.read_bytes() for file in plan_folder(bundle).iterdir()} == old
    assert not list((bundle / "plans").glob(".*"))
    assert machine.cuda.live() == {}


def test_nested_phases_become_one_fraction():
    phases = Phases()
    phases.start("build", None, 2)
    assert phases.fraction() == 0.0
    phases.start("tactics", "build", 4)
    assert phases.step("tactics", 1)
    assert phases.fraction() == 0.25
    phases.finish("tactics")
    phases.step("build", 0)
    assert phases.fraction() == 0.5
    phases.start("late", "build", 10)
    assert phases.fraction() == 0.5  # never back
    phases.step("build", 1)
    phases.finish("build")
    assert phases.fraction() == 1.0


def test_an_error_in_the_builders_thread_arrives_here():
    def work():
        raise ZeroDivisionError("inside")

    with pytest.raises(ZeroDivisionError, match="inside"):
        watch(work, "a build", Phases(), True, lambda message: None)


# --- the command


def run(*arguments):
    return build_engines.main([str(argument) for argument in arguments])


def test_the_command_builds_plans_of_a_bundle(bundle, machine, capsys):
    assert run("--bundle", bundle, "--height", "64,96", "--width", "64,72", "--rows", "2,1") == 0
    profiles = json.loads((plan_folder(bundle) / "build.json").read_text())["profiles"]
    assert [(p["height"][1], p["width"][1], p["rows"][1]) for p in profiles] == [
        (64, 64, 2),
        (64, 64, 1),
        (96, 72, 2),
        (96, 72, 1),
    ]
    assert "[1/4] denoiser: built in" in capsys.readouterr().out


def test_with_a_gpu_the_command_builds_graphs_in_fp16_and_plans(demo_fp16, machine, tmp_path, capsys):
    shutil.copytree(
        demo_fp16, tmp_path / "demo", ignore=shutil.ignore_patterns("plans")
    )  # so that nothing is traced again
    assert run("--output", tmp_path, "--no-verify") == 0
    manifest = json.loads((tmp_path / "demo" / "manifest.json").read_text())
    assert manifest["precision"] == "fp16"
    build_json = json.loads((plan_folder(tmp_path / "demo") / "build.json").read_text())
    assert [(p["height"], p["batch"], p["rows"]) for p in build_json["profiles"]] == [
        ([64] * 3, [1] * 3, [2] * 3),
        ([64] * 3, [1] * 3, [1] * 3),
    ]
    assert build_json["components"]["denoiser"]["check"]["reason"] == "--no-verify"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["sd15", "--bundle", "x"],
            "--bundle builds TensorRT plans of an existing bundle; leave out MODEL and backends other than tensorrt",
        ),
        (["--bundle", "x", "--backend", "onnxruntime"], "leave out MODEL and backends other than tensorrt"),
        (["--bundle", "missing"], "there is no bundle at missing"),
        (
            ["--bundle", "BUNDLE", "--height", "64,96", "--width", "64,64,64"],
            "--height has 2 values and another option 3",
        ),
        (["--bundle", "BUNDLE", "--height", "60"], "--height 60 is not a multiple of 8"),
        (["--bundle", "BUNDLE", "--batch", "4", "--rows", "2"], "--rows 2 is fewer than --batch 4"),
        (["--bundle", "BUNDLE", "--device", "cuda:7"], "device 'cuda:7' does not exist"),
        (["--bundle", "BUNDLE", "--device", "cpu"], "--device cpu cannot build TensorRT plans"),
        (["--bundle", "BUNDLE", "--workspace", "-1"], "--workspace -1 is not a number of GiB above 0"),
        (["--backend", "onnxruntime", "--rows", "2"], "--rows is for --backend tensorrt; leave it out"),
        (
            ["--bundle", "BUNDLE", "--components", "denoiser,unet"],
            "--components has 'unet'; there are text_encoder, denoiser, vae_decoder, vae_encoder",
        ),
    ],
)
def test_mistakes_exit_with_2(bundle, machine, capsys, arguments, words):
    assert run(*[str(bundle) if argument == "BUNDLE" else argument for argument in arguments]) == 2
    assert words in capsys.readouterr().err


def test_tensorrt_asked_for_and_missing_is_found_before_anything_is_exported(tmp_path, capsys):
    assert run("--backend", "tensorrt", "--output", tmp_path / "out") == 1
    assert "TensorRT cannot be imported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


BARE = """
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        first = name.split(".")[0]
        if first in {
            "torch", "onnx", "onnxruntime", "PIL", "tokenizers", "tqdm", "filelock", "diffusers", "transformers",
            "polygraphy", "safetensors",
        }:
            raise ModuleNotFoundError("forbidden: " + name, name=first)
sys.path.insert(0, sys.argv[1])
import tests.fakes as fakes  # the fake computes with onnxruntime; the code under test must not see it
import tests.fakes.tensorrt_run, onnxruntime, onnx
bundle = sys.argv[2]
with fakes.install(sys.argv[3]):
    for name in ("torch", "PIL", "tokenizers", "tqdm", "filelock"):
        assert name not in sys.modules, name
    for name in ("onnx", "onnxruntime"):
        del sys.modules[name]
    sys.meta_path.insert(0, Forbid())
    import build_engines
    assert build_engines.main(["--bundle", bundle, "--rows", "2"]) == 0
    from engine import doctor
    print("\\n".join(doctor.diagnose(__import__("pathlib").Path(bundle))))
"""


def test_plans_need_numpy_tensorrt_and_cuda_alone(bundle, version):
    done = subprocess.run(
        [sys.executable, "-c", BARE, str(ROOT), str(bundle), version], capture_output=True, text=True, cwd=bundle.parent
    )
    assert done.returncode == 0, done.stderr
    assert "denoiser: not compared (onnxruntime is not installed), " in done.stdout
    assert "tensorrt on GPU 0: usable" in done.stdout


def test_a_library_that_is_missing_is_named(bundle):
    with pytest.raises(BackendError, match=r"TensorRT cannot be imported .*python -m pip install 'tensorrt>="):
        said(bundle)
