"""The commands as a user types them, on the built-in model with two pictures; nothing here depends on how fast a machine is."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import latency
from benchmarks.__main__ import main
from benchmarks.errors import SideError, SkippedSide
from benchmarks.machine import PRODUCTS, copy_rate, matrix_rate
from benchmarks.sides import Request, Setup, Side
from export.checkpoint import BUILT_IN

pytest.importorskip("openvino")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder that the tests below fill, and the report reads."""
    return tmp_path_factory.mktemp("results")


def measured(results, name, *arguments):
    assert main([*arguments, "--json", str(results / f"{name}.json")]) == 0
    return json.loads((results / f"{name}.json").read_text())


def test_latency_compares_with_diffusers_and_says_what_is_missing(demo_bundle, results, capsys, monkeypatch):
    monkeypatch.setattr(latency, "PATIENCE", 0.0)  # on a busy machine the test need not wait until it is quiet
    found = measured(results, "latency", "latency", "--bundle", str(demo_bundle), "--backend", "openvino,onnxruntime", "--against", "diffusers,optimum",
                     "--steps", "2", "--pictures", "2", "--plot", str(results / "bars.png"))
    one, = found["configurations"]
    assert set(one["sides"]) == {"openvino", "onnxruntime", "diffusers"}
    assert "optimum is not installed" in one["skipped"]["optimum"]
    assert "skipped optimum: optimum is not installed" in capsys.readouterr().out
    assert [ratio["psnr_db"] > 50 for ratio in one["ratios"]] == [True, True]
    turns = len(one["turns"])
    assert 2 <= turns <= 6  # on a busy machine disturbed turns are repeated, and kept where there are no others
    for side in one["sides"].values():
        assert (side["seconds"]["total"]["n"], side["seconds"]["step"]["n"], side["evaluations"]) == (turns, 2 * turns, 2)
        assert side["peak_bytes"] > 50 * 2**20
    assert not found["interrupted"]
    assert found["command"].startswith("python -m benchmarks ")
    assert {"processor", "clocks", "gpu", "versions", "commit"} <= found.keys()
    assert (results / "bars.png").stat().st_size > 1000


def test_parity_is_against_float32_diffusers(demo_bundle, results):
    found = measured(results, "parity", "parity", "--bundle", str(demo_bundle), "--backend", "openvino", "--against", "", "--steps", "2", "--pictures", "2")
    assert found["pictures"] == 2
    assert found["sides"]["openvino"]["psnr_min_db"] > 50
    assert found["sides"]["openvino"]["max_difference"] <= 1


def test_roofline_counts_the_graphs_and_measures_the_machine(demo_bundle, results):
    found = measured(results, "roofline", "roofline", "--bundle", str(demo_bundle), "--backend", "openvino,tensorrt", "--steps", "2", "--pictures", "2")
    components, picture = found["backends"]["openvino"]["components"], found["backends"]["openvino"]["picture"]
    assert picture["flop"] == pytest.approx(sum(c["flop"] * (2 if name == "denoiser" else 1) for name, c in components.items()), rel=1e-4)
    for c in (*components.values(), picture):
        assert c["reached"] == pytest.approx(c["floor"] / c["seconds"]["p50"], rel=1e-3)


def test_scaling_covers_steps_batch_and_pixels(tiny_bundles, results):
    found = measured(results, "scaling", "scaling", "--bundle", str(tiny_bundles["sd1"]), "--backend", "onnxruntime", "--steps", "2", "--pictures", "1",
                     "--rounds", "2")
    assert all(point["seconds"]["n"] == 2 for found in found["against"].values() for point in found["points"])
    assert [point["steps"] for point in found["against"]["steps"]["points"]] == [1, 2, 4]
    assert [point["batch"] for point in found["against"]["batch"]["points"]] == [1, 2, 4, 8]
    assert [point["pixels"] for point in found["against"]["pixels"]["points"]] == [32**2, 64**2, 96**2, 128**2]


def test_settings_are_measured_one_by_one(demo_bundle, results):
    found = measured(results, "settings", "settings", "--bundle", str(demo_bundle), "--runs", "1", "--turns", "1")
    settings, sampler = found["tables"]
    assert {row["library"] for row in settings} == {"onnxruntime", "openvino"}
    assert len({(row["precision"], row["setting"]) for row in settings}) == len(settings)
    assert len(sampler) == 5


