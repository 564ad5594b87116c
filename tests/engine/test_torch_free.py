"""The runtime loads no torch, diffusers, transformers or onnx: in a process that forbids them, and where they are not
installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engine import Bundle
from tests.conftest import begun_bundle, copy_bundle

ROOT = Path(__file__).parents[2]
FORBIDDEN = ("torch", "diffusers", "transformers", "onnx", "safetensors", "huggingface_hub", "export")
SCRIPT = f"""
import sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {FORBIDDEN!r}:
            raise ImportError("forbidden: " + name)
sys.meta_path.insert(0, Forbid())
from engine import Pipeline
result = Pipeline.load(sys.argv[1])("a large red circle on a blue background", num_inference_steps=2, seed=0)
result.images[0].save(sys.argv[2])
loaded = [name for name in {FORBIDDEN!r} if name in sys.modules]
assert not loaded, loaded
"""


@pytest.mark.slow
def test_a_whole_picture_with_torch_forbidden(demo_bundle, tmp_path):
    subprocess.run([sys.executable, "-c", SCRIPT, str(demo_bundle), str(tmp_path / "a.png")], check=True, cwd=ROOT)
    assert (tmp_path / "a.png").stat().st_size > 100


def environment(folder: Path, python: str | Path, *packages: str | Path) -> Path:
    """The Python of a new virtual environment with these packages. Our own pip fills it and compiles nothing: with a
    pip of its own and the bytecode of everything it would take four times as long."""
    subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
    made = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    install = [sys.executable, "-m", "pip", "--python", made, "install", "--quiet", "--no-compile", *packages]
    subprocess.run(install, check=True, env=OUTSIDE)
    return made


OUTSIDE = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
"""The environment variables without PYTHONPATH, which may name a checkout."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)],
        check=True,
    )
    return next(folder.glob("latentrt-*.whl"))


@pytest.mark.slow
def test_a_virtual_environment_without_torch_makes_a_picture(demo_bundle, wheel, tmp_path):
    python = environment(tmp_path / "venv", sys.executable, "--constraint", ROOT / "constraints.txt", f"{wheel}[cpu]")
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "list", "--format", "json"],
        capture_output=True,
        text=True,
        check=True,
        env=OUTSIDE,
    ).stdout
    installed = {package["name"].lower() for package in json.loads(listing)}
    assert not installed & {"torch", "diffusers", "transformers", "onnx", "safetensors"}
    command = [python, "-m", "engine", "picture", "a ring", "--bundle", demo_bundle, "--steps", "2", "--seed", "0"]
    subprocess.run(command, check=True, cwd=tmp_path, env=OUTSIDE)
    assert (tmp_path / "picture.png").is_file()

    built = subprocess.run([python, "-m", "build_engines"], capture_output=True, text=True, cwd=tmp_path, env=OUTSIDE)
    assert built.returncode == 1
    assert "lacks what building needs; install it: python -m pip install 'torch>=2.9'" in built.stderr
    assert "Traceback" not in built.stderr


@pytest.mark.slow
def test_the_wheel_builds_the_built_in_model_outside_the_checkout(demo_bundle, wheel, tmp_path):
    begun_bundle(demo_bundle, tmp_path / "out" / "demo")
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    code = (
        "import build_engines, sys; print(build_engines.__file__); "
        "sys.exit(build_engines.main(['--output', 'out', '--no-verify']))"
    )
    inside = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=inside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout
    assert "text_encoder: exported in" in done.stdout
    assert "denoiser: unchanged" in done.stdout
    assert Bundle.open(tmp_path / "out" / "demo")


OLDEST = """
import sys
from pathlib import Path
import numpy as np
import tests.fakes as fakes
from engine import Pipeline
from engine.contract import Range, Shapes
bundle = Path(sys.argv[1])
with Pipeline.load(bundle, backend="onnxruntime") as pipeline:
    wanted = np.asarray(pipeline("a star", num_inference_steps=2, seed=0).images[0])
from export.tensorrt.build import build_plans
side, one = Range(64, 64, 64), Range(1, 1, 1)
with fakes.install("8.6.0"):
    build_plans(bundle, [Shapes(side, side, one, Range(2, 2, 2))])
    with Pipeline.load(bundle) as pipeline:
        np.testing.assert_array_equal(np.asarray(pipeline("a star", num_inference_steps=2, seed=0).images[0]), wanted)
"""


@pytest.mark.slow
def test_python_3_10_which_tensorrt_8_6_needs(demo_fp16, tmp_path):
    """The runtime and the builder of plans under the oldest Python, where one is installed."""
    found = [shutil.which("python3.10"), *Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10")]
    python = next(
        (one for one in found if one and subprocess.run([one, "-c", ""], capture_output=True).returncode == 0), None
    )
    if python is None:
        pytest.skip("no python3.10 is installed here")
    bundle = copy_bundle(demo_fp16, tmp_path)
    packages = ("numpy", "pillow", "tokenizers", "tqdm", "onnxruntime", "onnx")
    python = environment(tmp_path / "venv", python, *packages)
    done = subprocess.run([python, "-c", OLDEST, bundle], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_runtime_needs_four_packages():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert sorted(name.split(">")[0] for name in project["dependencies"]) == ["numpy", "pillow", "tokenizers", "tqdm"]
