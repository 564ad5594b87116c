"""Everything that only a GPU can show, as one command: builds, correctness, latency, and what diffusers takes in the
same run.

    python -m benchmarks.gpu [--models demo,sd15,sd21] [--parts export,build,check,picture,latency,layers,eager,compile]
    [--output FOLDER]
                             [--limit SECONDS] [--pictures 20] [--steps 20,30,50] [--torch-python CMD]
                             [--tensorrt-python CMD]
    python -m benchmarks.gpu --profile        settings of TensorRT on the denoiser, beside torch.compile
                                              (benchmarks/gpu_profile.py)
    python -m benchmarks.gpu --detach ...     the same in the background, and at once:
    python -m benchmarks.gpu --status         what is running, what has ended, and the end of the log

Each part of each model runs in processes of its own, for at most --limit seconds each, and its numbers are in
FOLDER/gpu.json as soon as it has ended: parts can be chosen, repeated and spread over several runs with the same
FOLDER. A build is one process for each component; when one is stopped, the next run of the part goes on behind the last
that was finished. TensorRT and torch may live in different Pythons (--tensorrt-python, --torch-python); the first needs
the runtime's packages only, the second the [export] extra.

Latency: every picture waits for the one before; whole pictures by the host's clock from the call to the pixels, stages
and steps by CUDA events. diffusers: the same architecture, weights, prompt, sampler (DDIM), size and steps, fp16, SDPA,
channels_last.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks import gpu_background, gpu_profile
from benchmarks.gpu_profile import PartFailed
from benchmarks.report import conditions, gpu, print_table, write_json
from engine.family import STABLE_DIFFUSION

ROOT = Path(__file__).parents[1]
PARTS = ("export", "build", "check", "picture", "latency", "layers", "eager", "compile")
HEADER = ["model", "way", "steps", "picture p50 ms", "p90", "p99", "step p50 ms"]

QUIET = {
    "PYTHONUNBUFFERED": "1",
    "CUDA_MODULE_LOADING": "LAZY",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""Kernels are loaded lazily, because TensorRT 8.6 has 1.3 GB of them, which take 6 s to load in each process."""

GOALS = (("faster than torch.compile", "compile", 1.5), ("faster than eager", "eager", 2.5))


@dataclass(frozen=True)
class Model:
    """The arguments of build_engines.py, and the size in pixels."""

    arguments: tuple[str, ...]
    side: int


MODELS = {
    "demo": Model((), 64),
    "sd15": Model(("sd15", "--random-weights"), 512),
    "sd21": Model(("sd21", "--random-weights"), 768),
}