def test_the_report_is_one_page_of_all_results(results):
    assert main(["report", "--results", str(results)]) == 0
    page = (results / "report.md").read_text()
    stored = sorted(file.stem for file in results.glob("*.json"))
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == stored
    for word in ("ratio, pair by pair", "worst PSNR dB", "floor ms", "MHz", "at commit", "no GPU", "openvino", "Skipped: optimum: optimum is not installed"):
        assert word in page
    for name in ("latency", "roofline", "scaling"):
        assert f"![{name}]({name}.png)" in page
        assert (results / f"{name}.png").stat().st_size > 1000


def test_the_committed_report_is_that_of_the_committed_results(tmp_path):
    folder = ROOT / "benchmarks" / "results"
    page = tmp_path / "report.md"
    assert main(["report", "--output", str(page)]) == 0
    assert page.read_text() == (folder / "report.md").read_text()


@pytest.mark.parametrize(("arguments", "code", "words"), [
    (["latency", "--bundle", "/nowhere"], 2, "there is no bundle at /nowhere"),
    (["latency", "--json", "/nowhere/a.json"], 2, "/nowhere is not a folder"),
    (["latency", "--bundle", "BUNDLE", "--against", "magic"], 2, "'magic' is not known; it must be one of tensorrt, openvino"),
    (["latency", "--bundle", "BUNDLE", "--sizes", "512"], 2, "it must be WIDTHxHEIGHT"),
    (["latency", "--bundle", "TINY"], 2, "made of the folder 'sd1'; pass where the same model lies"),
    (["latency", "--bundle", "BUNDLE", "--sizes", "500x500", "--against", ""], 2, "height 500 is not a multiple of 8"),
    *(([command, "--bundle", "BUNDLE", "--backend", "tensorrt"], 2, "there is nothing of ours to measure (tensorrt: tensorrt is not installed)")
      for command in ("latency", "parity", "roofline", "scaling")),
    (["report", "--results", "EMPTY"], 1, "holds no results"),
])
def test_mistakes_are_one_line(arguments, code, words, demo_bundle, tiny_bundles, tmp_path, capsys):
    places = {"BUNDLE": str(demo_bundle), "TINY": str(tiny_bundles["sd1"]), "EMPTY": str(tmp_path)}
    assert main([places.get(word, word) for word in arguments]) == code
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert len(said) == 1
    assert words in said[0]


@pytest.mark.parametrize(("content", "words"), [("{", "is not a result"), ('{"benchmark": "magic"}', "holds a benchmark 'magic'")])
def test_a_damaged_result_is_a_named_error(content, words, tmp_path, capsys):
    (tmp_path / "a.json").write_text(content)
    assert main(["report", "--results", str(tmp_path)]) == 1
    assert words in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured(demo_bundle, tmp_path):
    file = tmp_path / "latency.json"
    process = subprocess.Popen([sys.executable, "-m", "benchmarks", "latency", "--bundle", str(demo_bundle), "--against", "", "--backend", "onnxruntime",
                                "--pictures", "100000", "--budget", "100000", "--json", str(file)], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "TMPDIR": str(tmp_path)},
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a job in the background inherits that it is ignored
    while not list(tmp_path.glob("*/onnxruntime.npy")):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    found = json.loads(file.read_text())
    assert found["interrupted"]
    assert "stopped after" in printed
    assert len(found["configurations"][0]["turns"]) < 100000


def test_a_side_that_fails_says_so_and_leaves_no_process(tmp_path):
    with pytest.raises(SideError, match=r"onnxruntime: BundleNotFoundError: there is no bundle"):
        Side(Setup("onnxruntime", str(tmp_path / "none"), "", "ddim", 0))
    with pytest.raises(SkippedSide, match="tensorrt: tensorrt is not installed"):
        Side(Setup("tensorrt", str(tmp_path), "", "ddim", 0))


def test_a_side_that_dies_is_an_error(demo_bundle, tmp_path):
    side = Side(Setup("onnxruntime", str(demo_bundle), str(BUILT_IN), "ddim", 0))
    os.kill(side._process.pid, signal.SIGKILL)
    with pytest.raises(SideError, match="ended with status -9"):
        side.picture(Request("a ring", 0, 64, 64, 1, 1, 1.0, str(tmp_path / "a.npy")))
    side.close()


def test_rates_are_positive():
    assert copy_rate("cpu", seconds=0.0) > 0
    assert matrix_rate("cpu", "fp32", seconds=0.0) > 0
    for (device, precision), products in PRODUCTS.items():
        for make in products.values() if device == "cpu" else ():
            make(64, precision, 1)()
