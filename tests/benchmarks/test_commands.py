"""The commands as a user types them, on the built-in model with two pictures; nothing here depends on how fast a
machine is."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import latency, machine, scaling, settings
from benchmarks.__main__ import COMMANDS, main, parser
from benchmarks.errors import BenchmarkUsageError, SideError, SkippedSide
from benchmarks.machine import PRODUCTS, copy_rate, matrix_rate
from benchmarks.models import model_folder
from benchmarks.report import write_json
from benchmarks.sides import Request, Setup, Side
from benchmarks.weight import measure_import
from engine.backends.openvino.backend import OpenVinoBackend
from engine.bundle import Bundle
from export.sources.checkpoint import BUILT_IN

pytest.importorskip("openvino")
pytestmark = pytest.mark.slow
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
    found = measured(
        results,
        "latency",
        "latency",
        "--bundle",
        str(demo_bundle),
        "--backend",
        "openvino,onnxruntime",
        "--against",
        "diffusers,optimum",
        "--steps",
        "2",
        "--pictures",
        "2",
        "--plot",
        str(results / "bars.png"),
    )
    (one,) = found["configurations"]
    assert set(one["sides"]) == {"openvino", "onnxruntime", "diffusers"}
    assert "optimum is not installed" in one["skipped"]["optimum"]
    assert "skipped optimum: optimum is not installed" in capsys.readouterr().out
    assert [ratio["psnr_db"] > 50 for ratio in one["ratios"]] == [True, True]
    turns = len(one["turns"])
    assert 2 <= turns <= 6  # on a busy machine disturbed turns are repeated, and kept where there are no others
    for side in one["sides"].values():
        assert (side["seconds"]["total"]["n"], side["seconds"]["step"]["n"], side["evaluations"]) == (
            turns,
            2 * turns,
            2,
        )
        assert side["peak_bytes"] > 50 * 2**20
    assert not found["interrupted"]
    assert found["command"].startswith("python -m benchmarks")
    assert {"processor", "clocks", "gpu", "versions", "commit"} <= found.keys()
    assert (results / "bars.png").stat().st_size > 1000


@pytest.fixture
def quick_machine(monkeypatch):
    """The machine's rates by small products and copies: a test of the command needs no more."""
    monkeypatch.setattr(machine, "MATRIX_SIDES", (64,))
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(machine.matrix_rate, "__defaults__", (0, 0.0))
    monkeypatch.setattr(machine.copy_rate, "__defaults__", (0, 0.0))


def test_parity_is_against_float32_diffusers(demo_bundle, results):
    found = measured(
        results,
        "parity",
        "parity",
        "--bundle",
        str(demo_bundle),
        "--backend",
        "openvino",
        "--against",
        "",
        "--steps",
        "2",
        "--pictures",
        "2",
    )
    assert found["pictures"] == 2
    assert found["sides"]["openvino"]["psnr_min_db"] > 50
    assert found["sides"]["openvino"]["max_difference"] <= 1


def test_adapters_says_what_a_switch_takes(demo_bundle, results):
    words = ["--bundle", str(demo_bundle), "--backend", "onnxruntime", "--steps", "1", "--turns", "1"]
    found = measured(results, "adapters", "adapters", *words)
    assert found["layers"] == 90
    (one,) = found["backends"]
    assert all(one[name] > 0 for name in ("load", "on", "off", "step", "step_with"))


def test_guidance_says_what_an_interval_saves_and_changes(demo_bundle, results):
    found = measured(
        results,
        "guidance",
        "guidance",
        "--bundle",
        str(demo_bundle),
        "--backend",
        "onnxruntime",
        "--steps",
        "4",
        "--intervals",
        "0:0.25,0.5:1",
        "--pictures",
        "2",
    )
    full, early, late = found["intervals"]
    assert [one["interval"] for one in (full, early, late)] == [[0.0, 1.0], [0.0, 0.25], [0.5, 1.0]]
    assert [one["rows"] for one in (full, early, late)] == [1.0, 0.75, 0.75]
    assert (full["psnr_min_db"], full["ratio"]["p50"]) == (99.0, 1.0)
    assert early["psnr_median_db"] < 60
    assert found["judged"]
    assert all(0 <= one["right"] <= 2 for one in found["intervals"])


