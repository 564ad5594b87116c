"""The GPU's one command, tried out on the fake GPU with torch on the CPU."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import build_engines
from benchmarks import gpu, gpu_background, gpu_graphs, gpu_profile, gpu_torch, page
from benchmarks.report import conditions
from engine.family import STABLE_DIFFUSION
from export import build
from export.compare import difference, random_inputs
from export.graphs.denoiser import Denoiser
from tests import fakes
from tests.models import tiny_modules

ROOT = Path(__file__).parents[2]


class PartsHere(gpu.Benchmark):
    """Runs each part in this process, which has imported torch and diffusers already. --tensorrt-python is the fake's
    version. That parts run in processes of their own is shown by the tests of those that fail or take too long."""

    def run_torch(self, *arguments: str) -> dict:
        return self.here(arguments)

    def run_tensorrt(self, *arguments: str) -> dict:
        with fakes.install(self.options.tensorrt_python):
            return self.here(arguments)

    def here(self, arguments: tuple[str, ...]) -> dict:
        printed = io.StringIO()
        with redirect_stdout(printed):
            if arguments[0] == "-m":
                with patch.object(sys, "argv", [*arguments[1:]]):
                    import_module(arguments[1]).main()
            else:
                assert build_engines.main(list(arguments[1:])) == 0
        lines = printed.getvalue().strip().splitlines()
        return json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}


@pytest.fixture
def run_here(monkeypatch, capsys):
    """run_here(argument, ...): the command's status and what it printed, its parts run in this process."""
    monkeypatch.setattr(gpu, "Benchmark", PartsHere)
    monkeypatch.chdir(ROOT)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *arguments])
        status = gpu.main()
        return status, capsys.readouterr().out

    return run


@pytest.mark.slow
def test_every_part_runs_and_leaves_its_numbers(demo_fp16, run_here, tmp_path):
    shutil.copytree(demo_fp16, tmp_path / "demo", ignore=shutil.ignore_patterns("plans"))
    status, printed = run_here(
        "--models",
        "demo",
        "--output",
        str(tmp_path),
        "--pictures",
        "2",
        "--warmup",
        "1",
        "--steps",
        "2,3",
        "--parts",
        "build,check,picture,latency,layers,eager",
        "--torch-device",
        "cpu",
        "--with-timing-cache",
        "--tensorrt-python",
        "8.6.0",
    )
    assert status == 0, printed
    results = json.loads((tmp_path / "gpu.json").read_text())
    parts = results["models"]["demo"]
    assert set(parts) == {"build", "check", "picture", "latency", "layers", "eager"}
    assert all(
        one["good"]
        for name, one in parts["check"].items()
        if name in ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")
    )
    assert parts["picture"]["psnr_db"] > 60
    assert parts["picture"]["graph_equals_plain"]
    assert parts["latency"]["cuda_graph"]["path"] == "cuda_graph"
    assert parts["latency"]["plain"]["path"] == "plain"
    assert parts["latency"]["cuda_graph"]["steps"]["3"]["step_ms"]["n"] == 6
    assert parts["build"]["with_timing_cache"]["components"]["denoiser"]["saved_by_timing_cache"] is not None
    assert {"processor", "versions", "command", "commit", "time"} <= results.keys()
    assert (tmp_path / "demo.png").is_file()
    assert "faster than eager; the goal of 2.5x is" in printed
    assert "the host's share of a step is" in printed


NCU = """#!/bin/sh
echo '==PROF== Profiling "kernels"'
echo '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"'
echo '"0","1","_gemm_mha_v2_0x1","gpu__time_duration.sum","usecond","120.5"'
echo '"1","1","_gemm_mha_v2_0x1","gpu__time_duration.sum","usecond","119.5"'
echo '"2","1","sm90_xmma_fprop","gpu__time_duration.sum","nsecond","1,000,000"'
"""