class Benchmark:
    """One run: the options, and the results so far, which are written after every part."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.folder = options, options.output
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file = self.folder / "gpu.json"
        self.results: dict[str, Any] = (
            json.loads(self.file.read_text()) if self.file.is_file() else {"benchmark": "gpu", "models": {}}
        )

    def run(self) -> bool:
        """Runs the chosen parts of the chosen models. Returns whether all succeeded."""
        good, parts = (
            True,
            ["profile"] if self.options.profile else [part for part in PARTS if part in self.options.parts],
        )
        with gpu_background.told(self.folder) as tell:
            for model in self.options.models:
                for part in parts:
                    tell(f"{model}: {part}")
                    good &= self._part(model, part)
        return good

    def _part(self, model: str, part: str) -> bool:
        print(f"== {model}: {part}", flush=True)
        results, started = self.results["models"].setdefault(model, {}), perf_counter()
        try:
            results[part] = getattr(self, part)(model)
        except PartFailed as error:
            results[part] = {"failed": str(error)}
            print(f"{model}: {part} failed: {error}", flush=True)
        results[part]["wall_seconds"] = round(perf_counter() - started, 1)
        results[part]["gpu"] = gpu()
        self.save()
        return "failed" not in results[part]

    def save(self) -> None:
        """Writes the results so far."""
        write_json(self.file, {**self.results, **conditions("benchmarks.gpu")})

    def export(self, model: str) -> dict[str, Any]:
        """ONNX graphs in fp16."""
        started = perf_counter()
        self.run_torch("build_engines.py", *self.export_arguments(model))
        return {"seconds": round(perf_counter() - started, 1)}

    def export_arguments(self, model: str) -> list[str]:
        """The arguments of build_engines.py that give the bundle the model's name."""
        side = str(MODELS[model].side)
        return [
            *MODELS[model].arguments,
            "--name",
            model,
            "--output",
            str(self.folder),
            "--backend",
            "onnxruntime",
            "--precision",
            "fp16",
            "--height",
            side,
            "--width",
            side,
            "--batch",
            "1",
            "--no-verify",
        ]

    def build(self, model: str) -> dict[str, Any]:
        """Builds plans for guided steps without a timing cache, and if asked for again with it. After a failure, a new
        run continues after the finished ones."""
        plans = self.bundle(model) / "plans"
        begun = "failed" in self.results["models"].get(model, {}).get("build", {})
        if not begun:
            shutil.rmtree(plans, ignore_errors=True)
        cold = self._build(model, ())
        again = self._build(model, ("--force",)) if self.options.with_timing_cache else None
        build = json.loads(next(plans.glob("[!.]*/build.json")).read_text())
        return {
            "cold": cold,
            "with_timing_cache": again,
            "continued": begun,
            "machine": build["machine"],
            "settings": build["settings"],
        }

    def _build(self, model: str, extra: Sequence[str]) -> dict[str, Any]:
        """One process for each component."""
        rows, seconds = [] if model == "demo" else ["--rows", "2"], {}
        for component in self.options.components:
            started = perf_counter()
            self.run_tensorrt(
                "build_engines.py", "--bundle", str(self.bundle(model)), "--components", component, *extra, *rows
            )
            seconds[component] = round(perf_counter() - started, 1)
        build = json.loads(next((self.bundle(model) / "plans").glob("[!.]*/build.json")).read_text())
        return {
            "seconds": round(sum(seconds.values()), 1),
            "processes": seconds,
            "components": {
                name: entry["seconds"] | {"bytes": entry["bytes"], "check": entry["check"]}
                for name, entry in build["components"].items()
            },
        }

    def profile(self, model: str) -> dict[str, Any]:
        """Settings of TensorRT on the denoiser."""
        return gpu_profile.profile(self, model)

    def check(self, model: str) -> dict[str, Any]:
        """Every component against torch in float32 on the same random inputs."""
        reference = self.folder / f"{model}-reference.npz"
        self.run_torch(
            "-m",
            "benchmarks.gpu_torch",
            "reference",
            *self.model_arguments(model),
            "--file",
            str(reference),
            "--device",
            self.options.torch_device,
        )
        return self.run_tensorrt(
            "-m", "benchmarks.gpu_tensorrt", "check", "--bundle", str(self.bundle(model)), "--file", str(reference)
        )

    def picture(self, model: str) -> dict[str, Any]:
        """A picture of diffusers in float32 and ours, from the same seed."""
        expected = self.folder / f"{model}-diffusers.npy"
        self.run_torch(
            "-m",
            "benchmarks.gpu_torch",
            "picture",
            *self.model_arguments(model),
            "--file",
            str(expected),
            "--device",
            self.options.torch_device,
        )
        return self.run_tensorrt(
            "-m",
            "benchmarks.gpu_tensorrt",
            "picture",
            "--bundle",
            str(self.bundle(model)),
            "--file",
            str(expected),
            "--png",
            str(self.folder / f"{model}.png"),
        )

    def latency(self, model: str) -> dict[str, Any]:
        """Our pictures, with CUDA graphs and without."""
        return self.run_tensorrt(
            "-m", "benchmarks.gpu_tensorrt", "latency", "--bundle", str(self.bundle(model)), *self._counts()
        )

    def layers(self, model: str) -> dict[str, Any]:
        """The layers of the denoiser's plan by kind, and their time."""
        return self.run_tensorrt("-m", "benchmarks.gpu_tensorrt", "layers", "--bundle", str(self.bundle(model)))

    def eager(self, model: str) -> dict[str, Any]:
        """diffusers as most people run it."""
        return self._baseline(model, "eager")

    def compile(self, model: str) -> dict[str, Any]:
        """diffusers with torch.compile(mode="max-autotune"), or "reduce-overhead" if that does not end in time."""
        return self._baseline(model, self.options.compile_mode)

    def _baseline(self, model: str, mode: str) -> dict[str, Any]:
        return self.run_torch(
            "-m",
            "benchmarks.gpu_torch",
            "latency",
            *self.model_arguments(model),
            "--mode",
            mode,
            "--device",
            self.options.torch_device,
            *self._counts(),
        )

    def bundle(self, model: str) -> Path:
        return Path(self.folder) / model

    def model_arguments(self, model: str) -> list[str]:
        return ["--model", model if MODELS[model].arguments else "", "--side", str(MODELS[model].side)]

    def _counts(self) -> list[str]:
        return [
            "--pictures",
            str(self.options.pictures),
            "--warmup",
            str(self.options.warmup),
            "--steps",
            ",".join(map(str, self.options.steps)),
        ]

    def run_torch(self, *arguments: str) -> dict[str, Any]:
        return self._process(self.options.torch_python, arguments)

    def run_tensorrt(self, *arguments: str) -> dict[str, Any]:
        return self._process(self.options.tensorrt_python, arguments)

    def _process(self, python: str, arguments: Sequence[str]) -> dict[str, Any]:
        """Runs a part's process and shows its output. Returns the JSON object in its last line."""
        printed = self.printed([*shlex.split(python), *arguments])
        lines = printed.strip().splitlines()
        print("\n".join(line[:400] for line in lines[-30:] if not line.startswith("{")), flush=True)
        return dict(json.loads(lines[-1])) if lines and lines[-1].startswith("{") else {}

    def printed(self, command: Sequence[str]) -> str:
        """The output of a command. PartFailed if it fails or takes longer than the limit."""
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, **QUIET},
        )
        try:
            printed, _ = process.communicate(timeout=self.options.limit)
        except BaseException as error:
            os.killpg(process.pid, signal.SIGKILL)
            printed, _ = process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise PartFailed(
                f"stopped after {self.options.limit} s (--limit); it had printed: {printed[-1500:]}"
            ) from None
        if process.returncode:
            raise PartFailed(f"exit code {process.returncode}: {printed[-1500:]}")
        return printed


