"""A graph is traced once for all bundles in a folder."""

import json
import shutil

import pytest
import torch

from engine import Bundle
from export import component as tracing
from export.build import build, default_shapes
from export.errors import ToOnnxError
from export.sources.checkpoint import DiffusersFolder

from ..conftest import copy_bundle

pytestmark = pytest.mark.slow

SHAPES = default_shapes(64)


class Counting(DiffusersFolder):
    """Notes which parts are loaded."""

    def load(self, part):
        self.loaded = [*getattr(self, "loaded", []), part]
        return super().load(part)


@pytest.fixture
def engines(tiny_bundles, tmp_path):
    """A folder with one bundle."""
    return copy_bundle(tiny_bundles["sd1"], tmp_path / "engines").parent


@pytest.fixture
def other(tiny_sources):
    """The same model by another name."""
    return Counting(tiny_sources["sd1"].folder, "other", tiny_sources["sd1"].origin)


@pytest.fixture
def traced(monkeypatch):
    """The components that are traced. None is: the first ends the build."""
    names = []

    def stop(component, *arguments):
        names.append(component.name)
        raise ToOnnxError("nothing is traced in this test")

    monkeypatch.setattr(tracing, "export_onnx", stop)
    return names


def start(source, engines, precision="fp32", **options):
    """Builds until something is traced: what is reported."""
    lines = []
    with pytest.raises(ToOnnxError):
        build(source, engines, precision, SHAPES, verify=False, report=lines.append, **options)
    return lines


def test_the_graphs_of_another_bundle_are_not_traced_again(other, engines, traced):
    lines = []
    outcome = build(other, engines, "fp32", SHAPES, report=lines.append)
    assert (outcome.exported, traced) == ((), [])
    assert f"[4/4] denoiser: the same as in {engines / 'sd1'}" in lines
    first, second = Bundle.open(engines / "sd1"), Bundle.open(engines / "other")
    assert second.contents.components == first.contents.components
    assert second.contents.verification.components == first.contents.verification.components
    assert second.contents.verification.done
    for name in first.graphs:
        assert first.graphs[name].read_bytes() == second.graphs[name].read_bytes()
        assert second.graphs[name].stat().st_nlink == 1


def test_every_model_is_made_once_a_build(other, engines, traced):
    """Though it is checked, makes diffusers' pictures and is compared with its graph."""
    file = engines / "sd1" / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "verification": {"done": False, "reason": "x", "components": {}}}))
    outcome = build(other, engines, "fp32", SHAPES, report=lambda message: None)
    assert sorted(other.loaded) == ["text_encoder", "unet", "vae"]
    checks = outcome.manifest["verification"]["components"]
    assert all(found["relative_rms"] < 1e-4 for found in checks.values())
    assert set(checks) == {"text_encoder", "denoiser", "vae_decoder", "vae_encoder"}


def test_other_weights_are_traced(tiny_sources, engines, traced, tmp_path):
    source = DiffusersFolder(
        shutil.copytree(tiny_sources["sd1"].folder, tmp_path / "other"), "other", {"kind": "folder", "id": "other"}
    )
    vae = source.vae()
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.1
    vae.save_pretrained(source.folder / "vae")
    lines = start(source, engines)
    assert traced == ["vae_decoder"]
    assert lines[0] == f"[1/4] text_encoder: the same as in {engines / 'sd1'}"


@pytest.mark.parametrize(("precision", "options"), [("fp16", {}), ("fp32", {"opset": 23}), ("fp32", {"force": True})])
def test_another_precision_is_traced_and_so_is_all_with_force(other, engines, traced, precision, options):
    start(other, engines, precision, **options)
    assert traced == ["text_encoder"]


def test_a_damaged_bundle_gives_nothing(other, engines, traced):
    file = engines / "sd1" / "onnx" / "vae_decoder.onnx.data"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)
    lines = start(other, engines)
    assert traced == ["vae_decoder"]
    assert len([line for line in lines if "the same as in" in line]) == 1


def test_a_linked_file_gives_nothing(other, engines, traced, tmp_path):
    file = engines / "sd1" / "onnx" / "text_encoder.onnx"
    shutil.move(file, tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    start(other, engines)
    assert traced == ["text_encoder"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 4}', '{"format": 4, "components": [], "files": 1}'])
def test_what_is_no_bundle_is_ignored(other, engines, traced, content):
    (engines / "a").mkdir()
    (engines / "a" / "manifest.json").write_text(content)
    (engines / "b").write_text("a file")
    assert build(other, engines, "fp32", SHAPES, verify=False, report=lambda message: None).exported == ()