@pytest.mark.slow
def test_profile_tries_settings_and_graphs_on_the_denoiser(demo_fp16, run_here, tmp_path, monkeypatch):
    """Dry run on the fake: a setting of the builder, and another graph."""
    shutil.copytree(demo_fp16, tmp_path / "demo", ignore=shutil.ignore_patterns("plans"))
    ncu = tmp_path / "bin" / "ncu"
    ncu.parent.mkdir()
    ncu.write_text(NCU)
    ncu.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ncu.parent}:{os.environ['PATH']}")
    status, printed = run_here(
        "--profile",
        "--models",
        "demo",
        "--output",
        str(tmp_path),
        "--torch-device",
        "cpu",
        "--compile-mode",
        "eager",
        "--variants",
        "no auxiliary streams,softmax in half",
        "--tensorrt-python",
        "8.6.0",
    )
    assert status == 0, printed
    found = json.loads((tmp_path / "gpu.json").read_text())["models"]["demo"]["profile"]
    variants = found["variants"]
    assert found["torch"]["step_ms"] > 0
    for one in variants.values():
        assert one["step_ms"] > 0
        assert one["plain_ms"] > 0
        assert one["fused_attention"] == 0
        assert one["kernels"]["fused_attention"] == 2
        assert one["difference"]["relative_rms"] < 5e-3
    assert (
        variants["softmax in half"]["kinds"]["IDENTITY"] < variants["no auxiliary streams"]["kinds"]["IDENTITY"]
    )  # casts
    assert (tmp_path / "demo" / "onnx" / "denoiser.onnx").read_bytes() == (
        demo_fp16 / "onnx" / "denoiser.onnx"
    ).read_bytes()
    assert "torch, eager" in printed
    assert "no auxiliary streams" in printed


@pytest.mark.slow
def test_graphs_that_torch_traces_again_are_profiled_too(tiny_fp16, wide_source, run_here, tmp_path, monkeypatch):
    """Of a tiny model, whose trace at opset 23 the builder's tests take too."""
    for module in (gpu_graphs, gpu_torch):
        monkeypatch.setattr(module, "resolve", lambda *arguments: wide_source)
    monkeypatch.setitem(gpu.MODELS, "tiny", gpu.Model(("tiny", "--random-weights"), 64))
    shutil.copytree(tiny_fp16, tmp_path / "tiny", ignore=shutil.ignore_patterns("plans"))
    status, printed = run_here(
        "--profile",
        "--models",
        "tiny",
        "--output",
        str(tmp_path),
        "--torch-device",
        "cpu",
        "--compile-mode",
        "eager",
        "--variants",
        "opset 23,one time projection",
        "--tensorrt-python",
        "10.16.1",
    )
    assert status == 0, printed
    variants = json.loads((tmp_path / "gpu.json").read_text())["models"]["tiny"]["profile"]["variants"]
    assert not [name for name, one in variants.items() if "failed" in one], variants
    assert variants["opset 23"]["kinds"].get("SOFTMAX", 0) == 0


SIZES = {"batch": 1, "rows": 2, "tokens": 77, "height": 8, "width": 8, "context_size": 32}


@pytest.mark.parametrize(
    ("graph", "kind", "same"),
    [
        ("plain", "sd1", True),
        ("norms_in_half", "sd1", True),
        ("one_time_projection", "sd1", True),
        ("float_scores", "sd2", True),
        ("text_keys_once", "sd2", False),
    ],
)
def test_a_changed_graph_gives_the_denoisers_output_but_for_the_text(graph, kind, same):
    inputs = {
        name: torch.from_numpy(value) for name, value in random_inputs(STABLE_DIFFUSION["denoiser"], SIZES).items()
    }
    with torch.no_grad():
        wanted = Denoiser(tiny_modules(kind)["unet"], torch.float16)(**inputs)[:, 0].numpy()
        unet = tiny_modules(kind)["unet"]
        with gpu_graphs.GRAPHS[graph](unet):
            found = Denoiser(unet, torch.float16)(**inputs)[:, 0].numpy()
    assert (difference(found, wanted).relative_rms < 5e-3) == same
    assert np.isfinite(found).all()


def test_the_profile_of_kernels_is_read_off_ncu():
    found = gpu_profile.read_ncu(subprocess.run(["sh", "-c", NCU], capture_output=True, text=True).stdout)
    assert (found["ms"], found["count"], found["fused_attention"], found["fused_attention_ms"]) == (1.24, 3, 2, 0.24)
    assert list(found["longest"]) == ["sm90_xmma_fprop", "_gemm_mha_v2_0x1"]


