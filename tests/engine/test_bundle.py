"""An invalid bundle is refused before anything of it is used, with the fault and the cure."""

import json
import os
import shutil

import pytest

from engine import Bundle, Pipeline
from engine.bundle import FORMAT
from engine.errors import (
    BackendError,
    BundleError,
    BundleNotFoundError,
    HashMismatchError,
    ManifestError,
    ManifestVersionError,
    MissingFileError,
    UnsafePathError,
)


@pytest.fixture
def bundle(tiny_bundles, tmp_path):
    """A copy to damage."""
    return shutil.copytree(tiny_bundles["sd1"], tmp_path / "engines" / "sd1")


def test_a_good_bundle_opens(bundle):
    opened = Bundle.open(bundle)
    assert opened.name == "sd1"
    assert opened.precision == "fp32"
    assert str(opened.shapes.height) == "32:64:128"
    assert all(path.is_file() for path in opened.graphs.values())


def test_no_bundle_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(
        BundleNotFoundError, match=r"there is no bundle at .*nowhere; build it again: python build_engines.py"
    ):
        Pipeline.load(tmp_path / "nowhere")


def test_half_a_bundle_is_not_a_bundle(bundle):
    (bundle / "manifest.json").unlink()
    with pytest.raises(BundleNotFoundError, match="not a finished bundle"):
        Bundle.open(bundle)


@pytest.mark.parametrize("content", ["", "{", "[1]", "\udcff"])
def test_a_garbled_manifest_is_refused(bundle, content):
    (bundle / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ManifestError, match=r"manifest\.json .*(not readable|not an object)"):
        Bundle.open(bundle)


def test_a_manifest_of_a_newer_version_says_so(bundle, edit_manifest):
    edit_manifest(bundle, format=FORMAT + 1)
    words = rf"format {FORMAT + 1}, which is newer than this version reads \({FORMAT}\); update LatentRT"
    with pytest.raises(ManifestVersionError, match=words):
        Bundle.open(bundle)


@pytest.mark.parametrize(
    "key", ["components", "family", "shapes", "scheduler", "tokenizer", "files", "precision", "name"]
)
def test_a_manifest_that_lacks_something_names_it(bundle, key):
    file = bundle / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest[key]
    file.write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match=key):
        Bundle.open(bundle)


def test_a_graph_without_a_hash_is_refused(bundle, edit_manifest):
    manifest = json.loads((bundle / "manifest.json").read_text())
    del manifest["files"]["onnx/denoiser.onnx"]
    edit_manifest(bundle, files=manifest["files"])
    with pytest.raises(
        ManifestError, match=r"no SHA-256 for 'onnx/denoiser\.onnx', which is used; build it again: python"
    ):
        Bundle.open(bundle)


def test_a_missing_file_is_named(bundle):
    (bundle / "onnx" / "denoiser.onnx.data").unlink()
    with pytest.raises(MissingFileError, match=r"denoiser\.onnx\.data is missing"):
        Bundle.open(bundle)


def test_a_changed_byte_is_found(bundle):
    file = bundle / "onnx" / "denoiser.onnx.data"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.unlink()  # the original may be the same inode
    file.write_bytes(content)
    with pytest.raises(HashMismatchError, match=r"denoiser\.onnx\.data has SHA-256"):
        Bundle.open(bundle)
    Bundle.open(bundle, verify=False)


def test_a_file_cut_short_is_found_without_hashing(bundle):
    file = bundle / "onnx" / "denoiser.onnx.data"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:-10])
    with pytest.raises(HashMismatchError, match="bytes instead of"):
        Bundle.open(bundle, verify=False)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "onnx/../../outside", "C:\\windows", ""])
def test_a_path_out_of_the_bundle_is_refused(bundle, edit_manifest, name):
    (bundle.parent / "outside").write_text("x")
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    edit_manifest(bundle, files={**files, name: {"sha256": "0", "bytes": 1}})
    with pytest.raises(UnsafePathError, match="not a plain path inside the bundle"):
        Bundle.open(bundle)


@pytest.mark.skipif(not hasattr(os, "symlink"), reason="no symbolic links here")
def test_a_symbolic_link_is_refused(bundle):
    file = bundle / "onnx" / "denoiser.onnx.data"
    shutil.move(file, bundle.parent / "elsewhere")
    file.symlink_to(bundle.parent / "elsewhere")
    with pytest.raises(UnsafePathError, match="symbolic link"):
        Bundle.open(bundle)


@pytest.mark.slow
def test_a_tokenizer_that_is_none_is_named(bundle, edit_manifest):
    (bundle / "tokenizer" / "tokenizer.json").write_text("{}")
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    files["tokenizer/tokenizer.json"]["bytes"] = 2
    edit_manifest(bundle, files=files)
    with pytest.raises(ManifestError, match="is not a tokenizer"):
        Pipeline.load(bundle, verify=False)


@pytest.mark.slow
def test_a_graph_that_onnxruntime_does_not_load_is_named(bundle, edit_manifest):
    (bundle / "onnx" / "text_encoder.onnx").unlink()
    (bundle / "onnx" / "text_encoder.onnx").write_bytes(b"not a graph")
    files = json.loads((bundle / "manifest.json").read_text())["files"]
    files["onnx/text_encoder.onnx"]["bytes"] = 11
    edit_manifest(bundle, files=files)
    with pytest.raises(BackendError, match=r"does not load .*text_encoder\.onnx"):
        Pipeline.load(bundle, verify=False)("a ring", num_inference_steps=1)


def test_every_bundle_error_is_the_users_to_mend():
    assert all(error.exit_code == 2 for error in BundleError.__subclasses__())
