"""What the benchmarks compute and store, on stored samples; nothing here depends on how fast a machine is."""

import json

import pytest

from benchmarks import plots
from benchmarks.options import PLOTS
from benchmarks.report import conditions, print_table, write_json
from benchmarks.weight import NOTHING, OUR_IMPORT, measure_import, row


def test_ratios_are_taken_pair_by_pair():
    assert row("x", [1.0, 2.0, 4.0], [4.0, 4.0, 4.0]) == {
        "what": "x",
        "ours": 2.0,
        "diffusers": 4.0,
        "ratio": 2.0,
        "ratio_min": 1.0,
        "ratio_max": 4.0,
    }


def test_a_table_is_markdown(capsys):
    print_table(["what", "s"], [["import", 1.5]])
    assert capsys.readouterr().out == "| what   | s   |\n|--------|-----|\n| import | 1.5 |\n"


def test_results_hold_their_conditions(tmp_path, capsys):
    file = tmp_path / "weight.json"
    write_json(file, {"benchmark": "weight", **conditions()})
    stored = json.loads(file.read_text())
    assert {"processor", "cores", "system", "python", "versions", "command", "commit", "time"} <= stored.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["weight.json"]
    write_json(None, {"a": 1})
    assert "--json FILE" in capsys.readouterr().out.splitlines()[-1]


def test_an_import_is_measured_in_a_process_of_its_own():
    seconds, resident = measure_import(OUR_IMPORT.format(library="onnxruntime"))
    assert seconds > 0
    assert resident > measure_import(NOTHING)[1]


@pytest.mark.parametrize("suffix", [*PLOTS, ".PNG"])
def test_a_plot_is_written_in_every_format_that_is_allowed(suffix, tmp_path):
    points = [{"steps": steps, "seconds": {"p50": 0.1 * steps}} for steps in (1, 2)]
    file = tmp_path / f"plot{suffix}"
    plots.scaling({"against": {"steps": {"points": points, "time_exponent": 1.0}}}, file)
    assert file.stat().st_size > 1000
