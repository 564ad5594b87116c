"""A remedy in an error is a command to paste. It is taken out of the message and run; what failed works then."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import build_engines
from engine import EngineError, Pipeline
from engine.commands import builder
from export.sources.checkpoint import resolve
from tests import fakes
from tests.conftest import copy_bundle

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
FAST = {"num_inference_steps": 1, "seed": 0, "progress": False}


def command_in(message: str) -> str:
    """The builder's command, which ends where the sentence does."""
    return re.split(r", or |; |\. |\.$", message[message.index(builder()) :])[0]


def remedy_of(action) -> str:
    with pytest.raises(EngineError) as raised:
        action()
    return command_in(str(raised.value))


def run(command: str) -> None:
    """Runs the command without the comparison with diffusers, which is not the remedy and takes half of the time."""
    words = shlex.split(command)
    assert build_engines.main([*words[len(shlex.split(builder())) :], "--quiet", "--no-verify"]) == 0


def draw(bundle: Path, backend: str = "onnxruntime", **options) -> None:
    with Pipeline.load(bundle, backend=backend) as pipeline:
        assert pipeline("a ring", **FAST, **options).images


def moved(bundle: Path, model: Path, folder: Path, edit_manifest) -> Path:
    """A copy of a bundle that knows where its model lies. Its folder's name has to be quoted."""
    copied = copy_bundle(bundle, folder / "it's here")
    known = json.loads((copied / "manifest.json").read_text())["source"]
    edit_manifest(copied, source={**known, **resolve(str(model)).origin})
    return copied


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def bundle(tiny_sources, tiny_bundles, tmp_path, edit_manifest):
    return moved(tiny_bundles["sd1"], tiny_sources["sd1"].folder, tmp_path, edit_manifest)


@pytest.fixture
def halved(tiny_sources, tiny_fp16, tmp_path, edit_manifest):
    """In half precision, for plans of the fake TensorRT."""
    with fakes.install("10.16.1"):
        yield moved(tiny_fp16, tiny_sources["sd1"].folder, tmp_path, edit_manifest)


@pytest.mark.parametrize("options", [{"width": 136}, {"num_images_per_prompt": 9}], ids=str)
def test_a_bundle_is_built_for_a_size_that_it_lacked(bundle, options):
    run(remedy_of(lambda: draw(bundle, **options)))
    draw(bundle, **options)


def test_the_command_can_be_pasted_into_a_shell(bundle):
    """For a height that the bundle lacked."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    command = remedy_of(lambda: draw(bundle, height=136))
    done = subprocess.run(
        command, shell=True, cwd=ROOT, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    draw(bundle, height=136)


def shorten(bundle):
    (bundle / "onnx" / "denoiser.onnx.data").write_bytes(b"x")


def lose_a_graph(bundle):
    (bundle / "onnx" / "text_encoder.onnx").unlink()


def lose_the_tokenizer(bundle):
    shutil.rmtree(bundle / "tokenizer")


@pytest.mark.parametrize("damage", [shorten, lose_a_graph, lose_the_tokenizer])
def test_a_damaged_bundle_is_built_again(bundle, damage):
    damage(bundle)
    run(remedy_of(lambda: draw(bundle)))
    draw(bundle)


def lose_plans(bundle):
    shutil.rmtree(bundle / "plans")


def shorten_a_plan(bundle):
    next(bundle.glob("plans/*/denoiser.plan")).write_bytes(b"x")


def garble_the_record(bundle):
    next(bundle.glob("plans/*/build.json")).write_text("{")


@pytest.mark.parametrize("damage", [lose_plans, shorten_a_plan, garble_the_record])
def test_plans_that_are_missing_or_damaged_are_built_again(halved, damage):
    assert build_engines.main(["--bundle", str(halved), "--no-verify", "--quiet"]) == 0
    draw(halved, "tensorrt")
    damage(halved)
    run(remedy_of(lambda: draw(halved, "tensorrt")))
    draw(halved, "tensorrt")


@pytest.mark.parametrize("options", [{"height": 96}, {"num_images_per_prompt": 2}], ids=str)
def test_plans_are_built_for_a_size_that_they_lacked(halved, options):
    assert build_engines.main(["--bundle", str(halved), "--no-verify", "--quiet"]) == 0
    run(remedy_of(lambda: draw(halved, "tensorrt", **options)))
    draw(halved, "tensorrt", **options)