def test_roofline_counts_the_graphs_and_measures_the_machine(demo_bundle, results, quick_machine):
    found = measured(
        results,
        "roofline",
        "roofline",
        "--bundle",
        str(demo_bundle),
        "--backend",
        "openvino,tensorrt",
        "--steps",
        "2",
        "--pictures",
        "2",
    )
    components, picture = found["backends"]["openvino"]["components"], found["backends"]["openvino"]["picture"]
    assert picture["flop"] == pytest.approx(
        sum(c["flop"] * (2 if name == "denoiser" else 1) for name, c in components.items()), rel=1e-4
    )
    for c in (*components.values(), picture):
        assert c["reached"] == pytest.approx(c["floor"] / c["seconds"]["p50"], rel=1e-3)


def test_scaling_covers_steps_batch_and_pixels(tiny_bundles, results):
    found = measured(
        results,
        "scaling",
        "scaling",
        "--bundle",
        str(tiny_bundles["sd1"]),
        "--backend",
        "onnxruntime",
        "--steps",
        "2",
        "--pictures",
        "2",
        "--rounds",
        "1",
    )
    assert all(point["seconds"]["n"] == 2 for found in found["against"].values() for point in found["points"])
    assert [point["steps"] for point in found["against"]["steps"]["points"]] == [1, 2, 4]
    assert [point["batch"] for point in found["against"]["batch"]["points"]] == [1, 2, 4, 8]
    assert [point["pixels"] for point in found["against"]["pixels"]["points"]] == [32**2, 64**2, 96**2, 128**2]


def test_rounds_go_over_all_points(tiny_bundles, monkeypatch, tmp_path):
    """So that a drift of the machine shows as their spread."""
    seen = []

    def measure(setup, interpreters, request, pictures):
        seen.append(request)
        return {"totals": [1.0] * pictures, "peak_bytes": 1, "device_bytes": None}

    monkeypatch.setattr(scaling, "measure", measure)
    asked = ["--bundle", str(tiny_bundles["sd1"]), "--backend", "onnxruntime", "--pictures", "3", "--rounds", "2"]
    found = measured(tmp_path, "scaling", "scaling", *asked)
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert found["rounds"] == 2
    assert all(point["seconds"]["n"] == 6 for axis in found["against"].values() for point in axis["points"])


def test_settings_are_measured_one_by_one(tiny_bundles, results, monkeypatch):
    """Two of each library: the next test has them all."""
    for name in ("ONNXRUNTIME", "OPENVINO"):
        monkeypatch.setattr(settings, name, dict(list(getattr(settings, name).items())[:2]))
    monkeypatch.setattr(OpenVinoBackend, "has_bf16", lambda self: False)  # the same settings again
    bundle = str(tiny_bundles["sd1"])
    found = measured(results, "settings", "settings", "--bundle", bundle, "--runs", "1", "--turns", "1")
    rows, sampler = found["tables"]
    assert [row["library"] for row in rows] == ["onnxruntime", "onnxruntime", "openvino", "openvino"]
    assert len({(row["precision"], row["setting"]) for row in rows}) == len(rows)
    assert len(sampler) == 5
    assert found["skipped"] == {"openvino bf16": "openvino in bf16: this CPU has no instructions for it"}