def test_without_ncu_the_profile_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "ncu is not installed" in gpu_profile.kernels(gpu.Benchmark(options(tmp_path)), tmp_path)["missing"]


def test_names_of_weights_are_not_taken_for_fused_attention():
    layers = [
        {"Name": "unet.down_blocks.0.attentions.0.to_q + MatMul", "TacticName": "sm90_xmma_gemm_f16f16"},
        {"Name": "{ForeignNode[softmax]}", "TacticName": "_gemm_mha_v2_0x123"},
        {"Name": "__myl_MhaSoft_myl3_7"},
    ]
    assert gpu_profile.fused_attention(layers) == ["{ForeignNode[softmax]}", "__myl_MhaSoft_myl3_7"]


def test_one_time_projection_gives_what_the_single_ones_give():
    blocks = [SimpleNamespace(time_emb_proj=nn.Linear(8, size)) for size in (4, 6)]
    embedding = torch.randn(2, 8)
    wanted = [block.time_emb_proj(embedding) for block in blocks]
    with gpu_graphs.one_time_projection(SimpleNamespace(modules=lambda: blocks)):
        for block, value in zip(blocks, wanted):
            assert torch.allclose(block.time_emb_proj(embedding), value, atol=1e-6)


def test_softmax_in_half_takes_the_casts_around_it_away(demo_fp16):
    model = onnx.load(str(demo_fp16 / "onnx" / "denoiser.onnx"))
    casts = [node.op_type for node in model.graph.node].count("Cast")
    softmaxes = [node.op_type for node in model.graph.node].count("Softmax")
    gpu_graphs.soften(model.graph)
    assert [node.op_type for node in model.graph.node].count("Cast") == casts - 2 * softmaxes
    onnx.checker.check_model(model)


@pytest.mark.parametrize("model", gpu.MODELS)
def test_a_bundle_is_called_as_its_model_is(model, tmp_path, monkeypatch):
    """What build_engines.py writes is where the other parts look for it."""
    written = []
    monkeypatch.setattr(
        build,
        "build",
        lambda source, output, *arguments, **options: (
            written.append(output / source.name) or SimpleNamespace(folder=written[0], exported=())
        ),
    )
    benchmark = gpu.Benchmark(options(tmp_path))
    assert build_engines.main(benchmark.export_arguments(model)) == 0
    assert written == [benchmark.bundle(model)]


@pytest.mark.slow
def test_a_build_that_was_stopped_goes_on_and_a_finished_one_starts_anew(demo_fp16, tmp_path):
    shutil.copytree(demo_fp16, tmp_path / "demo", ignore=shutil.ignore_patterns("plans"))
    fake = f"{sys.executable} -m tests.fakes 10.16.1"
    limited = ("--models", "demo", "--parts", "build", "--tensorrt-python", fake, "--components")
    benchmark = gpu.Benchmark(options(tmp_path, *limited, "denoiser"))
    assert benchmark.run()
    plan = next((tmp_path / "demo" / "plans").glob("*/denoiser.plan"))
    first = plan.stat().st_mtime_ns
    benchmark.results["models"]["demo"]["build"] = {"failed": "stopped"}
    benchmark.save()
    again = gpu.Benchmark(options(tmp_path, *limited, "denoiser,text_encoder"))
    assert again.run()
    assert again.results["models"]["demo"]["build"]["continued"]
    assert plan.stat().st_mtime_ns == first
    assert set(again.results["models"]["demo"]["build"]["cold"]["components"]) == {"denoiser", "text_encoder"}


