"""A build for OpenVINO measures where bfloat16 is right, and writes it down."""

import shutil
import sys

import pytest

import build_engines
from engine import Pipeline
from engine.backends.openvino.backend import OpenVinoBackend
from export import compare
from export import openvino as to_openvino
from export.build import build, default_shapes
from export.errors import VerificationError

pytest.importorskip("openvino")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def output(tiny_bundles, tmp_path_factory):
    """A copy of a bundle, to be measured without exporting it again."""
    folder = tmp_path_factory.mktemp("engines")
    shutil.copytree(tiny_bundles["sd1"], folder / "sd1")
    return folder


def measure(source, output):
    return build(source, output, "fp32", default_shapes(64), openvino=True, report=lambda message: None)


def test_a_build_for_openvino_measures_an_unchanged_bundle_once(tiny_sources, output):
    made = measure(tiny_sources["sd1"], output)
    assert made.exported == ()
    entry = made.manifest["openvino"]
    assert entry["library"].startswith("OpenVINO 20")
    assert set(entry["precision"].values()) <= {"fp32", "bf16"}
    for component, precision in entry["precision"].items():
        assert entry["components"][component]["fp32"]["relative_rms"] < 2e-3
        assert precision == "fp32" or component != "text_encoder"
        assert precision == "fp32" or entry["components"][component]["bf16"]["relative_rms"] < 4e-2
    assert entry["picture"]["psnr_db"] >= 35
    with Pipeline.load(output / "sd1", backend="openvino") as pipeline:
        assert pipeline._backend.precision == entry["precision"]
    assert measure(tiny_sources["sd1"], output).manifest == made.manifest


def test_bfloat16_leaves_the_component_whose_picture_is_worst(tiny_sources, output, monkeypatch):
    if not OpenVinoBackend({}).has_bf16():
        pytest.skip("this CPU has no bf16 instructions")
    bundle = to_openvino.Bundle.open(output / "sd1", verify=False)
    monkeypatch.setattr(to_openvino, "PICTURE_PSNR", 98.5)  # equal pictures only
    precision = {name: "bf16" if bundle.family[name].halves else "fp32" for name in bundle.graphs}
    found = to_openvino._check_pictures(bundle, precision, 2, [0])
    assert found["psnr_db"] == 99.0
    worst = min(found["psnr_db_of_each_alone"], key=found["psnr_db_of_each_alone"].get)
    assert precision[worst] == "fp32"


def test_a_component_that_is_wrong_in_float32_fails_the_build(tiny_sources, output, monkeypatch):
    monkeypatch.setitem(compare.COMPONENT_TOLERANCE, "fp32", 0.0)
    before = (output / "sd1" / "manifest.json").read_bytes()
    with pytest.raises(VerificationError, match="text_encoder differs from torch"):
        build(tiny_sources["sd1"], output, "fp32", default_shapes(128), openvino=True, report=lambda message: None)
    assert (output / "sd1" / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [(["--no-verify"], 2, "does not go with --no-verify"), ([], 1, "python -m pip install 'openvino>=2025.2'")],
)
def test_mistakes_are_found_before_anything_is_exported(options, code, words, tmp_path, capsys, monkeypatch):
    if not options:
        monkeypatch.setitem(sys.modules, "openvino", None)
    assert build_engines.main(["--backend", "openvino", "--output", str(tmp_path), *options]) == code
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
