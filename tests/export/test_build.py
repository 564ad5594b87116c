"""Building: what is rebuilt, what is kept, and that nothing is lost on the way."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from filelock import FileLock

from engine import Bundle, Pipeline
from engine.contract import Range
from engine.family import STABLE_DIFFUSION
from engine.picture import psnr
from export import compare
from export import errors as e
from export.build import build, default_shapes
from export.graphs.tracing import OPSET
from export.sources.checkpoint import DiffusersFolder

from ..families import known, without_encoder_family

SHAPES = default_shapes(64)
COMPONENTS = STABLE_DIFFUSION.names
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tiny_sources, tiny_bundles, tmp_path_factory):
    """A tiny model and a folder with its bundle, both to be changed by copies only."""
    engines = tmp_path_factory.mktemp("build")
    shutil.copytree(tiny_bundles["sd1"], engines / "sd1")
    return tiny_sources["sd1"], engines


@pytest.fixture
def copied(built, tmp_path):
    source, engines = built
    shutil.copytree(engines / "sd1", tmp_path / "engines" / "sd1")
    return DiffusersFolder(shutil.copytree(source.folder, tmp_path / "sd1"), "sd1", source.origin), tmp_path / "engines"


def stamps(folder):
    return {file.name: file.stat().st_mtime_ns for file in sorted((folder / "sd1" / "onnx").iterdir())}


def test_the_manifest_tells_all(built):
    _, engines = built
    manifest = json.loads((engines / "sd1" / "manifest.json").read_text())
    assert manifest["verification"]["done"]
    assert set(manifest["verification"]["components"]) == set(COMPONENTS)
    assert all(found["relative_rms"] < 1e-4 for found in manifest["verification"]["components"].values())
    picture = manifest["verification"]["picture"]
    assert (picture["latents_max_abs"] < 1e-3, picture["pixels_within_1"] >= 0.999) == (True, True)
    assert {d["opset"] for d in manifest["components"].values()} == {OPSET}
    assert (engines / "sd1" / "verification.png").is_file()


def test_the_graphs_keep_the_contract(built):
    _, engines = built
    for component, path in Bundle.open(engines / "sd1").graphs.items():
        onnx.checker.check_model(str(path))
        graph = onnx.load(str(path), load_external_data=False)
        assert [i.name for i in graph.graph.input] == list(STABLE_DIFFUSION[component].input_names)
        assert [o.name for o in graph.graph.output] == list(STABLE_DIFFUSION[component].output_names)
        assert {o.domain: o.version for o in graph.opset_import}[""] == OPSET
    shapes = {
        i.name: [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim]
        for i in onnx.load(str(engines / "sd1" / "onnx" / "denoiser.onnx"), load_external_data=False).graph.input
    }
    assert shapes == {
        "state": ["batch", 5, 4, "height", "width"],
        "row_sample": ["rows"],
        "context": ["rows", "tokens", 32],
        "timestep": ["batch"],
        "mixing": ["batch", "rows"],
        "rescale": ["batch", "rows"],
        "update": ["batch", 5, 7],
        "blend": ["batch", 2],
        "noise": ["batch", 4, "height", "width"],
        "mask": ["batch", 1, "height", "width"],
        "original": ["batch", 4, "height", "width"],
        "start_noise": ["batch", 4, "height", "width"],
    }


def test_a_second_build_does_nothing(copied):
    source, engines = copied
    before, said = stamps(engines), []
    outcome = build(source, engines, "fp32", SHAPES, report=said.append)
    assert outcome.exported == ()
    assert stamps(engines) == before
    assert said == [f"{engines / 'sd1'} is up to date"]


@pytest.mark.slow
def test_other_shapes_trace_nothing_again(copied):
    source, engines = copied
    before = stamps(engines)
    outcome = build(source, engines, "fp32", replace(SHAPES, height=Range(64, 64, 64), batch=Range(1, 2, 2)))
    assert outcome.exported == ()
    assert stamps(engines) == before
    assert Bundle.open(engines / "sd1").shapes.height == Range(64, 64, 64)


@pytest.mark.slow
def test_a_changed_text_encoder_leaves_the_other_graphs(copied):
    """It is traced in a fifth of the VAE's time; test_reuse.py changes the VAE."""
    source, engines = copied
    before = stamps(engines)
    encoder = source.text_encoder()
    with torch.no_grad():
        next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm")).bias += 0.1
    encoder.save_pretrained(source.folder / "text_encoder")
    outcome = build(source, engines, "fp32", SHAPES)
    after = stamps(engines)
    assert outcome.exported == ("text_encoder",)
    graphs = {f"{c}.onnx{x}" for c in ("denoiser", "vae_decoder", "vae_encoder") for x in ("", ".data")}
    assert {name for name in after if after[name] == before[name]} == graphs | {"denoiser.onnx.weights.json"}
    assert set(outcome.manifest["verification"]["components"]) == set(COMPONENTS)


