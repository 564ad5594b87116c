"""The manifest is written and read by one schema."""

import json
from dataclasses import replace

import pytest

from engine.errors import ManifestError
from engine.manifest import Manifest, Verification, read, write


@pytest.fixture
def manifest(tiny_bundles):
    return Manifest.of(read(tiny_bundles["sd1"]))


def test_what_is_written_is_read(manifest, tmp_path):
    content = write(tmp_path, manifest)
    assert json.loads((tmp_path / "manifest.json").read_text()) == content
    assert Manifest.of(read(tmp_path)) == manifest
    assert [file.name for file in tmp_path.iterdir()] == ["manifest.json"]


def test_fields_without_a_value_are_left_out(manifest):
    content = replace(manifest, openvino=None, verification=Verification(False, "--no-verify")).content()
    assert "openvino" not in content
    assert content["verification"] == {"done": False, "reason": "--no-verify", "components": {}}


def test_a_manifest_that_could_not_be_read_is_not_written(manifest, tmp_path):
    with pytest.raises(ManifestError, match="precision is \"fp8\"; it must be one of 'fp32', 'fp16', 'bf16'"):
        write(tmp_path, replace(manifest, precision="fp8"))
    assert not list(tmp_path.iterdir())


def test_a_component_that_no_picture_needs_may_be_absent(manifest):
    some = {name: graph for name, graph in manifest.components.items() if name != "vae_encoder"}
    assert set(Manifest.of(replace(manifest, components=some).content()).components) == set(some)


@pytest.mark.parametrize("name", ["text_encoder", "denoiser", "vae_decoder"])
def test_a_component_that_every_picture_needs_may_not(manifest, name):
    some = {other: graph for other, graph in manifest.components.items() if other != name}
    with pytest.raises(ManifestError, match=f"components.{name} is missing"):
        Manifest.of(replace(manifest, components=some).content())


def test_a_component_that_the_family_lacks_is_refused(manifest):
    content = manifest.content()
    content["components"]["upscaler"] = content["components"]["denoiser"]
    with pytest.raises(ManifestError, match="it must be about text_encoder, denoiser, vae_decoder, vae_encoder only"):
        Manifest.of(content)
