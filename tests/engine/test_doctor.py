"""The doctor tells what is here and what is not, with what to run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine import doctor
from engine.__main__ import main
from engine.doctor import diagnose
from engine.errors import CudaError
from engine.libraries import install_command
from tests import fakes
from tests.conftest import copy_bundle

ROOT = Path(__file__).parents[2]
ALONE = """
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        first = name.split(".")[0]
        if first not in sys.stdlib_module_names | {"numpy", "engine"}:
            raise ModuleNotFoundError("No module named " + name, name=first)
sys.meta_path.insert(0, Forbid())
from engine.__main__ import main
sys.exit(main(["doctor", "--bundles", sys.argv[1]]))
"""


def report(bundles, **options):
    return "\n".join(diagnose(bundles, **options))


def test_it_needs_nothing_but_numpy(demo_bundle):
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(demo_bundle.parent)], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (1, "")  # no library, no picture
    assert f"TensorRT: not installed; {install_command('tensorrt')}\n" in done.stdout
    assert f"ONNX Runtime: not installed; {install_command('cpu')}\n" in done.stdout
    assert f"{demo_bundle}: demo, fp32, height x width 32:64:128 x 32:64:128, batch 1:1:8" in done.stdout
    assert f"  onnxruntime: not usable: not installed; {install_command('cpu')}\n" in done.stdout
    assert (
        f"  tokenizer: not usable: no picture without pillow, tokenizers, tqdm; {install_command('runtime')}\n"
        in done.stdout
    )


def test_on_a_gpu_it_names_gpu_driver_and_plans(planned):
    bundle = planned("10.16.1")
    with fakes.install("10.16.1") as machine:
        told = report(bundle)
        assert machine.cuda.live() == {}
    assert "CUDA: GPU 0 is NVIDIA H200, compute capability 9.0, 8.0 of 8.0 GiB free; the driver supports CUDA " in told
    assert "TensorRT: 10.16.1" in told
    assert (
        "tensorrt on GPU 0: usable, height x width 64 x 64, batch 1, 2 U-Net rows; 32:64:96 x 32:64:96, batch 1:2:4, "
        "1:4:8 U-Net rows" in told
    )


def test_plans_of_another_version_are_explained(planned):
    bundle = planned("10.16.1")
    with fakes.install("8.6.0"):
        told = report(bundle)
    assert "tensorrt on GPU 0: not usable: " in told
    assert "TensorRT 10.16.1 there, 8.6.0 here" in told
    assert f"python build_engines.py --backend tensorrt --bundle {bundle}" in told


def test_verify_finds_a_changed_file(planned, tmp_path):
    bundle = Path(shutil.copytree(planned("10.16.1"), tmp_path / "demo"))
    plan = next((bundle / "plans").glob("*/denoiser.plan"))
    content = bytearray(plan.read_bytes())
    content[500] ^= 1
    plan.write_bytes(content)
    with fakes.install("10.16.1"):
        assert "tensorrt on GPU 0: usable" in report(bundle)
        assert "and was not executed" in report(bundle, verify=True)


def test_a_machine_without_gpu(demo_fp16, tmp_path):
    bundle = copy_bundle(demo_fp16, tmp_path)
    for options, words in (
        ({"devices": []}, "CUDA does not start"),
        ({"driver": False}, "there is no NVIDIA driver here"),
    ):
        with fakes.install("10.16.1", **options):
            told = report(tmp_path)
        assert words in told
        assert f"{bundle}: demo, fp16" in told
        assert "onnxruntime: usable" in told
        assert "tensorrt: not usable: there is no GPU with TensorRT here" in told


def test_a_broken_bundle_is_told_with_the_remedy(demo_fp16, tmp_path):
    bundle = copy_bundle(demo_fp16, tmp_path)
    (bundle / "onnx" / "denoiser.onnx").unlink()
    told = report(tmp_path)
    assert f"{bundle}: not usable: " in told
    assert "denoiser.onnx is missing; build it again: python build_engines.py" in told


def test_the_exit_code_says_whether_every_bundle_is_usable(demo_bundle, tmp_path, capsys):
    (tmp_path / "good").symlink_to(demo_bundle)
    assert main(["doctor", "--bundles", str(tmp_path)]) == 0
    assert main(["doctor", "--bundles", str(demo_bundle)]) == 0
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text("{}")
    capsys.readouterr()
    assert main(["doctor", "--bundles", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'bad'}: not usable: " in printed
    assert f"{tmp_path / 'good'}: demo, fp32" in printed


def test_home_is_expanded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["doctor", "--bundles", "~"]) == 1
    assert (
        f"bundles: none in {tmp_path}; build one: python build_engines.py --output {tmp_path}\n"
        in capsys.readouterr().out
    )


def test_a_place_without_bundles(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    for place, words in (
        (tmp_path, f"bundles: none in {tmp_path}; build one: "),
        (tmp_path / "it's", "build one: python build_engines.py --output '"),
        (tmp_path / "it's", f"bundles: there is no folder {tmp_path}/it's; build one: "),
        (tmp_path / "file", f"bundles: {tmp_path}/file is not a folder; name one: "),
    ):
        assert words in report(place)


def test_unfinished_folders_of_a_builder_are_no_bundles_but_damaged_ones_are(demo_bundle, tmp_path):
    for name in (".demo.building", ".demo.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    (tmp_path / "damaged" / "onnx").mkdir(parents=True)
    told = report(tmp_path)
    assert ".demo." not in told
    assert f"{tmp_path / 'damaged'}: not usable: {tmp_path / 'damaged'} has no manifest.json" in told


GARBLED = {
    "no JSON": "{",
    "not UTF-8": b"\xff\xfe",
    "null": "null",
    "a list": "[]",
    "deep": "[" * 100_000,
    "many digits": '{"format": ' + "9" * 5000 + "}",
    **{
        f"{key}={value!r}": (key, value)
        for key, value in [
            ("files", None),
            ("files", {"n" * 300: {"sha256": "", "bytes": 1}}),
            ("files", {"a\0b": {}}),
            ("components", 5),
            ("components", {}),
            ("shapes", []),
            ("shapes", {"height": ["a"] * 3}),
            ("name", None),
            ("precision", []),
            ("scheduler", None),
            ("scheduler", 5),
            ("scheduler", "x"),
            ("scheduler", []),
            ("scheduler", {"_class_name": "DDIMScheduler", "beta_start": "abc"}),
            ("scheduler", {"_class_name": 5}),
            ("scheduler", {"num_train_timesteps": -5}),
            ("scheduler", {"_class_name": "DDIMScheduler", "trained_betas": ["a"]}),
            ("scheduler", {"_class_name": "DDIMScheduler", "steps_offset": "1"}),
            ("openvino", None),
            ("openvino", []),
            ("openvino", {"precision": "fp32"}),
            ("openvino", {"precision": {"denoiser": "int3"}}),
            ("tokenizer", None),
            ("tokenizer", {"file": [], "start": 1, "end": 2, "pad": 3}),
            ("tokenizer", {"file": "x", "start": 1, "end": 2, "pad": 3}),
            ("tokenizer", {"file": "tokenizer/tokenizer.json", "start": 10**12, "end": 2, "pad": 3}),
            ("tokenizer", {"file": "tokenizer/tokenizer.json", "start": 1, "end": 2, "pad": None}),
            ("verification", None),
        ]
    },
}


@pytest.mark.parametrize("kind", GARBLED)
def test_a_garbled_manifest_is_a_line_and_the_next_bundle_is_reported(demo_bundle, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(doctor, "find_gpus", lambda: ([], []))
    bundle, change = copy_bundle(demo_bundle, tmp_path), GARBLED[kind]
    (tmp_path / "next").symlink_to(demo_bundle)
    content = (
        json.dumps({**json.loads((bundle / "manifest.json").read_text()), change[0]: change[1]})
        if isinstance(change, tuple)
        else change
    )
    (bundle / "manifest.json").write_bytes(content.encode() if isinstance(content, str) else content)
    lines = report(tmp_path).splitlines()
    start, end = (
        next(i for i, line in enumerate(lines) if line.startswith(f"{tmp_path / name}: ")) for name in ("demo", "next")
    )
    told = [line for line in lines[start:end] if "not usable: " in line and not line.startswith("  tensorrt")]
    assert told or kind in ("name=None", "precision=[]", "verification=None")  # which no picture needs
    assert lines[end].startswith(f"{tmp_path / 'next'}: demo, fp32")
    assert "  onnxruntime: usable" in lines[end:]


def test_what_no_named_error_describes_ends_with_the_command_that_builds_again(demo_bundle, tmp_path, monkeypatch):
    def fail(folder, verify):
        raise KeyError("surprise")

    bundle = copy_bundle(demo_bundle, tmp_path)
    monkeypatch.setattr(doctor.Bundle, "open", fail)
    assert (
        f"{bundle}: not usable: its manifest or a file in it is damaged (KeyError: 'surprise'); build it again: "
        f"python build_engines.py --output {tmp_path}" in report(bundle)
    )


AS_ANYBODY = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []


@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root may read everything")
def test_what_may_not_be_read_is_named(demo_bundle, tmp_path):
    for name in ("closed", "folder"):
        (tmp_path / "bundles" / name).mkdir(parents=True)
    weights = copy_bundle(demo_bundle, tmp_path / "bundles") / "onnx" / "denoiser.onnx.data"
    weights.chmod(0)
    closed = tmp_path / "bundles" / "closed"
    closed.chmod(0)

    def run(place):
        command = [*AS_ANYBODY, sys.executable, "-m", "engine", "doctor", "--bundles", str(place)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    done = run(tmp_path / "bundles")
    assert (done.returncode, done.stderr) == (1, "")
    assert f"{closed}: not usable: " in done.stdout
    assert (
        f": not usable: {weights} cannot be read (Permission denied); let this user read it (chmod -R u+rX "
        f"{weights.parents[1]})" in done.stdout
    )
    (tmp_path / "bundles").chmod(0)
    done = run(tmp_path / "bundles")
    assert (
        f"bundles: {tmp_path / 'bundles'} cannot be read (Permission denied); allow it: chmod u+rx "
        f"{tmp_path / 'bundles'}\n" in done.stdout
    )
    assert "none in" not in done.stdout
    (tmp_path / "bundles").chmod(0o700)
    closed.chmod(0o700)


def test_a_scheduler_that_no_sampler_is_for(demo_bundle, tmp_path, edit_manifest):
    bundle = copy_bundle(demo_bundle, tmp_path)
    edit_manifest(bundle, scheduler={"_class_name": "VQDiffusionScheduler"})
    told = report(bundle)
    assert "  scheduler: not usable: the model's own scheduler 'VQDiffusionScheduler' is not known" in told
    assert f"; name another: python -m engine picture 'a text' --bundle {bundle} --scheduler euler\n" in told
    assert "  onnxruntime: usable" in told
    assert main(["doctor", "--bundles", str(bundle)]) == 1


def test_a_tokenizer_that_does_not_open(demo_bundle, tmp_path, edit_manifest):
    bundle = copy_bundle(demo_bundle, tmp_path)
    content = b"{}"
    (bundle / "tokenizer" / "tokenizer.json").write_bytes(content)
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    files["tokenizer/tokenizer.json"]["bytes"] = len(content)
    edit_manifest(bundle, files=files)
    assert "  tokenizer: not usable: " in report(bundle)


def test_a_library_that_does_not_load_makes_no_bundle_usable(demo_bundle, monkeypatch):
    for module in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(doctor, "installed", lambda module: module != "tensorrt")
    told = report(demo_bundle)
    assert "ONNX Runtime: does not load: import of onnxruntime halted" in told
    assert "  onnxruntime: not usable: does not load: import of onnxruntime halted" in told
    assert "  openvino: not usable: does not load: " in told


def test_a_gpu_that_does_not_answer_is_a_line(planned, monkeypatch):
    def fail(self):
        raise CudaError("reading the memory: CUDA_ERROR_UNKNOWN")

    bundle = planned("10.16.1")
    with fakes.install("10.16.1"):
        monkeypatch.setattr("engine.backends.tensorrt.cuda.Device.memory", fail)
        told = report(bundle)
    assert "CUDA: GPU 0 does not answer: reading the memory: CUDA_ERROR_UNKNOWN" in told
    assert "  onnxruntime: usable" in told


@pytest.mark.parametrize("script", ["sleep 60", "exit 9", "printf '\\377,8.0,1,1,1\\n'"])
def test_whatever_nvidia_smi_does(tmp_path, monkeypatch, script):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nexec {script}\n" if script != "exit 9" else "#!/bin/sh\nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(doctor, "NVIDIA_SMI_SECONDS", 0.2)
    assert len(doctor.list_gpus()) == ("377" in script)