@pytest.mark.parametrize(
    ("library", "setting"),
    [(library, name) for library in ("onnxruntime", "openvino") for name in getattr(settings, library.upper())],
)
def test_every_setting_runs(tiny_bundles, monkeypatch, library, setting):
    monkeypatch.setattr(settings, "SETTLE", 0.0)
    job = {"graph": str(tiny_bundles["sd1"] / "onnx" / "denoiser.onnx"), "library": library, "precision": "fp32"}
    service = settings.Service()
    loaded = service({**job, "height": 64, "width": 64, **getattr(settings, library.upper())[setting]})
    assert loaded["create"] > 0
    assert service({"runs": 1})["step"] > 0
    assert service({"finish": True})["peak_bytes"] > 0


def test_the_report_is_one_page_of_all_results(results):
    assert main(["report", "--results", str(results)]) == 0
    page = (results / "report.md").read_text()
    stored = sorted(file.stem for file in results.glob("*.json"))
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")] == stored
    for word in (
        "ratio, pair by pair",
        "worst PSNR dB",
        "floor ms",
        "MHz",
        "at commit",
        "no GPU",
        "openvino",
        "Skipped: optimum: optimum is not installed",
    ):
        assert word in page
    for name in ("latency", "roofline", "scaling"):
        assert f"![{name}]({name}.png)" in page
        assert (results / f"{name}.png").stat().st_size > 1000


def test_the_committed_report_is_that_of_the_committed_results(tmp_path):
    folder = ROOT / "benchmarks" / "results"
    page = tmp_path / "report.md"
    assert main(["report", "--output", str(page)]) == 0
    assert page.read_text() == (folder / "report.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["latency", "--bundle", "/nowhere"], 2, "there is no bundle at /nowhere"),
        (["latency", "--json", "/nowhere/a.json"], 2, "/nowhere is not a folder"),
        (
            ["latency", "--bundle", "BUNDLE", "--against", "magic"],
            2,
            "'magic' is not known; it must be one of tensorrt, openvino",
        ),
        (["latency", "--bundle", "BUNDLE", "--sizes", "512"], 2, "it must be WIDTHxHEIGHT"),
        (["latency", "--bundle", "TINY"], 2, "made of the folder 'sd1'; pass the same model's folder"),
        (
            ["latency", "--bundle", "BUNDLE", "--sizes", "500x500", "--against", ""],
            2,
            "height 500 is not a multiple of 8",
        ),
        *(
            (
                [command, "--bundle", "BUNDLE", "--backend", "tensorrt"],
                2,
                "there is nothing of ours to measure (tensorrt: tensorrt is not installed)",
            )
            for command in ("latency", "parity", "roofline", "scaling")
        ),
        (["report", "--results", "EMPTY"], 1, "holds no results"),
        (["roofline", "--bundle", "BUNDLE", "--sizes", "512x512"], 2, "height 512"),
        (["overhead", "--bundle", "/nowhere"], 2, "there is no bundle at /nowhere"),
        *(
            (
                [command, "--bundle", "BUNDLE", "--backend", ","],
                2,
                "--backend must name one or more of tensorrt, openvino",
            )
            for command in ("latency", "parity", "roofline", "scaling")
        ),
        (["latency", "--json", "EMPTY"], 2, "it is not a plain file"),
        (["report", "--output", "/dev/null"], 2, "/dev/null cannot be written: it is not a plain file"),
        (["latency", "--plot", "bars.banana"], 2, "--plot is 'bars.banana'; its name must end with .png, .svg, .pdf"),
    ],
)
def test_mistakes_are_one_line(arguments, code, words, demo_bundle, tiny_bundles, tmp_path, capsys):
    places = {"BUNDLE": str(demo_bundle), "TINY": str(tiny_bundles["sd1"]), "EMPTY": str(tmp_path)}
    assert main([places.get(word, word) for word in arguments]) == code
    said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading ")]
    assert len(said) == 1
    assert words in said[0]


