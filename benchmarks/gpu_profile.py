"""What settings of TensorRT, and what changes of the graph, do to one step of the denoiser: `python -m benchmarks.gpu
--profile`.

Each variant is a copy of the model's bundle in FOLDER/profile/, removed when it is measured, with a plan of the
denoiser alone, checked as every build is. Its step is timed by CUDA events, as a captured graph and as a plain enqueue,
beside diffusers' U-Net under torch.compile. Fused attention is counted by the names of kernels: those that the engine
inspector tells, and, where `ncu` is installed, those that one plain step runs (TensorRT 8.6 tells a whole region as one
node).
"""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu import Benchmark

HEADER = ["variant", "step ms", "plain enqueue ms", "fused attention", "by ncu", "against torch", "build s"]
ATTENTION = re.compile(r"mha|flash", re.IGNORECASE)
"""In names of fused attention kernels: `_gemm_mha_v2`, `fmha`, `flash`. A model's own names hold `attentions`, which
means nothing."""

NCU = ("ncu", "--metrics", "gpu__time_duration.sum", "--csv", "--target-processes", "all")


class PartFailed(Exception):
    """A part ended without its numbers; the message is the end of what it printed."""


@dataclass(frozen=True)
class Variant:
    """A difference from the default: the graph (one of gpu_graphs.GRAPHS), its opset, options of build_engines.py.
    `model`: the only model that it is for."""

    graph: str = "plain"
    opset: int = 18
    build: tuple[str, ...] = ()
    model: str | None = None


VARIANTS = {
    "default": Variant(),
    "level 4": Variant(build=("--optimization-level", "4")),
    "no auxiliary streams": Variant(build=("--max-aux-streams", "0")),
    "opset 23": Variant(opset=23),
    "softmax in half": Variant("softmax_in_half"),
    "norms in half": Variant("norms_in_half"),
    "scores in float32": Variant("float_scores", model="sd21"),
    "text keys once": Variant("text_keys_once"),
    "one time projection": Variant("one_time_projection"),
}
"""The most promising first. "text keys once" has keys and values of a text as constants: it shows the time that a
second plan for them would save, and makes no right picture. "opset 23" needs TensorRT 10.14 or later."""


def profile(benchmark: Benchmark, model: str) -> dict[str, Any]:
    """Measures every variant and writes it into gpu.json as it ends. A variant that fails is reported, and the others
    go on."""
    if not (benchmark.bundle(model) / "manifest.json").is_file():
        benchmark.export(model)
    found: dict[str, Any] = {"torch": attempt(baseline, benchmark, model), "variants": {}}
    for name in benchmark.options.variants:
        variant = VARIANTS[name]
        if variant.model in (None, model):
            print(f"-- {model}, {name}", flush=True)
            found["variants"][name] = attempt(measure, benchmark, model, name, variant)
            benchmark.results["models"][model]["profile"] = found
            benchmark.save()
    return found