@pytest.mark.slow
def test_a_changed_scheduler_changes_the_manifest_only(copied):
    source, engines = copied
    file = source.folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "timestep_spacing": "trailing"}))
    assert build(source, engines, "fp32", SHAPES).exported == ()
    assert Bundle.open(engines / "sd1").scheduler["timestep_spacing"] == "trailing"


def test_a_damaged_bundle_is_built_again(copied):
    source, engines = copied
    (engines / "sd1" / "onnx" / "vae_encoder.onnx.data").write_bytes(b"x")
    said = []
    assert build(source, engines, "fp32", SHAPES, report=said.append, verify=False).exported == COMPONENTS
    assert "the old bundle is not usable" in said[0]
    manifest = Bundle.open(engines / "sd1").manifest
    assert manifest["verification"] == {"done": False, "reason": "--no-verify", "components": {}}


def test_fp16_weights_and_fp32_norms(tiny_fp16):
    graph = onnx.load(str(tiny_fp16 / "onnx" / "denoiser.onnx"))
    types = {i.name: i.data_type for i in graph.graph.initializer}
    weights = {name: kind for name, kind in types.items() if name.endswith("weight")}
    halves = {name for name, kind in weights.items() if kind == onnx.TensorProto.FLOAT16}
    assert any("conv_in" in name for name in halves)
    assert any("to_q" in name for name in weights if name in halves) or len(halves) > 10
    assert not any("norm" in name or "time_embedding" in name for name in halves)
    assert {i.type.tensor_type.elem_type for i in graph.graph.input} == {onnx.TensorProto.FLOAT, onnx.TensorProto.INT32}
    assert 0 < Bundle.open(tiny_fp16).manifest["verification"]["components"]["denoiser"]["relative_rms"] < 5e-3
    with Pipeline.load(tiny_fp16) as pipeline:
        assert len(pipeline("a ring", num_inference_steps=2, seed=0).images) == 1


@pytest.mark.slow
def test_opset_23_has_attention_as_one_operator_and_the_same_picture(wide_source, tmp_path):
    outcome = build(wide_source, tmp_path, "fp16", default_shapes(64), opset=23)
    assert outcome.manifest["verification"]["picture"]["psnr_db"] > 30
    operators = {
        component: [
            node.op_type
            for node in onnx.load(
                str(outcome.folder / "onnx" / f"{component}.onnx"), load_external_data=False
            ).graph.node
        ]
        for component in COMPONENTS
    }
    assert {component: names.count("Attention") for component, names in operators.items()} == {
        "text_encoder": 2,
        "denoiser": 8,
        "vae_decoder": 0,
        "vae_encoder": 0,
    }
    assert "Softmax" not in operators["denoiser"]
    pictures = [picture_of(outcome.folder, backend) for backend in ("onnxruntime", "openvino")]
    assert psnr(*pictures) > 50


def picture_of(folder, backend):
    with Pipeline.load(folder, backend=backend) as pipeline:
        return np.asarray(pipeline("a ring", num_inference_steps=5, seed=0).images[0])


@pytest.mark.slow
def test_a_bf16_bundle_makes_the_picture_on_openvino(tiny_sources, tiny_bundles, tmp_path):
    family = without_encoder_family()
    with known(family):
        halved = build(tiny_sources["sd1"], tmp_path, "bf16", default_shapes(64), verify=False, family=family).folder
        made = picture_of(halved, "openvino")
    assert psnr(made, picture_of(tiny_bundles["sd1"], "onnxruntime")) > 35


def test_bf16_is_refused_where_it_cannot_be_verified(built, tmp_path):
    source, _ = built
    with pytest.raises(e.UsageError, match="no bf16 kernels"):
        build(source, tmp_path, "bf16", SHAPES)