INTEGERS = [
    ("prompt", "--rounds", 1),
    ("latency", "--pictures", 1),
    ("latency", "--steps", 1),
    ("latency", "--threads", 0),
    ("latency", "--batch", 1),
    ("parity", "--pictures", 1),
    ("guidance", "--pictures", 1),
    ("guidance", "--steps", 1),
    ("guidance", "--threads", 0),
    ("roofline", "--pictures", 1),
    ("scaling", "--pictures", 1),
    ("scaling", "--rounds", 1),
    ("settings", "--turns", 1),
    ("settings", "--runs", 1),
    ("memory", "--steps", 1),
    ("tiling", "--side", 8),
    ("adapters", "--rank", 1),
    ("adapters", "--steps", 1),
    ("adapters", "--turns", 1),
]


@pytest.mark.parametrize(("command", "option", "smallest"), INTEGERS)
def test_a_number_that_means_nothing_is_refused_before_anything_is_measured(command, option, smallest, capsys):
    for text in (str(smallest - 1), "many", "1.5", "", "9" * 5000):
        with pytest.raises(SystemExit) as ended:
            main([command, option, text])
        assert ended.value.code == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"argument {option}: " in said
        assert f" must be an integer from {smallest} up" in said
        assert len(said) < 200


def test_every_number_of_a_command_is_checked():
    for command in COMMANDS:
        subparsers = next(action for action in parser(command)._actions if action.dest == "command")
        types = {
            option: action.type for action in subparsers.choices[command]._actions for option in action.option_strings
        }
        assert not {option for option, of in types.items() if of in (int, float)}
        assert {option for option, of in types.items() if callable(of) and "integer" in of.__qualname__} == {
            o for c, o, _ in INTEGERS if c == command
        } | ({"--steps", "--threads"} & types.keys())


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "long"])
def test_a_budget_is_a_time(text, capsys):
    with pytest.raises(SystemExit):
        main(["latency", "--budget", text])
    assert "must be a number of seconds above 0" in capsys.readouterr().err


def test_the_disk_has_room_before_anything_is_built(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_200_000_000))
    assert main(["memory"]) == 2
    assert capsys.readouterr().err == (
        f"python -m benchmarks: {tmp_path} has 1.2 GB free, and the bundle of Stable Diffusion 1.5 in fp32 needs 5.0 "
        "GB; make room, or name another folder: "
        "TMPDIR=FOLDER python -m benchmarks memory\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_terminated_leaves_no_folder_and_no_process(number, tmp_path):
    current, temporary = tmp_path / "current", tmp_path / "tmp"
    for folder in (current, temporary):
        folder.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "memory"],
        cwd=current,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)},
    )
    while not list(temporary.iterdir()):
        assert process.poll() is None
        time.sleep(0.05)
    builder = wait_for_child(process.pid)
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert list(temporary.iterdir()) == []
    assert list(current.iterdir()) == []
    assert not Path(f"/proc/{builder}").exists()


def wait_for_child(pid: int) -> str:
    """The first process that `pid` starts."""
    while not (children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        time.sleep(0.05)
    return children[0]


@pytest.mark.parametrize(
    ("command", "where"),
    [
        ("parity", "benchmarks.sides.Side.__init__"),
        ("latency", "benchmarks.latency._warm_up"),
        ("scaling", "benchmarks.scaling.measure"),
        ("settings", "benchmarks.settings._turn"),
    ],
)
def test_ctrl_c_before_anything_is_measured_is_no_result(command, where, demo_bundle, monkeypatch, tmp_path):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, stop)
    sides = [] if command == "settings" else ["--backend", "onnxruntime"]
    others = ["--against", ""] if command in ("latency", "parity") else []
    file = tmp_path / "a.json"
    assert main([command, "--bundle", str(demo_bundle), *sides, *others, "--json", str(file)]) == 130
    assert not file.exists()