def attempt(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The variant's numbers, or why it failed."""
    try:
        return work(*arguments)
    except PartFailed as error:
        print(error, flush=True)
        return {"failed": str(error)}


def baseline(benchmark: Benchmark, model: str) -> dict[str, Any]:
    """The U-Net under torch.compile."""
    return benchmark.run_torch(
        "-m",
        "benchmarks.gpu_torch",
        "step",
        *benchmark.model_arguments(model),
        "--mode",
        benchmark.options.compile_mode,
        "--device",
        benchmark.options.torch_device,
    )


def measure(benchmark: Benchmark, model: str, name: str, variant: Variant) -> dict[str, Any]:
    """One variant: its graph, its plan, its step."""
    folder = benchmark.folder / "profile"
    bundle = folder / f"{model}-{name.replace(' ', '-')}"
    plans = bundle / "plans"
    shutil.rmtree(bundle, ignore_errors=True)
    shutil.copytree(benchmark.bundle(model), bundle, ignore=shutil.ignore_patterns("plans"))
    if variant.graph != "plain" or variant.opset != 18:
        benchmark.run_torch(
            "-m",
            "benchmarks.gpu_graphs",
            *benchmark.model_arguments(model)[:2],
            "--bundle",
            str(bundle),
            "--graph",
            variant.graph,
            "--opset",
            str(variant.opset),
        )
    plans.mkdir()
    for cache in folder.glob("*.timing.cache"):  # what is the same in all variants is measured once
        shutil.copy2(cache, plans)
    benchmark.run_tensorrt(
        "build_engines.py", "--bundle", str(bundle), "--components", "denoiser", "--rows", "2", *variant.build
    )
    for cache in plans.glob("*.timing.cache"):
        shutil.copy2(cache, folder)
    entry = json.loads(next(plans.glob("[!.]*/build.json")).read_text())["components"]["denoiser"]
    step = benchmark.run_tensorrt("-m", "benchmarks.gpu_tensorrt", "step", "--bundle", str(bundle))
    found = {
        **step,
        "build_seconds": entry["seconds"]["build"],
        "bytes": entry["bytes"],
        "difference": entry["check"]["difference"],
        "kernels": kernels(benchmark, bundle),
    }
    shutil.rmtree(bundle)
    return found


def kernels(benchmark: Benchmark, bundle: Path) -> dict[str, Any]:
    """The kernels of one plain step and their time, as ncu measures them, each alone; or why there are none."""
    if shutil.which(NCU[0]) is None:
        return {"missing": "ncu is not installed, so what a region of TensorRT 8.6 runs inside is unknown"}
    command = [
        *NCU,
        *shlex.split(benchmark.options.tensorrt_python),
        "-m",
        "benchmarks.gpu_tensorrt",
        "once",
        "--bundle",
        str(bundle),
    ]
    try:
        return read_ncu(benchmark.printed(command))
    except PartFailed as error:
        return {"missing": f"ncu failed: {error}"}


def read_ncu(printed: str) -> dict[str, Any]:
    """ncu's table: milliseconds in all, in fused attention, and of the kernels that take the most."""
    lines = printed.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    scale = {"nsecond": 1e-6, "ns": 1e-6, "usecond": 1e-3, "us": 1e-3, "msecond": 1.0, "ms": 1.0}
    times: dict[str, float] = Counter()  # type: ignore[assignment]
    counts = Counter[str]()
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        times[row["Kernel Name"]] += float(row["Metric Value"].replace(",", "")) * scale[row["Metric Unit"]]
        counts[row["Kernel Name"]] += 1
    fused = [name for name in times if ATTENTION.search(name)]
    longest = sorted(times, key=lambda name: -times[name])[:25]
    return {
        "ms": round(sum(times.values()), 4),
        "count": sum(counts.values()),
        "fused_attention": sum(counts[name] for name in fused),
        "fused_attention_ms": round(sum(times[name] for name in fused), 4),
        "longest": {name[:120]: {"count": counts[name], "ms": round(times[name], 4)} for name in longest},
    }


def fused_attention(layers: Sequence[dict[str, Any]]) -> list[str]:
    """Names of an engine's layers that are fused attention, by tactic or by their own name."""
    return [
        str(layer["Name"])[:200]
        for layer in layers
        if ATTENTION.search(f"{layer.get('TacticName', '')} {layer.get('Name', '')}")
    ]


def table(found: dict[str, Any]) -> list[list[str]]:
    """A row for torch and for each variant."""
    torch_ms = found.get("torch", {}).get("step_ms")
    rows = [[f"torch, {found['torch']['mode']}", f"{torch_ms:.3f}", "", "", "", "1.00x", ""]] if torch_ms else []
    for name, one in found.get("variants", {}).items():
        if "failed" in one:
            rows.append([name, "failed: " + one["failed"].strip().splitlines()[-1][:60], "", "", "", "", ""])
            continue
        by_ncu = one["kernels"].get("fused_attention")
        rows.append(
            [
                name,
                f"{one['step_ms']:.3f}",
                f"{one['plain_ms']:.3f}",
                str(one["fused_attention"]),
                "no ncu" if by_ncu is None else str(by_ncu),
                f"{torch_ms / one['step_ms']:.2f}x" if torch_ms else "",
                f"{one['build_seconds']:.0f}",
            ]
        )
    return rows