def summary(results: dict[str, Any]) -> list[list[str]]:
    """One row for each model, number of steps and way of running that was measured."""
    rows = []
    for model, parts in results["models"].items():
        ways = {
            "ours, CUDA graph": parts.get("latency", {}).get("cuda_graph"),
            "ours, plain": parts.get("latency", {}).get("plain"),
            "torch.compile": parts.get("compile"),
            "eager": parts.get("eager"),
        }
        for way, numbers in ways.items():
            for steps, one in ((numbers or {}).get("steps") or {}).items():
                whole, step = one["whole_ms"], one.get("step_ms")
                rows.append(
                    [
                        model,
                        way,
                        steps,
                        f"{whole['p50']:.1f}",
                        f"{whole['p90']:.1f}",
                        f"{whole['p99']:.1f}",
                        f"{step['p50']:.2f}" if step else "",
                    ]
                )
    return rows


def verdicts(results: dict[str, Any]) -> list[str]:
    """Whether each goal was met and by how much, for each model and number of steps that both sides were measured
    for."""
    lines = []
    for model, parts in results["models"].items():
        ours = (parts.get("latency", {}).get("cuda_graph") or {}).get("steps", {})
        for text, rival, goal in GOALS:
            for steps, theirs in (parts.get(rival, {}).get("steps") or {}).items():
                if steps in ours:
                    ratio = theirs["whole_ms"]["p50"] / ours[steps]["whole_ms"]["p50"]
                    lines.append(
                        f"{model}, {steps} steps: {ratio:.2f}x {text}; the goal of {goal}x is "
                        f"{'met' if ratio >= goal else 'missed'}"
                    )
        for steps, one in ours.items():
            share = one["host_share_of_step"]
            lines.append(
                f"{model}, {steps} steps: the host's share of a step is {share:.1%}; the goal of under 3 % is "
                f"{'met' if share < 0.03 else 'missed'}"
            )
        if "psnr_db" in parts.get("picture", {}):
            psnr = parts["picture"]["psnr_db"]
            lines.append(
                f"{model}: PSNR {psnr:.1f} dB against float32; the goal of 30 dB is {'met' if psnr >= 30 else 'missed'}"
            )
    return lines