def test_a_run_in_the_background_can_be_asked_how_far_it_is(tmp_path):
    def ask(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path), *arguments],
            capture_output=True,
            text=True,
            cwd=ROOT,
        ).stdout

    assert "no run has left a status" in ask("--status")
    go = f'pathlib.Path("{tmp_path}/go")'
    script = f'import pathlib, time; [time.sleep(0.05) for _ in range(600) if not {go}.exists()]; print("{{}}")'
    waiting = f"{sys.executable} -c '{script}'"
    assert "runs in the background; ask: python -m benchmarks.gpu --status --output" in ask(
        "--detach", "--models", "demo", "--parts", "layers", "--tensorrt-python", waiting
    )
    until(lambda: "running: demo: layers, for " in gpu_background.status(tmp_path))
    (tmp_path / "go").touch()
    until(lambda: "the run has ended\nended: demo: layers, " in gpu_background.status(tmp_path))
    assert "== demo: layers" in ask("--status")


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_the_status_tells_a_run_that_was_killed(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    state = {"pid": gone.pid, "running": "sd15: build", "since": time.time(), "ended": ["sd15: export, 60 s"]}
    (tmp_path / gpu_background.STATUS).write_text(json.dumps(state))
    assert gpu_background.status(tmp_path) == (
        f"process {gone.pid} is gone; it was at sd15: build. Start it again: finished plans are not built again\n"
        "ended: sd15: export, 60 s"
    )


def options(tmp_path, *arguments):
    return gpu.parser().parse_args(["--output", str(tmp_path), *arguments])


def test_a_part_that_fails_is_told_and_the_others_go_on(tmp_path):
    failing = f"{sys.executable} -c 'raise SystemExit(3)'"
    benchmark = gpu.Benchmark(
        options(tmp_path, "--models", "demo", "--parts", "latency,layers", "--tensorrt-python", failing)
    )
    assert not benchmark.run()
    parts = json.loads((tmp_path / "gpu.json").read_text())["models"]["demo"]
    assert parts["latency"]["failed"].startswith("exit code 3")
    assert parts["layers"]["failed"].startswith("exit code 3")


def test_a_part_has_a_time_limit(tmp_path):
    benchmark = gpu.Benchmark(
        options(
            tmp_path,
            "--models",
            "demo",
            "--parts",
            "layers",
            "--limit",
            "1",
            "--tensorrt-python",
            f"{sys.executable} -c 'import time; print(\"so far\"); time.sleep(60)'",
        )
    )
    assert not benchmark.run()
    assert (
        "stopped after 1 s (--limit); it had printed: so far" in benchmark.results["models"]["demo"]["layers"]["failed"]
    )


def test_results_of_several_runs_come_together(tmp_path):
    for part in ("latency", "layers"):
        gpu.Benchmark(
            options(
                tmp_path,
                "--models",
                "demo",
                "--parts",
                part,
                "--tensorrt-python",
                f"{sys.executable} -c 'print(\"{{}}\")'",
            )
        ).run()
    assert set(json.loads((tmp_path / "gpu.json").read_text())["models"]["demo"]) == {"latency", "layers"}


def test_goals_are_said_to_be_met_or_missed(tmp_path):
    def whole(p50):
        return {"p50": p50, "p90": p50, "p99": p50}

    results = {
        "models": {
            "sd15": {
                "latency": {
                    "cuda_graph": {
                        "steps": {"20": {"whole_ms": whole(100.0), "step_ms": whole(5.0), "host_share_of_step": 0.05}}
                    }
                },
                "compile": {"steps": {"20": {"whole_ms": whole(160.0)}}},
                "eager": {"steps": {"20": {"whole_ms": whole(240.0)}}},
                "picture": {"psnr_db": 29.0},
            }
        }
    }
    assert gpu.verdicts(results) == [
        "sd15, 20 steps: 1.60x faster than torch.compile; the goal of 1.5x is met",
        "sd15, 20 steps: 2.40x faster than eager; the goal of 2.5x is missed",
        "sd15, 20 steps: the host's share of a step is 5.0%; the goal of under 3 % is missed",
        "sd15: PSNR 29.0 dB against float32; the goal of 30 dB is missed",
    ]
    assert len(gpu.summary(results)) == 3
    told = page.section("gpu", {"benchmark": "gpu", **results, **conditions("benchmarks.gpu")}, tmp_path)
    assert "1.60x faster than torch.compile" in told


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit):
        gpu.parser().parse_args(["--parts", "build,fly"])
    assert "'fly' is none of export, build, check" in capsys.readouterr().err