@pytest.mark.slow
def test_beyond_tolerance_the_build_fails_and_the_old_bundle_stays(copied, monkeypatch):
    source, engines = copied
    before = stamps(engines)
    monkeypatch.setitem(compare.COMPONENT_TOLERANCE, "fp32", 0.0)
    with pytest.raises(e.VerificationError, match=r"differs from torch by .* --no-verify to keep it anyway"):
        build(source, engines, "fp32", SHAPES, force=True)
    monkeypatch.undo()
    monkeypatch.setitem(compare.PICTURE_TOLERANCE, "fp32", 100.0)
    with pytest.raises(e.VerificationError, match=r"the picture differs from diffusers': PSNR"):
        build(source, engines, "fp32", replace(SHAPES, batch=Range(1, 1, 1)))
    assert stamps(engines) == before
    assert set(os.listdir(engines)) <= {"sd1", ".sd1.lock"}


def test_a_second_builder_waits_for_the_first(copied):
    source, engines = copied
    said = []
    lock = FileLock(engines / ".sd1.lock")
    with lock:
        other = threading.Thread(target=lambda: build(source, engines, "fp32", SHAPES, report=said.append))
        other.start()
        time.sleep(0.5)
        assert said == [f"waiting for another builder of {engines / 'sd1'}"]
    other.join(timeout=60)
    assert said == [f"waiting for another builder of {engines / 'sd1'}", f"{engines / 'sd1'} is up to date"]


def run_builder(source, engines, *more):
    command = [
        sys.executable,
        str(ROOT / "build_engines.py"),
        str(source.folder),
        "--output",
        str(engines),
        "--no-verify",
        *more,
    ]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def at(moment, builder, engines):
    """Waits until the builder has made that file or folder."""
    while not (engines / ".sd1.building" / moment).exists():
        assert builder.poll() is None, "the builder ended before it could be killed"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_builder_leaves_the_old_bundle(copied, tmp_path):
    """At two moments. What a kill at the first would leave is copied while the builder is stopped."""
    source, engines = copied
    builder = run_builder(source, engines, "--force")
    at("onnx", builder, engines)
    builder.send_signal(signal.SIGSTOP)
    at_first = shutil.copytree(engines, tmp_path / "at first")
    builder.send_signal(signal.SIGCONT)
    at("onnx/text_encoder.onnx.data", builder, engines)
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    for left in (at_first, engines):
        assert (left / ".sd1.building").exists()
        Bundle.open(left / "sd1")
        assert build(source, left, "fp32", SHAPES).exported == ()
        assert set(os.listdir(left)) <= {"sd1", ".sd1.lock"}


def test_a_kill_between_the_two_renames_is_mended(copied):
    source, engines = copied
    (engines / "sd1").rename(engines / ".sd1.replaced")
    assert build(source, engines, "fp32", SHAPES).exported == ()
    Bundle.open(engines / "sd1")


def test_an_output_that_is_a_file_is_named(built, tmp_path):
    (tmp_path / "engines").write_text("x")
    with pytest.raises(e.OutputError, match=r"engines/sd1 cannot be made \(File exists\)"):
        build(built[0], tmp_path / "engines", "fp32", SHAPES)


def test_too_little_disk_is_found_before_tracing(built, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(e.OutputError, match=r"has 1\.0 kB free; the next component needs"):
        build(built[0], tmp_path, "fp32", SHAPES)
    assert not (tmp_path / "sd1").exists()


@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="mounting a small file system needs root on Linux"
)
def test_a_full_disk_leaves_nothing_half_written(built, tmp_path):
    source, _ = built
    small = tmp_path / "small"
    small.mkdir()
    if ctypes.CDLL(None, use_errno=True).mount(b"tmpfs", str(small).encode(), b"tmpfs", 0, b"size=1200k"):
        pytest.skip("mount is not allowed here")
    try:
        with pytest.raises(e.OutputError, match=r"the disk of .* is full|B free"):
            build(source, small, "fp32", SHAPES, verify=False)
        assert set(os.listdir(small)) <= {".sd1.lock"}
    finally:
        ctypes.CDLL(None).umount(str(small).encode())


def test_picture_and_psnr_numbers():
    import numpy as np

    a = np.zeros((8, 8, 3), np.uint8)
    assert psnr(a, a) == 99.0
    assert psnr(a, a + 1) == pytest.approx(48.13, abs=0.01)
    assert compare.difference(np.array([1.0, 2.0]), np.array([1.0, 1.0])).max_abs == 1.0