def names(allowed: Sequence[str]) -> Any:
    """A parser of comma-separated names."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        for name in chosen:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(allowed)}")
        return chosen

    return parse


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Builds, correctness and latency on a GPU, beside diffusers."
    )
    p.add_argument("--models", type=names(list(MODELS)), default=list(MODELS))
    p.add_argument("--parts", type=names(PARTS), default=list(PARTS))
    p.add_argument(
        "--output",
        type=Path,
        default=Path("build/gpu"),
        help="bundles, pictures and gpu.json go here (default: build/gpu)",
    )
    p.add_argument("--limit", type=int, default=540, metavar="SECONDS", help="for each process (default: 540)")
    p.add_argument(
        "--profile", action="store_true", help="instead of --parts: settings of TensorRT on the denoiser, one plan each"
    )
    p.add_argument(
        "--variants",
        type=names(list(gpu_profile.VARIANTS)),
        default=list(gpu_profile.VARIANTS),
        help="of --profile (default: all)",
    )
    p.add_argument("--detach", action="store_true", help="run in the background, with a log in the folder")
    p.add_argument("--status", action="store_true", help="tell how far a run in the background is")
    p.add_argument(
        "--components",
        type=names(STABLE_DIFFUSION.names),
        default=list(STABLE_DIFFUSION.names),
        help="the components of the part build, in this order (default: all)",
    )
    p.add_argument("--pictures", type=int, default=20)
    p.add_argument("--warmup", type=int, default=3)
    p.add_argument("--steps", type=lambda text: [int(n) for n in text.split(",")], default=[20, 30, 50])
    p.add_argument("--compile-mode", choices=["max-autotune", "reduce-overhead", "eager"], default="max-autotune")
    p.add_argument("--with-timing-cache", action="store_true", help="build a second time, with the timing cache")
    p.add_argument("--torch-python", default=sys.executable, metavar="CMD", help="a Python with the [export] extra")
    p.add_argument(
        "--tensorrt-python", default=sys.executable, metavar="CMD", help="a Python with the [tensorrt] extra"
    )
    p.add_argument(
        "--torch-device", default="cuda", help="cpu tries the command out, with float32 instead of fp16 (default: cuda)"
    )
    return p


def main() -> int:
    options = parser().parse_args()
    if options.status:
        print(gpu_background.status(options.output))
        return 0
    if options.detach:
        print(gpu_background.detach(options.output, [argument for argument in sys.argv[1:] if argument != "--detach"]))
        return 0
    benchmark = Benchmark(options)
    good = benchmark.run()
    if options.profile:
        for model in options.models:
            print_table(gpu_profile.HEADER, gpu_profile.table(benchmark.results["models"][model]["profile"]))
        return 0 if good else 1
    print_table(HEADER, summary(benchmark.results))
    print("\n".join(verdicts(benchmark.results)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
