"""The GPU's one command, tried out on the fake GPU with torch on the CPU."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, page
from benchmarks.report import conditions

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_every_part_runs_and_leaves_its_numbers(demo_fp16, tmp_path):
    shutil.copytree(demo_fp16, tmp_path / "demo", ignore=shutil.ignore_patterns("plans"))
    command = [sys.executable, "-m", "benchmarks.gpu", "--models", "demo", "--output", str(tmp_path), "--pictures", "2", "--warmup", "1", "--steps", "2,3",
               "--parts", "build,check,picture,latency,layers,eager", "--torch-device", "cpu",
               "--tensorrt-python", f"{sys.executable} -m tests.fakes 8.6.0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    parts = results["models"]["demo"]
    assert set(parts) == {"build", "check", "picture", "latency", "layers", "eager"}
    assert all(one["good"] for name, one in parts["check"].items() if name in ("text_encoder", "denoiser", "vae_decoder", "vae_encoder"))
    assert parts["picture"]["psnr_db"] > 60
    assert parts["picture"]["graph_equals_plain"]
    assert parts["latency"]["cuda_graph"]["path"] == "cuda_graph"
    assert parts["latency"]["plain"]["path"] == "plain"
    assert parts["latency"]["cuda_graph"]["steps"]["3"]["step_ms"]["n"] == 6
    assert parts["build"]["with_timing_cache"]["components"]["denoiser"]["saved_by_timing_cache"] is not None
    assert {"processor", "versions", "command", "commit", "time"} <= results.keys()
    assert (tmp_path / "demo.png").is_file()
    assert "faster than eager; the goal of 2.5x is" in done.stdout
    assert "the host's share of a step is" in done.stdout


def options(tmp_path, *arguments):
    return gpu.parser().parse_args(["--output", str(tmp_path), *arguments])


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path):
    failing = f"{sys.executable} -c 'raise SystemExit(3)'"
    benchmark = gpu.Benchmark(options(tmp_path, "--models", "demo", "--parts", "latency,layers", "--tensorrt-python", failing))
    assert not benchmark.run()
    parts = json.loads((tmp_path / "gpu.json").read_text())["models"]["demo"]
    assert parts["latency"]["failed"].startswith("exit code 3")
    assert parts["layers"]["failed"].startswith("exit code 3")


def test_a_part_has_a_time_limit(tmp_path):
    benchmark = gpu.Benchmark(options(tmp_path, "--models", "demo", "--parts", "layers", "--limit", "1", "--tensorrt-python", f"{sys.executable} -c "
                                      "'import time; print(\"so far\"); time.sleep(60)'"))
    assert not benchmark.run()
    assert "stopped after 1 s (--limit); it had printed: so far" in benchmark.results["models"]["demo"]["layers"]["failed"]


def test_results_of_several_runs_come_together(tmp_path):
    for part in ("latency", "layers"):
        gpu.Benchmark(options(tmp_path, "--models", "demo", "--parts", part, "--tensorrt-python", f"{sys.executable} -c 'print(\"{{}}\")'")).run()
    assert set(json.loads((tmp_path / "gpu.json").read_text())["models"]["demo"]) == {"latency", "layers"}


def test_goals_are_said_to_be_met_or_missed(tmp_path):
    def whole(p50):
        return {"p50": p50, "p90": p50, "p99": p50}

    results = {"models": {"sd15": {
        "latency": {"cuda_graph": {"steps": {"20": {"whole_ms": whole(100.0), "step_ms": whole(5.0), "host_share_of_step": 0.05}}}},
        "compile": {"steps": {"20": {"whole_ms": whole(160.0)}}}, "eager": {"steps": {"20": {"whole_ms": whole(240.0)}}}, "picture": {"psnr_db": 29.0}}}}
    assert gpu.verdicts(results) == [
        "sd15, 20 steps: 1.60x faster than torch.compile; the goal of 1.5x is met", "sd15, 20 steps: 2.40x faster than eager; the goal of 2.5x is missed",
        "sd15, 20 steps: the host's share of a step is 5.0%; the goal of under 3 % is missed",
        "sd15: PSNR 29.0 dB against float32; the goal of 30 dB is missed"]
    assert len(gpu.summary(results)) == 3
    told = page.section("gpu", {"benchmark": "gpu", **results, **conditions("benchmarks.gpu")}, tmp_path)
    assert "1.60x faster than torch.compile" in told


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.parser().parse_args(["--parts", "build,fly"])
    assert "'fly' is none of export, build, check" in capsys.readouterr().err