def test_ctrl_c_ends_all_configurations_and_keeps_those_that_are_complete(demo_bundle, monkeypatch, tmp_path):
    file, complete = (
        tmp_path / "a.json",
        {"interrupted": False, "sides": {}, "ratios": [], "height": 64, "width": 64, "batch": 1},
    )

    def measure(setups, interpreters, request, pictures, budget):
        if request.batch == 2:
            raise KeyboardInterrupt
        return complete

    monkeypatch.setattr(latency, "measure", measure)
    assert (
        main(
            [
                "latency",
                "--bundle",
                str(demo_bundle),
                "--against",
                "",
                "--sizes",
                "64x64,128x128",
                "--batch",
                "1,2",
                "--json",
                str(file),
            ]
        )
        == 0
    )
    found = json.loads(file.read_text())
    assert (found["configurations"], found["interrupted"]) == ([complete], True)


def test_a_measured_process_that_fails_is_a_named_error():
    with pytest.raises(
        SideError, match="a process that is measured failed: ModuleNotFoundError: No module named 'nothing_like_it'"
    ):
        measure_import("import nothing_like_it")


def test_a_result_is_written_through_a_link(tmp_path):
    (tmp_path / "a.json").write_text("")
    (tmp_path / "link.json").symlink_to("a.json")
    write_json(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


def test_a_random_model_is_written_to_a_temporary_folder_or_the_one_that_was_named(
    monkeypatch, tmp_path, tiny_sources, tiny_bundles
):
    source, bundle = tiny_sources["sd1"], Bundle.open(tiny_bundles["sd1"], verify=False)
    bundle.manifest["source"] = {"kind": "random", "id": "sd15"}
    random = SimpleNamespace(name="tiny", fingerprint=source.fingerprint, pipeline=source.pipeline)
    monkeypatch.setattr("export.sources.checkpoint.resolve", lambda *arguments, **options: random)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = model_folder(bundle, None, None)
    assert (folder / "unet").is_dir()
    assert folder.parent.parent == tmp_path
    named = model_folder(bundle, None, tmp_path / "named" / "cache")
    assert named.parent == tmp_path / "named" / "cache"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10))
    assert model_folder(bundle, None, tmp_path / "named" / "cache") == named
    with pytest.raises(BenchmarkUsageError, match=r"0\.0 GB free, and the model tiny in float32 needs"):
        model_folder(bundle, None, tmp_path / "other")


@pytest.mark.parametrize(
    ("content", "words"), [("{", "is not a result"), ('{"benchmark": "magic"}', "holds a benchmark 'magic'")]
)
def test_a_damaged_result_is_a_named_error(content, words, tmp_path, capsys):
    (tmp_path / "a.json").write_text(content)
    assert main(["report", "--results", str(tmp_path)]) == 1
    assert words in capsys.readouterr().err


def test_ctrl_c_keeps_what_was_measured(demo_bundle, tmp_path):
    file = tmp_path / "latency.json"
    impatient = (
        "import sys; from benchmarks import __main__ as command, latency; "
        "latency.PATIENCE = 0.0; sys.exit(command.main())"
    )
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            impatient,
            "latency",
            "--bundle",
            str(demo_bundle),
            "--against",
            "",
            "--backend",
            "onnxruntime",
            "--pictures",
            "100000",
            "--budget",
            "100000",
            "--json",
            str(file),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a job in the background inherits that it is ignored
    written: set[int] = set()
    while len(written) < latency.WARM_UPS + 5:  # two pictures a turn
        assert process.poll() is None
        written |= {file.stat().st_mtime_ns for file in tmp_path.glob("*/onnxruntime.npy")}
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    found = json.loads(file.read_text())
    assert found["interrupted"]
    assert "stopped after" in printed
    assert 0 < len(found["configurations"][0]["turns"]) < 100000


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


def test_rates_are_positive(quick_machine):
    assert copy_rate("cpu") > 0
    assert matrix_rate("cpu", "fp32") > 0
    for (device, precision), products in PRODUCTS.items():
        for make in products.values() if device == "cpu" else ():
            make(64, precision, 1)()
