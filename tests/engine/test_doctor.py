"""The doctor tells what is here and what is not, with what to run."""
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine.__main__ import main
from engine.doctor import diagnose
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
    done = subprocess.run([sys.executable, "-c", ALONE, str(demo_bundle.parent)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "TensorRT: not installed; pip install latentrt[tensorrt]" in done.stdout
    assert "ONNX Runtime: not installed; pip install latentrt[cpu]" in done.stdout
    assert f"{demo_bundle}: demo, fp32, height x width 32:64:128 x 32:64:128, batch 1:1:8" in done.stdout
    assert "onnxruntime: not usable: not installed" in done.stdout


def test_on_a_gpu_it_names_gpu_driver_and_plans(planned):
    bundle = planned("10.16.1")
    with fakes.install("10.16.1") as machine:
        told = report(bundle)
        assert machine.cuda.live() == {}
    assert "CUDA: GPU 0 is NVIDIA H200, compute capability 9.0, 8.0 of 8.0 GiB free; the driver supports CUDA " in told
    assert "TensorRT: 10.16.1" in told
    assert "tensorrt on GPU 0: usable, height x width 64 x 64, batch 1, 2 U-Net rows; 32:64:96 x 32:64:96, batch 1:2:4, 1:4:8 U-Net rows" in told


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
    for options, words in (({"devices": []}, "CUDA does not start"), ({"driver": False}, "there is no NVIDIA driver here")):
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


@pytest.mark.parametrize("content", [None, ""])
def test_no_bundles(tmp_path, content, capsys):
    assert main(["doctor", "--bundles", str(tmp_path / "nowhere" if content is None else tmp_path)]) == 0
    assert "bundles: none in" in capsys.readouterr().out
